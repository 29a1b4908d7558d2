r"""BERT-base with two product-key memories beside its feed-forward layers: the paper's recipe.

    python -m pkm_jax.pretrain --config=bert_base_pkm \
        --config.data.corpus='/corpora/wikipedia/*.jsonl.xz' --config.data.vocab=/bert/vocab.txt \
        --config.init_from=/runs/bert_base

Kim & Jung 2020: BERT-base, memories of 512² slots, 4 heads of 32 reads, batches of 1,024 sequences,
500k steps, Adam at 1e-4 and 1e-3 for the values, starting from a BERT pretrained without memory.
That is 262 billion tokens: six days on one H200, at the 516,000 tokens/s of docs/results.md, which
were measured with --config.train.gradient_accumulation_steps=32, as one device needs for these
batches, and --config.model.attention_dropout=0. What loss and usage it ends with has not been
measured; the paper reports a top-1 usage above 95 %.

Every other configuration starts from this one. docs/configuration.md explains every field; all can
be set on the command line.
"""

import ml_collections

from pkm_jax.configuration.resolve import defaults


def get_config() -> ml_collections.ConfigDict:
    config = defaults('bert', 'masked_lm')
    config.workdir = 'runs/bert_base_pkm'
    config.model.update(dtype='bfloat16')
    config.memory.update(placement='add', layers=(4, 8))    # the paper's choice is not published
    config.train.update(steps=500_000, batch=1024, warmup=10_000, learning_rate=1e-4,
                        values_learning_rate=1e-3)
    return config

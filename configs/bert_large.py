r"""BERT-large without memory: what the paper's BERT-base with memory is compared with.

    python -m pkm_jax.pretrain --config=bert_large \
        --config.data.corpus='/corpora/wikipedia/*.jsonl.xz' --config.data.vocab=/bert/vocab.txt

The recipe of configs/bert_base_pkm.py otherwise: 262 billion tokens, two weeks on one H100 at the
214,000 tokens/s of docs/results.md (32 sequences a step, --config.model.attention_dropout=0), or at
best 19 hours on v5e:16x16 by the estimates of docs/scaling.md. What loss it ends with has not been
measured.
"""

from pkm_jax.configs import bert_base_pkm


def get_config():
    config = bert_base_pkm.get_config()
    config.workdir = 'runs/bert_large'
    config.model.update(layers=24, width=1024, attention_heads=16, feed_forward_width=4096)
    config.memory.update(placement='none', layers=())
    return config

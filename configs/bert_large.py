r"""BERT-large without memory: what the paper's BERT-base with memory is compared with.

    python -m pkm_jax.pretrain --config=configs/bert_large.py \
        --config.data.corpus='/corpora/wikipedia/*.jsonl.xz' --config.data.vocab=/bert/vocab.txt
"""

from pkm_jax.configs import bert_base_pkm


def get_config():
    config = bert_base_pkm.get_config()
    config.workdir = 'runs/bert_large'
    config.model.update(layers=24, width=1024, attention_heads=16, feed_forward_width=4096)
    config.memory.update(placement='none', layers=())
    return config

r"""BERT-base with one memory of 4096² slots, 12.9 billion value parameters, on a TPU pod slice.

    python -m pkm_jax.pretrain --config=configs/bert_base_pkm_pod.py \
        --config.data.corpus='gs://bucket/corpus' --config.distributed.enabled=True

Made for v5e:16x16 (256 chips of 16 GB).
"""

from configs import bert_base_pkm


def get_config():
    config = bert_base_pkm.get_config()
    config.workdir = 'runs/bert_base_pkm_pod'
    config.model.attention_dropout = 0.0
    config.memory.update(layers=(6,), sub_keys=4096, updates='sparse', values_dtype='bfloat16',
                         weights_dtype='bfloat16')
    config.train.values_optimizer = 'rowwise_adam'
    return config

r"""BERT-base with one memory of 4096² slots: 12.9 billion value parameters on a TPU pod slice.

    python -m pkm_jax.compile_check --config=configs/bert_base_pkm_pod.py --topology=v5e:16x16
    launch/tpu_pod.sh --name=pod --zone=ZONE --workdir=gs://BUCKET/runs/pod run \
        --config=configs/bert_base_pkm_pod.py --config.data.corpus=/mnt/gcs/BUCKET/corpora/wikipedia

For 256 chips of v5e (16 GB), which the first command plans without any: the table is split into 32
parts by rows and 4 by columns, twice over, and a chip is filled to two fifths. What is exchanged
and what that costs is in docs/scaling.md: 13.2 million tokens/s are estimated, so 5.5 hours for
500k steps. It has not been run on a pod yet, and how it ends is unknown.

Against the paper's recipe (configs/bert_base_pkm.py): one memory, in the middle of the network,
bfloat16 values, whose rows are updated only where they were read, with one second moment a row, and
no dropout of attention weights. A table of 16.8 million rows learns from 67 million reads a step.
"""

from pkm_jax.configs import bert_base_pkm


def get_config():
    config = bert_base_pkm.get_config()
    config.workdir = 'runs/bert_base_pkm_pod'
    config.model.attention_dropout = 0.0
    config.memory.update(layers=(6,), sub_keys=4096, updates='sparse', values_dtype='bfloat16',
                         weights_dtype='bfloat16')
    config.train.values_optimizer = 'rowwise_adam'
    return config

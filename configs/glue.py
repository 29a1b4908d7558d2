r"""Fine-tuning on a task of GLUE, or on all of them in turn.

    python -m pkm_jax.finetune --config=glue:task=mrpc --config.init_from=FOLDER
    python -m pkm_jax.finetune --config=glue:task=all --config.init_from=FOLDER \
        --config.data.folder=/data/glue --config.finetune.seeds='(1, 2, 3)'

Tasks: cola, sst2, mrpc, stsb, qqp, mnli (with mismatched genres and the diagnostics AX), qnli, rte,
wnli. data.folder is the unpacked official download. 128 tokens, batches of 32, 2e-5, 3 epochs,
10 % warmup. Where test files are there, files for GLUE's server are written.
"""

import ml_collections

from pkm_jax.configuration.finetuning import finetuning_defaults
from pkm_jax.data.glue import TASKS
from pkm_jax.refusal import Refusal


def get_config(arguments: str = 'task=all') -> ml_collections.ConfigDict:
    name, _, task = arguments.partition('=')
    if name != 'task' or task not in (*TASKS, 'all'):
        raise Refusal(f'configs/glue.py: {arguments!r} must be task= and one of '
                      f'{", ".join(TASKS)}, all. The diagnostics AX belong to mnli.')
    config = finetuning_defaults('glue')
    config.workdir = f'runs/glue/{task}' if task != 'all' else 'runs/glue'
    if task == 'all':
        config.runs.update({name: {'data': {'name': name}} for name in TASKS})
    else:
        config.data.name = task
    return config

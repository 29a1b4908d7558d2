r"""Fine-tuning on questions whose answers are parts of a paragraph: SQuAD 1.1 and 2.0.

    python -m pkm_jax.finetune --config=squad:version=1 --config.init_from=FOLDER \
        --config.data.train=train-v1.1.json --config.data.validation=dev-v1.1.json
    python -m pkm_jax.finetune --config=squad:version=2 --config.init_from=FOLDER …

Windows of 384 tokens of which neighbours share 128, batches of 12, 3e-5, 2 epochs. Several files
stand with ',' between; .gz and .xz are read too. With version 2 some questions have no answer.
"""

import ml_collections

from pkm_jax.configuration.finetuning import finetuning_defaults
from pkm_jax.refusal import Refusal


def get_config(arguments: str = 'version=1') -> ml_collections.ConfigDict:
    versions = {'version=1': False, 'version=2': True}
    if arguments not in versions:
        raise Refusal(f'configs/squad.py: {arguments!r} must be version=1 or version=2.')
    config = finetuning_defaults('question_answering')
    config.workdir = f'runs/squad{arguments[-1]}'
    config.data.unanswerable = versions[arguments]
    config.train.update(batch=12, learning_rate=3e-5, values_learning_rate=3e-4)
    config.finetune.epochs = 2.
    return config

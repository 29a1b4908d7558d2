r"""Fine-tuning on words with a label each: entities, parts of speech, in CoNLL's columns.

    python -m pkm_jax.finetune --config=conll --config.init_from=FOLDER \
        --config.data.train=train.txt --config.data.validation=valid.txt

A line has a word and, in its last column, the label (data.word_column, data.label_column); an empty
line ends a sentence. Of labels such as B-PER the F1 of whole entities is what counts.
"""

import ml_collections

from pkm_jax.configuration.finetuning import finetuning_defaults


def get_config() -> ml_collections.ConfigDict:
    config = finetuning_defaults('token_classification')
    config.workdir = 'runs/conll'
    return config

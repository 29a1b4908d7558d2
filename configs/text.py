r"""Fine-tuning on one's own texts: classes, several classes each, or numbers; single or in pairs.

    python -m pkm_jax.finetune --config=text --config.init_from=FOLDER \
        --config.data.train=my.csv --config.data.text=review --config.data.label=stars

Files are .tsv, .csv, .jsonl or .parquet. Without data.validation a tenth of the training data is
held out. --config.data.problem=regression estimates numbers, multi_label any number of classes of
each text; --config.data.text_pair names the column of a second text.
"""

import ml_collections

from pkm_jax.configuration.finetuning import finetuning_defaults


def get_config() -> ml_collections.ConfigDict:
    config = finetuning_defaults('classification')
    config.workdir = 'runs/text'
    return config

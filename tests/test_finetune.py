"""Fine-tuning end to end: tiny files in every format, a model of one small layer, all it writes."""

import json

import numpy as np
import pytest

from configs import conll, glue, squad, text
from pkm_jax import finetune
from pkm_jax.checkpoints import store
from pkm_jax.configuration.folder import read_description
from pkm_jax.configuration.resolve import resolve
from pkm_jax.refusal import Refusal
from tests.conftest import WORDS

pytestmark = pytest.mark.usefixtures('compile_once')


@pytest.fixture
def tuned(tiny_bert, tmp_path):
    """Fine-tunes the tiny model by a configuration; returns the results and the folder."""
    def run(config, **data):
        config.update(workdir=str(tmp_path / 'run'), init_from=str(tiny_bert))
        config.model.update(dropout=0., attention_dropout=0.)
        config.data.update(length=32, buckets=(16, 32), **data)
        config.train.update(batch=16, learning_rate=3e-2, values_learning_rate=3e-2)
        with config.unlocked():
            config.compilation_cache = ''
        return finetune.run(config), tmp_path / 'run'
    return run


def texts(size, seed=0):
    """Texts of 3 to 24 words, of which some have the word that decides."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(size):
        words = [WORDS[number] for number in rng.integers(2, len(WORDS), rng.integers(3, 25))]
        label = int(rng.integers(2))
        words[int(rng.integers(len(words)))] = WORDS[label]
        found.append((' '.join(words), label))
    return found


def table(path, rows, header='text\tlabel'):
    path.write_text('\n'.join([header, *('\t'.join(map(str, row)) for row in rows)]) + '\n')
    return str(path)


def test_classes(tuned, tmp_path):
    names = 'bad', 'good'
    train = table(tmp_path / 'train.tsv', [(line, names[label]) for line, label in texts(203)])
    config = text.get_config()
    config.finetune.update(epochs=6., evaluations=1)
    results, folder = tuned(config, train=train, validation_fraction=.2)
    assert results['mean'] > .9
    run = resolve(read_description(folder))
    assert run.task.labels == names and run.model.classes == 2
    assert run.model.output_heads == ('pooler', 'classifier') and run.train.steps == 6 * 11
    found = json.loads((folder / 'eval_results.json').read_text())
    assert found['eval_samples'] == 41 and found['eval_accuracy'] == found['score'] > .9
    rows = list(map(json.loads, (folder / 'predictions_validation.jsonl').read_text().splitlines()))
    assert len(rows) == 41
    right = np.mean([row['prediction'] == row['label'] for row in rows])
    assert right == pytest.approx(found['eval_accuracy'])
    assert store.of_run(folder).parent.name == 'best' and (folder / 'tokenizer.json').exists()

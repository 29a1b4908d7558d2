"""Names of classes go from a run to a Hugging Face folder and back, and onto its card."""

import json
from pathlib import Path

import pytest

from pkm_jax.configuration.resolve import task_of
from pkm_jax.convert import huggingface, labels

GOLDENS = Path(__file__).parent / 'goldens'
RUN = {'task': 'classification', 'init_from': '/weights/bert_base', 'seed': 3,
       'data': {'train': '/data/reviews.tsv', 'labels': ['bad', 'fair', 'good'],
                'problem': 'multi_label'},
       'train': {'steps': 1200, 'batch': 32, 'learning_rate': 2e-5}}


def export(name, folder, run):
    model = huggingface.load(GOLDENS / name)
    huggingface.save(folder, model.config, model.params, model.statistics, run=run)
    return model.config, json.loads((folder / 'config.json').read_text())


def test_classes_keep_their_names_and_their_problem(tmp_path):
    config, content = export('classification', tmp_path / 'out', RUN)
    assert content['id2label'] == {'0': 'bad', '1': 'fair', '2': 'good'}
    assert content['label2id'] == {'bad': 0, 'fair': 1, 'good': 2}
    assert content['problem_type'] == 'multi_label_classification'
    task = task_of(labels.of_run(tmp_path / 'out', config))
    assert task.labels == ('bad', 'fair', 'good') and task.problem == 'multi_label'


def test_labels_of_words_keep_their_names(tmp_path):
    config, content = export('token_classification', tmp_path / 'out', {
        'task': 'token_classification', 'data': {'labels': ['O', 'B-A', 'I-A', 'B-B']}})
    assert list(content['id2label'].values()) == ['O', 'B-A', 'I-A', 'B-B']
    assert 'problem_type' not in content
    assert task_of(labels.of_run(tmp_path / 'out', config)).labels == ('O', 'B-A', 'I-A', 'B-B')
    given = task_of(labels.of_run(GOLDENS / 'token_classification', config))
    assert given.labels == ('O', 'B-PER', 'I-PER', 'B-LOC')


def test_names_that_nobody_gave_are_those_of_transformers(tmp_path):
    config, content = export('classification', tmp_path / 'out', None)
    assert content['id2label'] == {'0': 'LABEL_0', '1': 'LABEL_1', '2': 'LABEL_2'}
    assert content['problem_type'] == 'single_label_classification'


@pytest.mark.parametrize('name', ['question_answering', 'masked_lm'])
def test_other_heads_have_no_labels(tmp_path, name):
    _, content = export(name, tmp_path / 'out', None)
    assert 'id2label' not in content and 'problem_type' not in content


def test_answers_are_looked_for_in_windows_that_the_model_takes():
    config = huggingface.load(GOLDENS / 'question_answering').config
    task = task_of(labels.of_run(GOLDENS / 'question_answering', config))
    assert task.length == 12 and task.buckets == (12,)


def test_the_card_says_what_was_trained_on_what(tmp_path):
    export('classification', tmp_path / 'out', RUN)
    card = (tmp_path / 'out/README.md').read_text()
    for fact in ('task: classification', 'started from: bert_base', 'trained on: reviews.tsv',
                 'labels: bad, fair, good',
                 'at most 1,200 steps of 32 examples, learning rate 2e-05, seed 3'):
        assert f'* {fact}\n' in card
    export('masked_lm', tmp_path / 'plain', None)
    assert '## Training' not in (tmp_path / 'plain/README.md').read_text()

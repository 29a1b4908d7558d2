"""Names of classes go from a run to a Hugging Face folder and back, and onto its card."""

import json
from pathlib import Path

import pytest

from pkm_jax.configuration.resolve import task_of
from pkm_jax.convert import huggingface, labels
from pkm_jax.training.metrics_file import evaluation_of

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
    card = (tmp_path / 'plain/README.md').read_text()
    assert '## Training' not in card and '## Evaluation' not in card


def test_the_card_says_what_these_weights_reached(tmp_path):
    """Those of the step that is exported, of lines some of which are damaged."""
    usage = dict(slots=16, top_1_usage=.5, ceiling=.75, top_k_usage=1., kl=.25, curve=[[1, 2]])
    lines = [dict(kind='eval', step=2, loss=3.), dict(kind='train', step=4, loss=9.),
             dict(kind='eval', step=4, tokens=7, loss=2.5, eval_tokens=1024,
                  memory={'1': usage, '2': {'slots': 'many'}})]
    (tmp_path / 'metrics.jsonl').write_text('\n'.join(map(json.dumps, lines)) + '\n{"kind": "ev')
    found = evaluation_of(tmp_path, 4)
    model = huggingface.load(GOLDENS / 'memory_added')
    huggingface.save(tmp_path / 'out', model.config, model.params, model.statistics,
                     evaluation=found)
    card = (tmp_path / 'out/README.md').read_text()
    assert 'at step 4:' in card and '| loss | 2.5 |' in card and '| eval_tokens | 1,024 |' in card
    assert '| 1 | 16 | 50.0% | 75.0% | 100.0% | 0.25 |' in card and 'many' not in card
    assert 'pipeline_tag: fill-mask\n' in card and 'tokens | 7' not in card
    assert evaluation_of(tmp_path, 3) == {} == evaluation_of(tmp_path / 'out', 4)

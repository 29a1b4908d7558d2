"""What the report shows of fine-tuned runs."""

import json

import numpy as np
import pytest
from matplotlib.figure import Figure

from pkm_jax.report.finetuned import finetuned, predictions_figure, score_figure, worst_errors
from pkm_jax.report.runs import RunRecord
from pkm_jax.report.theme import LIGHT


@pytest.fixture
def run(tmp_path):
    """A run with three evaluations, the second the best, and these predictions."""
    def make(rows, **results):
        (tmp_path / 'predictions_validation.jsonl').write_text(
            ''.join(json.dumps(row) + '\n' for row in rows))
        (tmp_path / 'eval_results.json').write_text(json.dumps(results))
        evals = [{'step': step, 'accuracy': score, 'loss': 1.} for step, score in (
            (10, .5), (20, .8), (30, .7))]
        return RunRecord('tuned', tmp_path, {'train': {'best': 'accuracy'}}, [], evals, {}, [])
    return make


def row(label, prediction, share=.9, text='some text'):
    return {'text': text, 'label': label, 'prediction': prediction,
            'probabilities': {prediction: share, 'other': 1 - share}}


def test_curves_have_the_best_score_and_the_baseline(run):
    one = run([], eval_majority_accuracy=.6)
    ax, = score_figure([one], LIGHT).axes
    assert ax.lines[0].get_ydata().tolist() == [.5, .8, .7]
    assert set(ax.lines[1].get_ydata()) == {.6}
    assert 'tuned  0.800' in [text.get_text() for text in ax.texts]
    one.config['train']['best'] = ''
    assert finetuned([one]) == []


def test_a_confusion_matrix_counts_labels_by_predictions(run):
    one = run([row('a', 'a'), row('a', 'b'), row('b', 'b'), row('b', 'b')])
    ax, = predictions_figure(one, LIGHT).axes
    assert [text.get_text() for text in ax.texts] == ['1', '1', '0', '2']
    np.testing.assert_allclose(ax.images[0].get_array(), [[.5, .5], [0, 1]])


def test_estimates_are_drawn_against_numbers(run):
    one = run([{'text': 'a', 'label': x, 'prediction': y} for x, y in ((1., 2.), (2., 4.), (3., 5.))])
    ax, = predictions_figure(one, LIGHT).axes
    assert 'r = 0.982' in ax.get_title()


def test_other_predictions_have_no_figure(run):
    assert predictions_figure(run([]), LIGHT) is None
    assert predictions_figure(run([{'label': ['a'], 'prediction': ['a']}]), LIGHT) is None
    assert predictions_figure(run([row(f'{n}', f'{n}') for n in range(21)]), LIGHT) is None
    assert isinstance(predictions_figure(run([row(f'{n}', f'{n}') for n in range(20)]), LIGHT), Figure)


def test_the_worst_errors_are_those_that_were_surest(run):
    page = worst_errors(run([row('a', 'b', .6, 'not so sure'), row('a', 'a', .9, 'right'),
                             row('a', 'b', .9, '<surely> wrong')]))
    assert 'right' not in page and '&lt;surely&gt;' in page
    assert page.index('surely') < page.index('not so sure')
    assert worst_errors(run([row('a', 'a')])) == ''

"""The best spans of several windows, and EM and F1 by SQuAD's definition with its edge cases."""

import numpy as np
import pytest

from pkm_jax.data.sequences import Tokens
from pkm_jax.data.squad import Answer, Question
from pkm_jax.data.windows import Window
from pkm_jax.tasks import answers


def question(*texts, context='Ann left the old town of Rome .', name='q'):
    return Question(name, 'Where?', context, tuple(Answer(text, 0) for text in texts), 'here')


@pytest.mark.parametrize('gold, guess, em, f1', [
    ('the Cat', 'cat', 1, 1), ('a cat!', 'The "cat"', 1, 1), ('cat  sat', 'cat sat', 1, 1),
    ('cat sat', 'sat on', 0, .5), ('cat cat', 'cat', 0, 2 / 3), ('theory', 'ory', 0, 0),
    ('U.S.', 'us', 1, 1), ('a-b', 'ab', 1, 1), ('É', 'é', 1, 1), ('“cat”', 'cat', 0, 0),
    ('the', '', 1, 0), ('cat', '', 0, 0),
])
def test_em_and_f1(gold, guess, em, f1):
    assert answers.exact(gold, guess) == em
    assert answers.f1(gold, guess, empty=False) == pytest.approx(f1)


def test_of_version_2_two_empty_answers_agree():
    assert answers.f1('the', '', empty=True) == 1 and answers.f1('cat', '', empty=True) == 0
    assert answers.f1('cat', 'the', empty=True) == 0


def test_the_best_of_several_gold_answers_counts():
    questions = [question('Rome', 'old town'), question('the left'), question('Ann')]
    found = answers.scores(questions, ['old', 'left', 'Bob'], None)
    assert found == {'exact_match': pytest.approx(100 / 3),
                     'f1': pytest.approx(100 * (2 / 3 + 1 + 0) / 3)}


def test_questions_without_an_answer():
    """A gold answer of articles alone is none; '' is right where there is none."""
    questions = [question('Rome'), question(), question('the')]
    found = answers.scores(questions, ['Rome', '', 'Ann'], [0., 0., 0.])
    assert found['exact_match'] == pytest.approx(200 / 3)
    assert found['HasAns_exact'] == 100 and found['NoAns_exact'] == 50 == found['NoAns_f1']


def test_the_best_threshold_is_that_of_all_thresholds():
    rng = np.random.default_rng(0)
    questions = [question(*[['Rome'], ['old town'], []][number % 3]) for number in range(30)]
    guesses = list(rng.choice(['Rome', 'old town', 'town'], 30))
    odds = list(rng.permutation(30).astype(float))
    found = answers.best_thresholds(questions, guesses, odds)

    def at(threshold):
        given = [guess if odd <= threshold else '' for guess, odd in zip(guesses, odds)]
        return answers.scores(questions, given, odds)

    every = [at(threshold) for threshold in [-1., *odds]]
    for name, measure in (('best_exact', 'exact_match'), ('best_f1', 'f1')):
        assert found[name] == pytest.approx(max(scores[measure] for scores in every))
        assert at(found[f'{name}_threshold'])[measure] == pytest.approx(found[name])


def window(number, first, offsets):
    size = first + len(offsets) + 1
    return Window(number, Tokens(np.zeros(size, np.int32), np.zeros(size, np.int32)), first,
                  np.array(offsets))


def outputs(*windows):
    """Of each window [(token, logit)] of starts, of ends, and the null score."""
    def column(part, field):
        return np.array([[pair[field] for pair in one[part]] for one in windows])

    return {'starts': column(0, 0), 'start_logits': column(0, 1).astype(float),
            'ends': column(1, 0), 'end_logits': column(1, 1).astype(float),
            'null': np.array([one[2] for one in windows], float)}


def test_the_best_answer_over_windows():
    """Not one that ends before it starts, lies in the question or is too long."""
    words = [(0, 3), (4, 8), (9, 12), (13, 16), (17, 21), (22, 24), (25, 29)]
    windows = [window(0, 3, words[:5]), window(0, 3, words[3:])]
    found, = answers.n_best([question('Rome')], windows, outputs(
        ([(1, 99), (7, 8), (3, 9)], [(1, 99), (3, 6), (7, 5)], 4.),
        ([(6, 6), (3, 5), (5, 1)], [(6, 6), (5, 2), (4, 1)], 3.)), number=4, longest=3)
    assert [candidate.text for candidate in found.candidates] == ['Ann', 'town', 'Rome', 'old town of']
    assert found.candidates[0].score == 15
    assert sum(candidate.probability for candidate in found.candidates) == pytest.approx(1)
    assert found.null_score == 3 and found.null_odds == -12
    assert found.answer(None) == 'Ann' == found.answer(0.) and found.answer(-13.) == ''


def test_a_span_in_two_windows_is_one_candidate():
    windows = [window(0, 3, [(0, 3), (4, 8)]), window(0, 3, [(4, 8), (9, 12)])]
    found, = answers.n_best([question()], windows, outputs(
        ([(4, 5)], [(4, 5)], 0.), ([(3, 6)], [(3, 6)], 0.)), number=3, longest=3)
    assert [(one.text, one.score) for one in found.candidates] == [('left', 12.)]


def test_without_any_candidate_there_is_no_answer():
    found, = answers.n_best([question()], [window(0, 3, np.zeros((0, 2)))],
                            outputs(([(0, -1e30)], [(0, -1e30)], 2.)), number=3, longest=3)
    assert found.answer(None) == '' and np.isfinite(found.null_odds)

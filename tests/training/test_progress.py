"""Which evaluation is the best, and when enough were worse."""

import math

from pkm_jax.training.progress import Progress


def judged(values, patience=0, lower_is_better=False):
    progress = Progress()
    return progress, [progress.judge(step, value, lower_is_better, patience)
                      for step, value in enumerate(values, 1)]


def test_more_is_better_and_the_first_of_equals_counts():
    progress, best = judged([.5, .7, .7, .6])
    assert best == [True, True, False, False]
    assert (progress.best, progress.best_step, progress.worse) == (.7, 2, 2)
    assert not progress.stopped


def test_less_is_better_of_an_error():
    assert judged([2., 1., 1.5], lower_is_better=True)[1] == [True, True, False]


def test_patience_counts_what_is_worse_in_a_row():
    assert not judged([.5, .4, .6, .5], patience=2)[0].stopped
    assert judged([.5, .4, .6, .5, .6], patience=2)[0].stopped


def test_no_number_is_never_better():
    progress, best = judged([.5, math.nan, math.inf])
    assert best == [True, False, False] and progress.best == .5

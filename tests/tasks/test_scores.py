"""Metrics against their definitions in NumPy, and where these do not hold."""

import numpy as np
import pytest

from pkm_jax.tasks import scores


def test_of_classes():
    labels, guesses = np.array([0, 1, 1, 0, 1, 0]), np.array([0, 1, 0, 0, 1, 1])
    found = scores.of_classes(labels, guesses)
    tp, fp, fn, tn = 2, 1, 1, 2
    assert found['accuracy'] == pytest.approx(4 / 6) and found['f1'] == pytest.approx(2 / 3)
    assert found['matthews_correlation'] == pytest.approx(
        (tp * tn - fp * fn) / np.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)))
    assert 'f1' not in scores.of_classes(np.array([0, 2]), np.array([0, 1]))
    assert scores.of_classes(np.array([0, 1]), np.array([1, 1]))['matthews_correlation'] == 0


def test_of_numbers():
    labels, guesses = np.array([1., 2., 3., 4.]), np.array([1., 2., 3., 40.])
    found = scores.of_numbers(labels, guesses)
    assert found['spearmanr'] == 1 and found['pearson'] == pytest.approx(
        np.corrcoef(labels, guesses)[0, 1]) and found['rmse'] == 18
    assert scores.of_numbers(labels, np.ones(4))['pearson'] == 0


def test_of_label_sets():
    labels = np.array([[True, False], [True, True], [False, False]])
    guesses = np.array([[True, False], [True, False], [False, False]])
    found = scores.of_label_sets(labels, guesses)
    assert found == {'micro_f1': pytest.approx(.8), 'macro_f1': .5,
                     'exact_match': pytest.approx(2 / 3)}

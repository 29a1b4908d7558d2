"""Entities by conlleval's definition: cases with their outcome written out."""

import pytest

from pkm_jax.tasks.entities import are_entities, entities, scores


@pytest.mark.parametrize('labels, expected', [
    ('B-A I-A O B-B', [('A', 0, 1), ('B', 3, 3)]),
    ('B-A B-A I-A', [('A', 0, 0), ('A', 1, 2)]),
    ('I-A I-A O I-A', [('A', 0, 1), ('A', 3, 3)]),                  # IOB1
    ('I-A I-B', [('A', 0, 0), ('B', 1, 1)]),
    ('B-A I-B I-A', [('A', 0, 0), ('B', 1, 1), ('A', 2, 2)]),
    ('B-A I-A E-A S-B O', [('A', 0, 2), ('B', 3, 3)]),              # BIOES
    ('B-A E-A I-A', [('A', 0, 1), ('A', 2, 2)]),
    ('S-A I-A E-A', [('A', 0, 0), ('A', 1, 2)]),
    ('O O', []), ('B-X-Y I-X-Y', [('X-Y', 0, 1)]),
])
def test_entities(labels, expected):
    assert sorted(entities([labels.split()])) == [(0, *one) for one in sorted(expected)]


def test_scores_count_whole_entities():
    gold = ['B-A I-A O B-B'.split(), 'B-B'.split()]
    guess = ['B-A O O B-B'.split(), 'B-A'.split()]
    found = scores(gold, guess)
    assert found['precision'] == pytest.approx(1 / 3) and found['recall'] == pytest.approx(1 / 3)
    assert found['f1'] == pytest.approx(1 / 3)
    assert found['f1_A'] == 0 and found['f1_B'] == pytest.approx(2 / 3)
    assert scores([['O']], [['O']])['f1'] == 0


def test_parts_of_speech_are_none():
    assert are_entities(['O', 'B-A']) and not are_entities(['NN', 'O']) and not are_entities(['O'])

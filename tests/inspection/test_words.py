"""Whole words of pieces, where they stand in a text, and their kinds."""

import pytest

from pkm_jax.data.vocabulary import word_pieces
from pkm_jax.inspection.words import KINDS, WordCutter, kind
from pkm_jax.prediction.texts import Text
from tests.prediction.conftest import WORDS


def cut(text, longest=20):
    cutter = WordCutter(word_pieces(WORDS, lowercase=False), longest)
    words, = cutter([Text((text,), '')])
    return words, cutter.tally


def test_pieces_are_joined_to_words_with_their_places():
    words, tally = cut('A bxy,  c[MASK]')
    assert words.names == ['[CLS]', 'A', 'bxy', ',', 'c', '[MASK]', '[SEP]']
    assert words.word_of == [0, 1, 2, 2, 2, 3, 4, 5, 6]
    assert len(words.ids) == 9 == tally.tokens
    assert [words.text[slice(*span)] for span in words.spans] == [
        '', 'A', 'bxy', ',', 'c', '[MASK]', '']
    assert [KINDS[number] for number in words.kinds] == [
        'special', 'capitalised', 'in pieces', 'punctuation', 'word', 'special', 'special']


def test_a_long_text_loses_its_end():
    words, tally = cut('a b c d e f', longest=5)
    assert words.names == ['[CLS]', 'a', 'b', 'c', '[SEP]'] and tally.truncated == 1
    assert len(words.word_of) == len(words.ids) == 5


@pytest.mark.parametrize('name, pieces, expected', [
    ('tree', 1, 'word'), ('Tree', 1, 'capitalised'), ('Tree', 2, 'in pieces'), ('4th', 2, 'number'),
    ('—', 1, 'punctuation'), ('木', 1, 'word')])
def test_kinds_are_told_by_spelling(name, pieces, expected):
    assert KINDS[kind(name, pieces)] == expected

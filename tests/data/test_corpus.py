"""Splits: repeatable, in blocks, and never empty."""

import pytest

from pkm_jax.data import corpus
from pkm_jax.data.corpus import Splits


def test_splits_are_repeatable_keep_blocks_together_and_follow_the_fraction(paragraphs):
    many = [f'{paragraph} {copy}' for copy in range(32) for paragraph in paragraphs]
    splits = [split for split, _ in Splits(0.25).assign(many)]
    assert splits == [split for split, _ in Splits(0.25).assign(many)]
    size = corpus.PARAGRAPHS_PER_BLOCK
    assert all(len(set(splits[start:start + size])) == 1 for start in range(0, len(splits), size))
    share = splits.count('validation') / len(splits)
    standard_deviation = (0.25 * 0.75 / (len(many) / size)) ** 0.5
    assert abs(share - 0.25) < 4 * standard_deviation


@pytest.mark.parametrize('number', [2, 3, 16, 17, 33, 600])
@pytest.mark.parametrize('fraction', [1e-9, 0.005, 0.1, 0.5, 0.9, 1 - 1e-9])
def test_both_splits_hold_a_block_however_small_the_text(number, fraction):
    for text in range(20):
        paragraphs = [f'text {text}, paragraph {n}' for n in range(number)]
        splits = [split for split, _ in Splits.plan(paragraphs, fraction).assign(paragraphs)]
        assert {'train', 'validation'} == set(splits)
        if number > corpus.PARAGRAPHS_PER_BLOCK:
            assert Splits.plan(paragraphs, fraction).block == corpus.PARAGRAPHS_PER_BLOCK


def test_a_text_with_both_splits_is_read_no_further_and_split_by_its_hashes_alone():
    paragraphs = (f'paragraph {n}' for n in range(1_000_000))
    assert Splits.plan(paragraphs, 0.1) == Splits(0.1)
    assert next(paragraphs) < 'paragraph 2000'


def test_a_single_paragraph_is_trained_on():
    assert list(Splits.plan(['all'], 0.9).assign(['all'])) == [('train', 'all')]


@pytest.mark.parametrize('line', [
    'as it is', ' before', 'after ', 'two  spaces', 'a\ttab', 'no-break\xa0space', 'thin\u2009space',
    'ideographic\u3000space', 'line\u2028separator', 'soft\xadhyphen', 'zero\u200bwidth', 'file\x1cseparator',
    'next\x85line', '', ' ', 'né 的 \N{SKULL}'])
def test_white_space_is_normalised_as_by_splitting(line):
    assert corpus._normalised(line) == ' '.join(line.split())


def test_all_printable_characters_but_the_space_are_no_white_space():
    assert [number for number in range(0x110000)
            if chr(number).isprintable() and chr(number).isspace()] == [ord(' ')]

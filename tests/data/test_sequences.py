"""Texts, pairs, windows and words as sequences of tokens."""

import numpy as np
import pytest

from pkm_jax.data.sequences import encode
from pkm_jax.data.vocabulary import word_pieces
from pkm_jax.data.windows import span_of, windows
from pkm_jax.data.words import encode_words

WORDS = 'a b c d e f g h x ##y ##z'.split()
VOCABULARY = word_pieces(['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', *WORDS])


def text(tokens):
    return ' '.join(VOCABULARY.tokens[token] for token in tokens)


def test_one_text_and_two():
    one, = encode(VOCABULARY, ['a xy'], None, 8)
    assert text(one.tokens) == '[CLS] a x ##y [SEP]' and not one.segments.any()
    two, = encode(VOCABULARY, ['a'], ['b c'], 8)
    assert text(two.tokens) == '[CLS] a [SEP] b c [SEP]'
    assert two.segments.tolist() == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize('first, second, expected', [
    ('a b c d e f g h', 'a', '[CLS] a b c d [SEP] a [SEP]'),
    ('a', 'a b c d e f g h', '[CLS] a [SEP] a b c d [SEP]'),
    ('a b c d e f', 'g h a b', '[CLS] a b c [SEP] g h [SEP]'),
    ('g h a b', 'a b c d e f', '[CLS] g h [SEP] a b c [SEP]'),
    ('a b c d', 'e f g h', '[CLS] a b [SEP] e f g [SEP]')])
def test_the_longer_of_a_pair_is_cut_as_transformers_does(first, second, expected):
    found, = encode(VOCABULARY, [first], [second], 8)
    assert text(found.tokens) == expected


def test_a_single_text_loses_its_end():
    assert text(encode(VOCABULARY, ['a b c d e f g h'], None, 8)[0].tokens) == (
        '[CLS] a b c d e f [SEP]')


def test_windows_share_tokens_and_hold_every_one():
    found = windows(VOCABULARY, ['a b'], ['a b c d e f g h'], 10, 2)
    assert [text(window.tokens.tokens) for window in found] == [
        '[CLS] a b [SEP] a b c d e [SEP]', '[CLS] a b [SEP] d e f g h [SEP]']
    assert found[1].first == 4 and found[1].offsets[0].tolist() == [6, 7]
    short, = windows(VOCABULARY, ['a b'], ['a b'], 10, 2)
    assert text(short.tokens.tokens) == '[CLS] a b [SEP] a b [SEP]'


def test_a_long_question_leaves_half_to_the_context():
    found = windows(VOCABULARY, ['a ' * 50], ['b c'], 12, 4)
    assert len(found[0].tokens.tokens) <= 12 and (found[0].tokens.segments == 1).sum() >= 3


def test_spans_are_of_characters():
    """Of accents and capitals, which the tokenizer drops; of an answer within a word."""
    window, = windows(VOCABULARY, ['a'], ['Á  b xyz d'], 20, 2)
    tokens = window.tokens.tokens

    def of(start, end):
        first, last = span_of(window, start, end)
        return text(tokens[first:last + 1])

    assert of(0, 1) == 'a' and of(3, 4) == 'b' and of(5, 8) == 'x ##y ##z'
    assert of(6, 7) == '##y' and of(3, 10) == 'b x ##y ##z d'
    assert of(2, 4) == 'b'          # white space before it
    assert span_of(window, 1, 3) is None and span_of(window, 9, 11) is None


def test_words_are_labelled_by_their_first_piece():
    one, = encode_words(VOCABULARY, [['a', 'xyz', 'unknown', 'b']], 10)
    assert text(one.tokens.tokens) == '[CLS] a x ##y ##z [UNK] b [SEP]'
    assert one.words.tolist() == [0, 1, 2, 3] and one.places.tolist() == [1, 2, 5, 6]


def test_long_sentences_have_parts_and_every_word_is_in_one():
    words = ['xyz', '\u200d', 'a', 'xyzyzyz', 'xy', 'b']    # the second becomes no token
    found = encode_words(VOCABULARY, [words, ['a']], 6)
    assert np.concatenate([one.words for one in found if one.number == 0]).tolist() == list(range(6))
    assert all(len(one.tokens.tokens) <= 6 for one in found) and found[-1].number == 1

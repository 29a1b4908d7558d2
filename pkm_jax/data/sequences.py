"""One text or two to one sequence of tokens: [CLS] text [SEP], or [CLS] text [SEP] second [SEP]."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32

from pkm_jax.data.vocabulary import Vocabulary


class Tokens(NamedTuple):
    """The tokens of a sequence, and which of them are of the second text (1) or not (0)."""
    tokens: Int32[np.ndarray, 'n']
    segments: Int32[np.ndarray, 'n']


def encode(
    vocabulary: Vocabulary, texts: Sequence[str], seconds: Sequence[str] | None, length: int,
) -> list[Tokens]:
    """The sequences of texts, or of pairs of texts, of at most `length` tokens.

    What is too long loses its end: of a pair the longer text first, until both are of a length.
    """
    cut = vocabulary.tokenizer()

    def ids_of(some):
        return [encoding.ids for encoding in cut.encode_batch_fast(some, add_special_tokens=False)]

    firsts = ids_of(list(texts))
    if seconds is None:
        return [joined(vocabulary, first[:length - 2]) for first in firsts]
    pairs = zip(firsts, ids_of(list(seconds)))
    return [joined(vocabulary, *_shortened(first, second, length - 3)) for first, second in pairs]


def joined(vocabulary: Vocabulary, first: list[int], second: list[int] | None = None) -> Tokens:
    """One sequence of tokens that are short enough."""
    start = [vocabulary.cls_id, *first, vocabulary.sep_id]
    end = [] if second is None else [*second, vocabulary.sep_id]
    segments = np.repeat(np.array([0, 1], np.int32), [len(start), len(end)])
    return Tokens(np.array([*start, *end], np.int32), segments)


def _shortened(first, second, room):
    """Both texts, of `room` tokens together: the longer one is cut, and both below half of it."""
    excess = len(first) + len(second) - room
    if excess <= 0:
        return first, second
    shorter = min(len(first), len(second), room // 2)
    longer = room - shorter
    if len(first) > len(second):
        return first[:longer], second[:shorter]
    return first[:shorter], second[:longer]

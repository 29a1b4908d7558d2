"""Texts to batches of few shapes, and their results back in order.

Texts are taken a window at a time and sorted by length within it, so that a batch pads little and
memory does not grow with their number. A batch has always as many rows, and a length of `lengths`:
each pair is one compiled program.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import jax
import numpy as np
from jaxtyping import Int

from pkm_jax.prediction.texts import Text

SHORTEST = 32       # tokens that shorter texts are padded to
WINDOW = 32         # batches that are sorted together, once so many texts have come
Result = TypeVar('Result')
AnyEncoded = TypeVar('AnyEncoded', bound='Encoded')


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A text as a model reads it."""
    text: str
    ids: Sequence[int]
    segments: Sequence[int] = ()    # (): all 0


class TokenBatch(NamedTuple):
    """Rows of texts, those after the last text of length 0."""
    tokens: Int[np.ndarray | jax.Array, 'B L']
    segments: Int[np.ndarray | jax.Array, 'B L']
    lengths: Int[np.ndarray | jax.Array, 'B']


@dataclasses.dataclass(frozen=True)
class Shapes:
    """The shapes that batches can have: `rows` texts, of the next of 32, 64, 128, … tokens."""
    rows: int
    max_length: int
    shortest: int = SHORTEST

    def length(self, tokens: int) -> int:
        """The length that holds so many tokens."""
        length = self.shortest
        while length < tokens:
            length *= 2
        return min(length, self.max_length)


def in_order(
    texts: Iterable[Text], encode: Callable[[Sequence[Text]], list[AnyEncoded]], shapes: Shapes,
    pad: int,
    run: Callable[[TokenBatch, Sequence[AnyEncoded]], Callable[[], Sequence[Result]]],
) -> Iterator[tuple[AnyEncoded, Result]]:
    """What `encode` makes of texts, each with its result, in the order of the texts.

    `run` starts the computation of a batch and returns what waits for the results of its texts: the
    batches of a window are all started before the first one is waited for.
    """
    for window in map(encode, _windows(texts, shapes.rows)):
        by_length = sorted(range(len(window)), key=lambda place: len(window[place].ids))
        started = []
        for first in range(0, len(window), shapes.rows):
            places = by_length[first:first + shapes.rows]
            chosen = [window[place] for place in places]
            started.append((places, run(padded(chosen, shapes, pad), chosen)))
        results = dict(pair for places, wait in started for pair in zip(places, wait()))
        for place, text in enumerate(window):
            yield text, results[place]


def padded(texts: Sequence[Encoded], shapes: Shapes, pad: int) -> TokenBatch:
    """The batch of at most `rows` texts."""
    length = shapes.length(max(len(text.ids) for text in texts))
    tokens = np.full((shapes.rows, length), pad, np.int32)
    segments, lengths = np.zeros_like(tokens), np.zeros(shapes.rows, np.int32)
    for row, text in enumerate(texts):
        lengths[row] = len(text.ids)
        tokens[row, :len(text.ids)] = text.ids
        segments[row, :len(text.ids)] = text.segments or 0
    return TokenBatch(tokens, segments, lengths)


def _windows(texts: Iterable[Text], rows: int) -> Iterator[list[Text]]:
    """One batch first, which is soon answered, then twice as many each time."""
    window: list[Text] = []
    size = rows
    for text in texts:
        window.append(text)
        if len(window) == size:
            yield window
            window, size = [], min(2 * size, WINDOW * rows)
    if window:
        yield window

"""A question and its context: as many sequences [CLS] question [SEP] context [SEP] as it takes."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from pkm_jax.data.sequences import Tokens, joined
from pkm_jax.data.vocabulary import Vocabulary

QUESTION = 64       # tokens of a question: the rest of a longer one is left out


class Window(NamedTuple):
    """A sequence with a part of a context."""
    number: int                         # of the question
    tokens: Tokens
    first: int                          # where the context begins among the tokens
    offsets: Int[np.ndarray, 'n 2']     # characters of the context's tokens: from, up to


def windows(
    vocabulary: Vocabulary, questions: Sequence[str], contexts: Sequence[str], length: int,
    stride: int,
) -> list[Window]:
    """The windows of each question in turn, of at most `length` tokens.

    Two neighbours share `stride` tokens of the context, or half of what fits where that is less.
    """
    cut = vocabulary.tokenizer()
    asked = [encoding.ids[:min(QUESTION, length // 2)] for encoding in cut.encode_batch_fast(
        [question.strip() for question in questions], add_special_tokens=False)]
    distinct = list(dict.fromkeys(contexts))
    encoded = dict(zip(distinct, cut.encode_batch(distinct, add_special_tokens=False)))
    found = []
    for number, (question, context) in enumerate(zip(asked, contexts)):
        ids, offsets = encoded[context].ids, np.array(encoded[context].offsets).reshape(-1, 2)
        room = length - 3 - len(question)
        step = room - min(stride, room // 2)
        for start in range(0, max(len(ids) - (room - step), 1), step):
            part = ids[start:start + room]
            found.append(Window(number, joined(vocabulary, question, part), 2 + len(question),
                                offsets[start:start + room]))
    return found


def span_of(window: Window, start: int, end: int) -> tuple[int, int] | None:
    """The first and the last token of the characters from `start` up to `end` of a context; None
    where the window does not hold all of them."""
    begins, ends = window.offsets[:, 0], window.offsets[:, 1]
    if not len(begins) or start < begins[0] or end > ends[-1] or end <= start:
        return None
    first = int(np.searchsorted(ends, start, 'right'))
    last = int(np.searchsorted(begins, end, 'left')) - 1
    return (window.first + first, window.first + last) if first <= last else None

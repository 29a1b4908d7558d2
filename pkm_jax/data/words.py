"""Words to sequences of tokens, of which the first of each word stands for it."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from pkm_jax.data.sequences import Tokens, joined
from pkm_jax.data.vocabulary import Vocabulary


class Words(NamedTuple):
    """A sequence of tokens over some words of a sentence."""
    number: int                         # of the sentence
    tokens: Tokens
    words: Int[np.ndarray, 'n']         # numbers of the words in it
    places: Int[np.ndarray, 'n']        # of the first token of each


def encode_words(
    vocabulary: Vocabulary, sentences: Sequence[Sequence[str]], length: int,
) -> list[Words]:
    """The sentences in turn, a long one in parts of at most `length` tokens, cut between words.

    Every word is in one part. One that becomes no token is [UNK]; the end of one that is longer
    than a part is left out.
    """
    cut, room = vocabulary.tokenizer(), length - 2
    unknown = vocabulary.pad_id if vocabulary.unk_id is None else vocabulary.unk_id
    encoded = cut.encode_batch([list(words) for words in sentences], is_pretokenized=True,
                               add_special_tokens=False)
    found = []
    for number, (words, encoding) in enumerate(zip(sentences, encoded)):
        pieces: list[list[int]] = [[] for _ in words]
        for word, token in zip(encoding.word_ids, encoding.ids):
            pieces[word].append(token)
        part: list[int] = []
        held: list[tuple[int, int]] = []
        for word, ids in enumerate(pieces):
            ids = ids[:room] or [unknown]
            if len(part) + len(ids) > room:
                found.append(_words(vocabulary, number, part, held))
                part, held = [], []
            held.append((word, 1 + len(part)))
            part += ids
        found.append(_words(vocabulary, number, part, held))
    return found


def _words(vocabulary, number, part, held):
    words, places = np.array(held, np.int32).reshape(-1, 2).T
    return Words(number, joined(vocabulary, part), words, places)

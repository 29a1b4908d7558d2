"""Who reads each slot of a memory, over a stream of texts, in bounded memory.

Counts of slots are exact. Of pairs (slot, word) and of contexts a table holds the heaviest: where
there are too many pairs, each slot keeps those of most weight, and what was dropped is not known
again. `exact` says whether that happened.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from pkm_jax.inspection.reading import Reads
from pkm_jax.inspection.words import KINDS, Words

MOST_PAIRS = 4_000_000      # (slot, word) in a table
MOST_WORDS = 2 ** 20        # different ones that are told apart
CONTEXTS = 3                # of a slot, those of most weight
RARER = '(rarer words)'
_WORD_BITS = 24


class WordIndex:
    """Numbers of words, how often each was there, and its kind; the first stands for the words
    after the first MOST_WORDS different ones."""

    def __init__(self) -> None:
        self.names, self.kinds, self.counts = [RARER], [KINDS.index('word')], [0]
        self._numbers: dict[tuple[str, int], int] = {}

    def __call__(self, words: Words) -> Int[np.ndarray, 'words']:
        """The numbers of the words of a text, which are counted."""
        found = []
        for name, kind in zip(words.names, words.kinds):
            number = self._numbers.get((name, kind))
            if number is None:
                number = len(self.names) if len(self.names) < MOST_WORDS else 0
                if number:
                    self._numbers[name, kind] = number
                    self.names.append(name)
                    self.kinds.append(kind)
                    self.counts.append(0)
            self.counts[number] += 1
            found.append(number)
        return np.array(found)


class Counts(NamedTuple):
    """Of each slot: how often it was read, how often it was a head's best, the sum of weights."""
    selected: Int[np.ndarray, 'S']
    best: Int[np.ndarray, 'S']
    mass: Float[np.ndarray, 'S']


class Pairs(NamedTuple):
    """Slots with words that read them: the sum of weights over tokens and heads, heaviest first
    within a slot, slots ascending."""
    slots: Int[np.ndarray, 'n']
    words: Int[np.ndarray, 'n']
    weights: Float[np.ndarray, 'n']


class Context(NamedTuple):
    """A word in a text that read a slot with that weight, of all heads together."""
    weight: float
    text: Words
    word: int


class Readers:
    """Of one memory of `slots` slots; contexts are kept for the `shown` slots read most."""

    def __init__(self, slots: int, shown: int):
        self.counts = Counts(np.zeros(slots, np.int64), np.zeros(slots, np.int64),
                             np.zeros(slots))
        self.exact = True
        self._shown = shown
        self._keys, self._weights = np.zeros(0, np.int64), np.zeros(0)
        self._new: list[tuple[np.ndarray, np.ndarray]] = []
        self._contexts: dict[int, list[Context]] = {}

    def add(self, texts: Sequence[tuple[Words, np.ndarray, Reads]]) -> None:
        """Adds what some texts read: their words, the numbers of these, the reads."""
        slots = np.concatenate([_flat(reads.slots) for *_, reads in texts]).astype(np.int64)
        weights = np.concatenate([_flat(reads.weights) for *_, reads in texts]).astype(np.float64)
        starts = np.cumsum([0, *(len(numbers) for _, numbers, _ in texts)])[:-1]
        places = np.concatenate([    # among the words of all these texts
            np.repeat(start + np.asarray(words.word_of), reads.slots[0].size)
            for start, (words, _, reads) in zip(starts, texts)])
        self._count(slots, weights, np.concatenate([
            reads.slots[:, :, 0].reshape(-1) for *_, reads in texts]))
        read, weights = summed(slots << 32 | places, weights)
        slots, places = read >> 32, read & (2 ** 32 - 1)
        words = np.concatenate([numbers for _, numbers, _ in texts])[places]
        self._new.append(summed(slots << _WORD_BITS | words, weights))
        if sum(len(keys) for keys, _ in self._new) > max(len(self._keys), MOST_PAIRS // 8):
            self._merge()
        self._keep_contexts([words for words, *_ in texts], starts, slots, places, weights)

    def pairs(self) -> Pairs:
        """The words of each slot."""
        self._merge()
        slots, words = self._keys >> _WORD_BITS, self._keys & (2 ** _WORD_BITS - 1)
        order = np.lexsort((-self._weights, slots))
        return Pairs(slots[order], words[order], self._weights[order])

    def contexts(self, slot: int) -> list[Context]:
        """The words in their texts that read the slot with most weight."""
        return self._contexts.get(slot, [])

    def most_read(self, count: int) -> Int[np.ndarray, 'n']:
        """The slots of most weight, falling; none that was not read."""
        order = np.argsort(-self.counts.mass, kind='stable')[:count]
        return order[self.counts.mass[order] > 0]

    def _count(self, slots, weights, best):
        size = len(self.counts.mass)
        for field, found in zip(self.counts, (
                np.bincount(slots, minlength=size), np.bincount(best, minlength=size),
                np.bincount(slots, weights, minlength=size))):
            field += found

    def _merge(self):
        keys, weights = zip((self._keys, self._weights), *self._new)
        self._keys, self._weights = summed(np.concatenate(keys), np.concatenate(weights))
        self._new = []
        kept = 64
        while len(self._keys) > MOST_PAIRS:
            chosen = heaviest(self._keys >> _WORD_BITS, self._weights, kept)
            self._keys, self._weights = self._keys[chosen], self._weights[chosen]
            self.exact, kept = False, kept // 2

    def _keep_contexts(self, texts, starts, slots, places, weights):
        mass, shown = self.counts.mass, self._shown
        least = np.partition(mass, -shown)[-shown] if shown < len(mass) else 0
        chosen = np.flatnonzero(mass[slots] >= least)
        chosen = chosen[heaviest(slots[chosen], weights[chosen], CONTEXTS)]
        numbers = np.searchsorted(starts, places[chosen], side='right') - 1
        for slot, weight, number, place in zip(slots[chosen].tolist(), weights[chosen].tolist(),
                                               numbers.tolist(), places[chosen].tolist()):
            held = self._contexts.setdefault(slot, [])
            if len(held) < CONTEXTS or weight > held[-1].weight:
                held.append(Context(weight, texts[number], place - int(starts[number])))
                held.sort(key=lambda context: -context.weight)
                del held[CONTEXTS:]
        if len(self._contexts) > 2 * shown:
            self._contexts = {slot: held for slot, held in self._contexts.items()
                              if mass[slot] >= least}


def summed(
    keys: Int[np.ndarray, 'n'], weights: Float[np.ndarray, 'n'],
) -> tuple[Int[np.ndarray, 'm'], Float[np.ndarray, 'm']]:
    """The different keys, ascending, each with the sum of its weights."""
    different, places = np.unique(keys, return_inverse=True)
    return different, np.bincount(places, weights, minlength=len(different))


def heaviest(
    groups: Int[np.ndarray, 'n'], weights: Float[np.ndarray, 'n'], count: int,
) -> Int[np.ndarray, 'm']:
    """Where the at most `count` heaviest of each group are; groups ascend, each falls in weight."""
    order = np.lexsort((-weights, groups))
    ranks = np.arange(len(order)) - np.searchsorted(groups[order], groups[order])
    return order[ranks < count]


def _flat(array):
    return array.reshape(-1)

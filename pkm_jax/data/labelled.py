"""Examples with their targets, tokenised and in memory, in batches of texts of like length.

Such data are small beside text to pretrain on: SST-2, QQP or SQuAD are tokenised in seconds.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from pkm_jax.data.examples import ArraySpec, Example, token_arrays

SPREAD = 64         # batches of a random draw that are sorted by length together
PROGRAMS = 4        # lengths of batches: the step and the evaluation are compiled for each
ROUND = 16          # tokens: between its multiples batches are no faster


class Records(list):
    """Records in memory, as the loader reads them."""

    def __getitems__(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        return [self[number] for number in numbers]


@dataclasses.dataclass(frozen=True)
class Labelled:
    """Splits of tokenised records: dicts of 'tokens', 'segments' and a task's own arrays.

    `source` is what the records were made of, by split, for a task that reads it again when it
    scores what a model says of them.
    """
    vocab_path: str
    vocab_size: int
    splits: dict[str, Records] = dataclasses.field(repr=False)     # the loader prints what it maps
    source: dict[str, Any] = dataclasses.field(default_factory=dict, repr=False)

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of all records: the same data and vocabulary have the same one."""
        content = hashlib.sha256()
        for split, records in self.splits.items():
            content.update(split.encode())
            for record in records:
                for name, value in record.items():
                    content.update(name.encode() + np.asarray(value).tobytes())
        return content.hexdigest()[:16]

    def num_records(self, split: str) -> int:
        return len(self.splits[split])

    def records(self, split: str) -> Records:
        return self.splits[split]

    def lengths(self, split: str) -> Int[np.ndarray, 'n']:
        """Tokens of each record."""
        return np.array([len(record['tokens']) for record in self.splits[split]])


@dataclasses.dataclass(frozen=True)
class LabelledExamples:
    """Records as they are, with their number ('example') and a 1 that fillers lack ('weights')."""
    arrays: dict[str, ArraySpec]

    @property
    def identity(self) -> dict[str, Any]:
        return {}

    def __call__(self, record: dict, epoch: int, number: int) -> Example:
        found = {name: record[name] for name in self.arrays.keys() & record.keys()}
        return {**found, 'lengths': len(record['tokens']), 'example': number, 'weights': 1.}


def labelled_arrays(length: int, own: dict[str, ArraySpec], pad: int = 0) -> dict[str, ArraySpec]:
    """Tokens with their segments, the number of the example, 1 where there is one, a task's own."""
    return {**token_arrays(length, pad), 'segments': ArraySpec((length,), np.int32, by_token=True),
            'example': ArraySpec((), np.int32), 'weights': ArraySpec((), np.float32), **own}


class Places(NamedTuple):
    """The records of a batch: epochs and numbers, and the tokens that it is padded to."""
    epochs: Int[np.ndarray, 'B']
    numbers: Int[np.ndarray, 'B']
    length: int


class ByLength:
    """Which records are in which batch: all once in every epoch, those of like length together.

    Records are shuffled, sorted by length within SPREAD batches, and the batches shuffled again. A
    batch is padded to the least of `buckets` that holds it; the one that an epoch has too few
    records for is filled with `filler`. With `seed` None it is the one epoch of an evaluation, in
    the order of their lengths.
    """

    def __init__(self, lengths: Int[np.ndarray, 'n'], buckets: Sequence[int], batch: int,
                 filler: int, seed: int | None = None):
        self._lengths, self._buckets = lengths, tuple(buckets)
        self._batch, self._filler, self._seed = batch, filler, seed
        self._of_epoch = functools.lru_cache(maxsize=2)(self._batches)

    def __len__(self) -> int:
        """Batches of an epoch."""
        return -(-len(self._lengths) // self._batch)

    def __call__(self, number: int) -> Places:
        """The records of a batch, counted on over the epochs."""
        epoch, batch = divmod(number, len(self))
        numbers = self._of_epoch(epoch)[batch]
        longest = self._lengths[numbers[numbers != self._filler]].max()
        bucket = next(size for size in self._buckets if size >= longest)
        return Places(np.full_like(numbers, epoch), numbers, bucket)

    def __reduce__(self) -> tuple:
        return ByLength, (self._lengths, self._buckets, self._batch, self._filler, self._seed)

    def _batches(self, epoch: int) -> Int[np.ndarray, 'batches B']:
        size = len(self._lengths)
        rng = None if self._seed is None else np.random.default_rng((self._seed, epoch))
        order = np.arange(size) if rng is None else rng.permutation(size)
        spread = size if rng is None else SPREAD * self._batch
        parts = [order[start:start + spread] for start in range(0, size, spread)]
        order = np.concatenate([part[np.argsort(self._lengths[part], kind='stable')]
                                for part in parts])
        filled = np.full(len(self) * self._batch, self._filler)
        filled[:size] = order
        batches = filled.reshape(len(self), self._batch)
        return batches if rng is None else rng.permutation(batches)


def buckets_of(lengths: Int[np.ndarray, 'n'], longest: int) -> tuple[int, ...]:
    """The lengths, at most PROGRAMS, to which records of these lengths are padded least; ascending.

    Multiples of ROUND, or `longest`, which none exceeds.
    """
    sizes, counts = np.unique(np.minimum(-(-lengths // ROUND) * ROUND, longest),
                              return_counts=True)
    before = np.concatenate([[0], np.cumsum(counts)])
    # By how many of the sizes are covered: tokens of their records, padded, and the lengths.
    best: list[tuple[float, tuple[int, ...]]] = [(0, ()), *[(np.inf, ())] * len(sizes)]
    for _ in range(PROGRAMS):
        best = [best[0], *(
            min((best[start][0] + int(size) * (before[end] - before[start]),
                 (*best[start][1], int(size))) for start in range(end))
            for end, size in enumerate(sizes, 1))]
    return best[-1][1]

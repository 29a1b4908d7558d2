"""Prepared records to batches: shuffled each epoch, the same for any number of workers and hosts.

Records whose lengths are known come in batches of like length (labelled.py). A batch is a dict of
NumPy arrays with the examples' arrays (examples.py) one below the other. Rows without an example,
in the last batch of an evaluation, hold what fills arrays: length 0.
"""

import dataclasses
import functools
import multiprocessing
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from typing import Any, Protocol, runtime_checkable

import grain
import numpy as np
from absl import flags, logging
from jaxtyping import Int

from pkm_jax.data.examples import Examples
from pkm_jax.data.labelled import ByLength, Places
from pkm_jax.data.worker import ignore_signals
from pkm_jax.refusal import Refusal

Batch = dict[str, np.ndarray]
PATIENCE = 30.     # seconds that closing waits for a first batch that is being made
FILLER = -1   # instead of a record's number, in the last batch of an evaluation


class LoaderDied(RuntimeError):
    """A process that makes batches (`data.workers`) has ended, by its exit status or a signal."""

    def __init__(self, status: int, batch: int):
        how = f'by {signal.Signals(-status).name}' if status < 0 else f'with status {status}'
        super().__init__(f'A loader process (data.workers) ended {how} before batch {batch + 1:,}'
                         + (': often for want of memory, of which fewer data.workers take less'
                            if status == -signal.SIGKILL else ''))


@runtime_checkable
class Records(Protocol):
    """Prepared records, such as `dataset.Prepared`. Cheap to pickle."""
    fingerprint: str    # the same records have the same one

    def num_records(self, split: str) -> int:
        """How many a split has."""

    def records(self, split: str) -> Sequence:
        """Random access to those of a split, opened by the process that reads."""


@runtime_checkable
class MeasuredRecords(Records, Protocol):
    """Records of which the lengths are known before they are read."""

    def lengths(self, split: str) -> Int[np.ndarray, 'n']:
        """Tokens of each record."""


@dataclasses.dataclass(frozen=True)
class Collate:
    """Reads the records of a batch and stacks their examples; opens files where it is called."""
    records: Records
    split: str
    examples: Examples

    @functools.cached_property
    def _opened(self):
        return self.records.records(self.split)

    def __getstate__(self) -> dict:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def __call__(self, places: Places) -> Batch:
        """Makes the batch of the given epochs and record numbers."""
        epochs, numbers, length = places
        arrays = {name: array.cut(length) if length else array
                  for name, array in self.examples.arrays.items()}
        batch = {name: np.full((len(numbers), *array.shape), array.fill, array.dtype)
                 for name, array in arrays.items()}
        real = np.flatnonzero(numbers != FILLER)
        for row, record in zip(real, self._opened.__getitems__(numbers[real].tolist())):
            example = self.examples(record, int(epochs[row]), int(numbers[row]))
            for name, array in example.items():
                if np.ndim(array):
                    batch[name][row, :len(array)] = array
                else:
                    batch[name][row] = array
        return batch


class BatchStream:
    """The endless stream of this host's parts of the global batches.

    Host `process_index` of `process_count` gets its contiguous rows of every global batch of
    `batch_size`. Every epoch passes all records once, in an order drawn from `seed`; a batch may
    reach into the next epoch. Records of known lengths come in batches of like length, padded to
    one of `buckets`, and the last batch of an epoch is filled with rows without one. `workers`
    processes read and mask; 0 does so in a thread of this process. A script that asks for workers
    must guard its entry point with `if __name__ == '__main__'`. A worker that dies is named and
    replaced, once for each batch; then LoaderDied ends the stream.
    Raises Refusal where the batch does not divide over the hosts.
    """

    def __init__(self, records: Records, split: str, examples: Examples, *, batch_size: int,
                 seed: int, buckets: Sequence[int] = (), process_index: int = 0,
                 process_count: int = 1, workers: int = 0):
        rows = _rows_per_host(batch_size, process_count)
        size = records.num_records(split)
        if isinstance(records, MeasuredRecords):
            order = ByLength(records.lengths(split), buckets, batch_size, FILLER, seed)
            own = slice(process_index * rows, (process_index + 1) * rows)
            self._places = (grain.MapDataset.range(1).repeat()
                            .map_with_index(lambda number, _: _part(order(number), own)))
        else:
            self._places = (grain.MapDataset.range(size).shuffle(seed=seed).repeat()
                            .map_with_index(lambda position, record: (position // size, record))
                            .batch(rows)[process_index::process_count]
                            .map(lambda pair: Places(pair[0], pair[1], length=0)))
        self._batches = self._places.map(Collate(records, split, examples))
        self._workers = workers
        self._identity = {'fingerprint': records.fingerprint, 'split': split, 'seed': seed,
                          'batch_size': batch_size, **examples.identity}
        self._returned = 0
        self._iterator: grain.DatasetIterator | None = None
        self._first: Future[Batch] | None = None    # of `begin`

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        try:
            batch = self._taken()
        except LoaderDied as died:      # the place is known: others go on there, once
            logging.warning('%s; its work is begun again', died)
            self.close()
            batch = self._next()
        self._returned += 1
        return batch

    def begin(self) -> None:
        """Has the workers start now, not when the first batch is asked for. (Grain's
        `start_prefetch` starts none.)"""
        if self._workers and self._iterator is None and self._first is None:
            self._first = Future()
            threading.Thread(target=_fulfil, args=(self._first, self._next), daemon=True).start()

    def _taken(self):
        if self._first is None:
            return self._next()
        batch = self._first.result()
        self._first = None      # not if that was interrupted: `close` waits for the thread
        return batch

    def _next(self):
        if self._iterator is None:
            self._iterator = _iterate(self._batches[self._returned:], self._workers)
        try:
            return next(self._iterator)
        except RuntimeError as error:
            status = re.search(r'terminated unexpectedly with exit code (-?\d+)', str(error))
            if status is None:
                raise
            raise LoaderDied(int(status[1]), self._returned) from error

    def at(self, number: int) -> tuple[Batch, Int[np.ndarray, 'B'], Int[np.ndarray, 'B']]:
        """The batch after `number` others, and the epochs and records that it is made of."""
        return self._batches[number], *self._places[number][:2]

    def get_state(self) -> dict:
        """The place after the last batch returned, for JSON; any number of hosts can go on."""
        return {'batches': self._returned, **self._identity}

    def set_state(self, state: dict) -> None:
        """Goes on after the place of `state`.

        Raises Refusal where that is a place in another stream.
        """
        other = {name: value for name, value in self._identity.items() if state.get(name) != value}
        if 'fingerprint' in other:
            raise Refusal('The text or its vocabulary has changed since the run began (fingerprint '
                          f'{state.get("fingerprint")} then, {other["fingerprint"]} now): restore '
                          'it, or start another run.')
        if other:
            changes = ', '.join(f'{name} was {state.get(name)}, is {value}'
                                for name, value in other.items())
            raise Refusal(f'The saved place belongs to another stream of batches: {changes}. '
                          f'Restore the settings, or start another run.')
        self.close()
        self._returned = state['batches']

    def close(self) -> None:
        """Ends threads and worker processes; the stream can go on after it."""
        try:
            if self._first is not None:
                wait([self._first], PATIENCE)
        finally:
            self._first = None
            if self._iterator is not None:
                self._iterator.close()
                self._iterator = None


def evaluation_batches(
    records: Records, split: str, examples: Examples, *, batch_size: int, n_batches: int,
    seed: int, buckets: Sequence[int] = (), process_index: int = 0, process_count: int = 1,
) -> Iterator[Batch]:
    """Yields this host's parts of at most `n_batches` batches: always the same examples.

    All hosts get the same number of batches. Where the split ends within a batch, rows without an
    example fill it. Records of known lengths come in the order of these, all of them.
    """
    collate = Collate(records, split, examples)
    rows = _rows_per_host(batch_size, process_count)
    size = records.num_records(split)
    if isinstance(records, MeasuredRecords):
        order_by_length = ByLength(records.lengths(split), buckets, batch_size, FILLER)
        own = slice(process_index * rows, (process_index + 1) * rows)
        for number in range(len(order_by_length)):
            yield collate(_part(order_by_length(number), own))
        return
    order = grain.MapDataset.range(size).shuffle(seed=seed)
    for first in range(0, min(n_batches * batch_size, size), batch_size):
        places = range(first + process_index * rows, first + (process_index + 1) * rows)
        numbers = np.array([order[place] if place < size else FILLER for place in places])
        yield collate(Places(np.zeros_like(numbers), numbers, length=0))


def _fulfil(promise: Future, make: Callable[[], Any]) -> None:
    try:
        promise.set_result(make())
    except BaseException as error:      # raised where the result is asked for
        promise.set_exception(error)


def _part(places: Places, own: slice) -> Places:
    """The rows of a global batch that are this host's."""
    return Places(places.epochs[own], places.numbers[own], places.length)


def _rows_per_host(batch_size: int, process_count: int) -> int:
    if batch_size % process_count:
        raise Refusal(f'A batch of {batch_size} does not divide over {process_count} hosts: choose '
                      f'a multiple of {process_count}.')
    return batch_size // process_count


def _iterate(batches: grain.MapDataset, workers: int) -> grain.DatasetIterator:
    # In this process a second thread would wait for the first one's lock: masking is Python.
    threads = 2 if workers else 1
    ready = batches.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=8))
    if not workers:
        return iter(ready)
    if not flags.FLAGS.is_parsed():   # Grain reads flags, which only a program run by absl parses
        flags.FLAGS.mark_as_parsed()
    # Through pipes: batches in shared memory that nobody fetched any more would outlive the run.
    through_pipes = grain.experimental.DatasetOptions(min_shm_size=sys.maxsize)
    ready = grain.experimental.WithOptionsIterDataset(ready, through_pipes)
    processes = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
    return iter(ready.mp_prefetch(processes, _leave_signals_to_parent))


def _leave_signals_to_parent(worker: int, workers: int) -> None:
    ignore_signals()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)

"""Prepared records to batches: shuffled anew each epoch, and masked.

The batches are the same for any number of workers and hosts. A batch is a dict of NumPy arrays:
tokens, segments [B, L] int32, lengths [B] int32, mlm_positions, mlm_labels [B, P] int32 and
mlm_weights [B, P] float32, 1 where a prediction is asked for. Rows without tokens have length 0.
"""

import dataclasses
import functools
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator

import grain
import numpy as np
from absl import flags
from jaxtyping import Int

from pkm_jax.data import tokenizer
from pkm_jax.data.dataset import Prepared
from pkm_jax.data.masking import Masking, predictions_per_record

Batch = dict[str, np.ndarray]
FILLER = -1   # instead of a record's number, in the last batch of an evaluation


@dataclasses.dataclass(frozen=True)
class Collate:
    """Reads, masks and stacks the records of a batch.

    Cheap to pickle: files are opened by the process that reads.
    """
    prepared: Prepared
    split: str
    masking: Masking

    @functools.cached_property
    def _records(self):
        return self.prepared.records(self.split)

    def __getstate__(self) -> dict:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def __call__(self, places: tuple[Int[np.ndarray, 'B'], Int[np.ndarray, 'B']]) -> Batch:
        """Makes the batch of the given (epochs, record numbers)."""
        epochs, numbers = places
        rows, length, slots = len(numbers), self.prepared.length, self.masking.slots
        batch = {'tokens': np.full((rows, length), self.masking.vocabulary.ids['[PAD]'], np.int32),
                 'segments': np.zeros((rows, length), np.int32),
                 'lengths': np.zeros(rows, np.int32),
                 'mlm_positions': np.zeros((rows, slots), np.int32),
                 'mlm_labels': np.zeros((rows, slots), np.int32),
                 'mlm_weights': np.zeros((rows, slots), np.float32)}
        real = np.flatnonzero(numbers != FILLER)
        for row, record in zip(real, self._records.__getitems__(numbers[real].tolist())):
            tokens, positions, labels = self.masking(record['tokens'], int(epochs[row]),
                                                     int(numbers[row]))
            batch['tokens'][row, :len(tokens)] = tokens
            batch['lengths'][row] = len(tokens)
            batch['mlm_positions'][row, :len(positions)] = positions
            batch['mlm_labels'][row, :len(positions)] = labels
            batch['mlm_weights'][row, :len(positions)] = 1
        return batch


class BatchStream:
    """The endless stream of this host's parts of the global batches.

    Host `process_index` of `process_count` gets its contiguous rows of every global batch of
    `batch_size`. Every epoch passes all records once, in an order drawn from `seed`; a batch may
    reach into the next epoch. `workers` processes read and mask; 0 does so in threads of this
    process. A script that asks for workers must guard its entry point with `if __name__ ==
    '__main__'`.
    Raises ValueError where the batch does not divide over the hosts, and what `Masking` raises.
    """

    def __init__(self, prepared: Prepared, split: str, *, batch_size: int, seed: int,
                 mask_rate: float = 0.15, whole_word: bool = False,
                 max_predictions: int | None = None, process_index: int = 0,
                 process_count: int = 1, workers: int = 0):
        collate = _collate(prepared, split, seed, mask_rate, whole_word, max_predictions)
        rows = _rows_per_host(batch_size, process_count)
        size = prepared.num_records(split)
        self._batches = (grain.MapDataset.range(size).shuffle(seed=seed).repeat()
                         .map_with_index(lambda position, record: (position // size, record))
                         .batch(rows)[process_index::process_count]
                         .map(collate))
        self._workers = workers
        self._identity = {'fingerprint': prepared.fingerprint, 'split': split, 'seed': seed,
                          'batch_size': batch_size, 'mask_rate': mask_rate,
                          'whole_word': whole_word, 'max_predictions': collate.masking.slots}
        self._returned = 0
        self._iterator: grain.DatasetIterator | None = None

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._iterator is None:
            self._iterator = _iterate(self._batches[self._returned:], self._workers)
        batch = next(self._iterator)
        self._returned += 1
        return batch

    def get_state(self) -> dict:
        """The place after the last batch returned, for JSON; any number of hosts can go on."""
        return {'batches': self._returned, **self._identity}

    def set_state(self, state: dict) -> None:
        """Goes on after the place of `state`.

        Raises ValueError where that is a place in another stream.
        """
        other = [f'{name} was {state.get(name)}, is {value}'
                 for name, value in self._identity.items() if state.get(name) != value]
        if other:
            raise ValueError('the saved data state belongs to another stream of batches: '
                             f'{", ".join(other)}; restore the settings, or start anew')
        self.close()
        self._returned = state['batches']

    def close(self) -> None:
        """Ends threads and worker processes; the stream can go on after it."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None


def evaluation_batches(prepared: Prepared, split: str, *, batch_size: int, n_batches: int,
                       seed: int, mask_rate: float = 0.15, whole_word: bool = False,
                       max_predictions: int | None = None, process_index: int = 0,
                       process_count: int = 1) -> Iterator[Batch]:
    """Yields this host's parts of at most `n_batches` batches: always the same records, masked in
    the same way.

    All hosts get the same number of batches. Where the split ends within a batch, rows of length 0
    fill it.
    """
    collate = _collate(prepared, split, seed, mask_rate, whole_word, max_predictions)
    rows = _rows_per_host(batch_size, process_count)
    size = prepared.num_records(split)
    order = grain.MapDataset.range(size).shuffle(seed=seed)
    for first in range(0, min(n_batches * batch_size, size), batch_size):
        places = range(first + process_index * rows, first + (process_index + 1) * rows)
        numbers = np.array([order[place] if place < size else FILLER for place in places])
        yield collate((np.zeros_like(numbers), numbers))


def _collate(prepared: Prepared, split: str, seed: int, mask_rate: float, whole_word: bool,
             max_predictions: int | None) -> Collate:
    if max_predictions is None:
        max_predictions = predictions_per_record(prepared.length, mask_rate)
    vocabulary = tokenizer.load(prepared.vocab_path)
    return Collate(prepared, split, Masking(vocabulary, seed, mask_rate, whole_word,
                                            max_predictions, prepared.length))


def _rows_per_host(batch_size: int, process_count: int) -> int:
    if batch_size % process_count:
        raise ValueError(f'batch {batch_size} does not divide over {process_count} hosts: change '
                         'batch_size')
    return batch_size // process_count


def _iterate(batches: grain.MapDataset, workers: int) -> grain.DatasetIterator:
    ready = batches.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=8))
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
    """Ctrl-C and many launchers signal all processes: the parent ends its workers when it is done."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)

"""Paragraphs to records of tokens, written as a TFDS dataset of ArrayRecord files.

This needs no TensorFlow. Files are those of TFDS's sequential writer, written here: processes that
cut text serialise records too (workers.py). Both splits are streamed in one pass, where the
shuffler of a `GeneratorBasedBuilder` holds the records in memory and beyond 1 GB asks for
TensorFlow. Records are shuffled when they are read.
"""

import contextlib
import dataclasses
import hashlib
import os
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from jaxtyping import Int32

from pkm_jax.data.vocabulary import Vocabulary
from pkm_jax.data.workers import Workers
from pkm_jax.refusal import Refusal

_Item = TypeVar('_Item')
NAME = 'packed_text'            # of the dataset

SPLITS = ('train', 'validation')
CHARACTERS_AT_ONCE = 2_000_000  # of a batch that a process cuts
RECORDS_PER_FILE = 1_000_000    # about 400 MB at 128 tokens
UNKNOWN_WORDS = 10              # that are named
_FEATURES = tfds.features.FeaturesDict(
    {'tokens': tfds.features.Tensor(shape=(None,), dtype=np.int32)})


class Packer:
    """Joins paragraphs into records [CLS] … [SEP] of exactly `length` tokens.

    [SEP] stands between paragraphs too. Paragraphs run on into the next record; no token is lost.
    """

    def __init__(self, length: int, cls: int, sep: int):
        self._room, self._cls, self._sep = length - 2, cls, sep
        self._waiting = np.zeros(0, np.int32)

    def add(self, tokens: Int32[np.ndarray, 'tokens'], sizes: Int32[np.ndarray, 'paragraphs'],
            ) -> Int32[np.ndarray, 'n length']:
        """Takes the tokens of paragraphs of these sizes, one after another; returns the records
        that became full."""
        between, start, waiting = [], 0, len(self._waiting)
        for size in sizes.tolist():
            if waiting and size:
                between.append(start)
                waiting += 1
            start, waiting = start + size, (waiting + size) % self._room
        self._waiting = np.concatenate([self._waiting, np.insert(tokens, between, self._sep)])
        full = len(self._waiting) // self._room * self._room
        records = self._records(self._waiting[:full].reshape(-1, self._room))
        self._waiting = self._waiting[full:]
        return records

    def rest(self) -> Int32[np.ndarray, 'n shorter']:
        """Returns what is left as a last, shorter record, if anything is."""
        left = self._waiting
        self._waiting = left[:0]
        return self._records(left[None, :] if len(left) else left.reshape(0, self._room))

    def _records(self, bodies):
        ends = [np.full((len(bodies), 1), end, np.int32) for end in (self._cls, self._sep)]
        return np.concatenate([ends[0], bodies, ends[1]], axis=1)


@dataclasses.dataclass
class Unknown:
    """How many of a text's tokens are [UNK], and the commonest words behind it."""
    paragraphs: int = 0
    tokens: int = 0
    unknown: int = 0
    words: Counter = dataclasses.field(default_factory=Counter)     # of some paragraphs

    @property
    def share(self) -> float:
        """Of all tokens but [CLS] and [SEP]."""
        return self.unknown / max(self.tokens, 1)

    def commonest(self) -> list[str]:
        """The commonest words that are not in the vocabulary, as far as looked at."""
        return [word for word, _ in self.words.most_common(UNKNOWN_WORDS)]


def write_records(folder: Path, paragraphs: Iterable[tuple[str, str]], vocabulary: Vocabulary,
                  length: int, facts: dict, workers: int = 0) -> None:
    """Writes (split, paragraph) pairs as records of `length` tokens, and `facts` as metadata.

    Added to the facts: fingerprint, a hash of all records and the vocabulary; of each split num_…
    records and …_tokens; unknown_share and unknown_words. What is written does not depend on the
    number of `workers`, processes that cut text beside this one.
    Raises:
      Refusal: a split has no token that can be predicted, or no text.
    """
    numbers, tokens, ordinary = (dict.fromkeys(SPLITS, 0) for _ in range(3))
    content = hashlib.sha256('\n'.join(vocabulary.tokens).encode())
    unknown, files = Unknown(), {split: _Files(folder, split) for split in SPLITS}
    with contextlib.closing(Workers(vocabulary.description, workers)) as crew:
        def serialised():
            for split, records in packed(paragraphs, vocabulary, length, unknown, crew):
                numbers[split] += len(records)
                tokens[split] += records.size
                ordinary[split] += int((~vocabulary.special[records]).sum())
                content.update(_signed(split, records))
                yield split, crew.submit('serialised', records)

        for split, records in _ahead(serialised(), crew.number):
            files[split].write(records.result())
    for split in SPLITS:
        if not ordinary[split]:
            raise Refusal(_why_empty(split, numbers[split], unknown))
        facts |= {f'num_{split}': numbers[split], f'{split}_tokens': tokens[split]}
    facts |= {'fingerprint': content.hexdigest()[:16], 'unknown_share': unknown.share,
              'unknown_words': unknown.commonest()}
    _write_description(folder, facts, [files[split].close() for split in SPLITS])


def _signed(split: str, records: Int32[np.ndarray, 'n length']) -> bytes:
    """What of records is hashed: of each its split, then its tokens."""
    name = np.frombuffer(split.encode(), np.uint8)
    bodies = np.ascontiguousarray(records).view(np.uint8)
    return np.concatenate([np.tile(name, (len(records), 1)), bodies], axis=1).tobytes()


class _Files:
    """The files of a split, as TFDS' sequential writer names them."""

    def __init__(self, folder: Path, split: str):
        self._split, self._lengths, self._bytes = split, [], 0
        self._writer: ArrayRecordWriter = None
        self._template = tfds.core.ShardedFileTemplate(
            data_dir=folder, dataset_name=NAME, split=split, filetype_suffix='array_record',
            template='{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_INDEX}')

    def write(self, records: list[bytes]) -> None:
        for record in records:
            if self._writer is None or self._lengths[-1] == RECORDS_PER_FILE:
                self._begin()
            self._writer.write(record)
            self._lengths[-1] += 1
            self._bytes += len(record)

    def _begin(self):
        self._end()
        path = self._template.sharded_filepath(shard_index=len(self._lengths), num_shards=None)
        # Each record would be compressed alone: a tenth is saved at best, in six times the time.
        self._writer = ArrayRecordWriter(os.fspath(path), 'group_size:1,uncompressed')
        self._lengths.append(0)

    def _end(self):
        if self._writer:
            self._writer.close()

    def close(self) -> tfds.core.SplitInfo:
        """What TFDS wants to know of the split."""
        self._end()
        return tfds.core.SplitInfo(name=self._split, shard_lengths=self._lengths,
                                   num_bytes=self._bytes, filename_template=self._template)


def _write_description(folder: Path, facts: dict, splits: list[tfds.core.SplitInfo]) -> None:
    """Writes what makes a TFDS dataset of files."""
    identity = tfds.core.DatasetIdentity(name=NAME, version=tfds.core.Version('1.0.0'),
                                         data_dir=os.fspath(folder), module_name=__name__)
    info = tfds.core.DatasetInfo(builder=identity, features=_FEATURES,
                                 metadata=tfds.core.MetadataDict(facts))
    info.set_file_format('array_record')
    info.set_splits(tfds.core.SplitDict(splits))
    info.write_to_directory(folder)


def _why_empty(split: str, records: int, unknown: Unknown) -> str:
    if records:
        return (f'no token of the {split} text can be predicted: {unknown.share:.0%} of all are '
                f'[UNK], unknown words such as {unknown.commonest()}. The vocabulary is of another '
                'language or script: name another, or train one on this text (data.vocab empty)')
    if unknown.paragraphs == 1:
        return ('the text has one paragraph (a repeated one counts once), and cannot be split into '
                'one to train on and one to validate on: give more text, one paragraph a line')
    return (f'the {split} text becomes no tokens at all: the tokenizer drops all of its '
            'characters. Give more text, or another tokenizer')


def packed(paragraphs: Iterable[tuple[str, str]], vocabulary: Vocabulary, length: int,
           unknown: Unknown, crew: Workers) -> Iterator[tuple[str, Int32[np.ndarray, 'n _']]]:
    """Yields (split, records) for (split, paragraph), and counts the unknown words."""
    packers = {split: Packer(length, vocabulary.cls_id, vocabulary.sep_id) for split in SPLITS}

    def cut():
        for batch in _batches(paragraphs):
            texts = [paragraph for _, paragraph in batch]
            yield [split for split, _ in batch], crew.submit('cut', texts, vocabulary.unk_id)

    for of, encoded in _ahead(cut(), crew.number):
        tokens, sizes, unknown_tokens, words = encoded.result()
        unknown.paragraphs += len(sizes)
        unknown.tokens += len(tokens)
        unknown.unknown += unknown_tokens
        unknown.words.update(words)
        for split, packer in packers.items():
            here = np.array([name == split for name in of])
            yield split, packer.add(tokens[np.repeat(here, sizes)], sizes[here])
    for split, packer in packers.items():
        yield split, packer.rest()


def _ahead(items: Iterator[_Item], workers: int) -> Iterator[_Item]:
    """The items, of which two for each worker are taken before the first is needed."""
    waiting: deque[_Item] = deque()
    for item in items:
        waiting.append(item)
        if len(waiting) > 2 * workers:
            yield waiting.popleft()
    yield from waiting


def _batches(paragraphs: Iterable[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    """Yields pairs (split, paragraph) in groups of about CHARACTERS_AT_ONCE characters."""
    group, size = [], 0
    for pair in paragraphs:
        group.append(pair)
        size += len(pair[1])
        if size >= CHARACTERS_AT_ONCE:
            yield group
            group, size = [], 0
    if group:
        yield group

"""Paragraphs to records of tokens, written as a TFDS dataset of ArrayRecord files.

This needs no TensorFlow. The dataset is written with TFDS's sequential writer rather than by a
`GeneratorBasedBuilder`: it streams both splits in one pass, where the builder's shuffler holds the
records in memory and beyond 1 GB asks for TensorFlow. Records are shuffled when they are read.
"""

import dataclasses
import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Int32

from pkm_jax.data.vocabulary import Vocabulary
from pkm_jax.refusal import Refusal

SPLITS = ('train', 'validation')
CHARACTERS_AT_ONCE = 2_000_000  # tokenised in parallel by the tokenizers library
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
        self._waiting: list[int] = []

    def add(self, paragraph: list[int]) -> list[Int32[np.ndarray, 'length']]:
        """Takes a paragraph's tokens; returns the records that became full."""
        if self._waiting and paragraph:
            self._waiting.append(self._sep)
        self._waiting += paragraph
        full = len(self._waiting) // self._room * self._room
        records = [self._record(self._waiting[start:start + self._room])
                   for start in range(0, full, self._room)]
        self._waiting = self._waiting[full:]
        return records

    def rest(self) -> list[Int32[np.ndarray, 'length']]:
        """Returns what is left as a last, shorter record, if anything is."""
        body, self._waiting = self._waiting, []
        return [self._record(body)] if body else []

    def _record(self, body: list[int]) -> Int32[np.ndarray, 'length']:
        return np.array([self._cls, *body, self._sep], np.int32)


@dataclasses.dataclass
class Unknown:
    """How many of a text's tokens are [UNK], and the commonest words behind it."""
    vocabulary: Vocabulary
    paragraphs: int = 0
    tokens: int = 0
    unknown: int = 0
    words: Counter = dataclasses.field(default_factory=Counter)

    def count(self, paragraphs: list[str], encoded: list[list[int]]) -> None:
        """Adds paragraphs and their tokens; words are looked at in one paragraph at a time."""
        self.paragraphs += len(paragraphs)
        self.tokens += sum(map(len, encoded))
        unk = self.vocabulary.unk_id
        if unk is None:
            return
        numbers = [ids.count(unk) for ids in encoded]
        self.unknown += sum(numbers)
        if most := max(numbers, default=0):
            paragraph = paragraphs[numbers.index(most)]
            encoding = self.vocabulary.tokenizer().encode(paragraph, add_special_tokens=False)
            self.words.update(paragraph[first:last] for token, (first, last)
                              in zip(encoding.ids, encoding.offsets) if token == unk)

    @property
    def share(self) -> float:
        """Of all tokens but [CLS] and [SEP]."""
        return self.unknown / max(self.tokens, 1)

    def commonest(self) -> list[str]:
        """The commonest words that are not in the vocabulary, as far as looked at."""
        return [word for word, _ in self.words.most_common(UNKNOWN_WORDS)]


def write_records(folder: Path, paragraphs: Iterable[tuple[str, str]], vocabulary: Vocabulary,
                  length: int, facts: dict) -> None:
    """Writes (split, paragraph) pairs as records of `length` tokens, and `facts` as metadata.

    Added to the facts: fingerprint, a hash of all records and the vocabulary; of each split num_…
    records and …_tokens; unknown_share and unknown_words.
    Raises:
      Refusal: a split has no token that can be predicted, or no text.
    """
    metadata = tfds.core.MetadataDict(facts)
    identity = tfds.core.DatasetIdentity(name='packed_text', version=tfds.core.Version('1.0.0'),
                                         data_dir=os.fspath(folder), module_name=__name__)
    writer = tfds.core.SequentialWriter(
        tfds.core.DatasetInfo(builder=identity, features=_FEATURES, metadata=metadata),
        max_examples_per_shard=RECORDS_PER_FILE, file_format='array_record')
    writer.initialize_splits(list(SPLITS))
    numbers, tokens, ordinary = (dict.fromkeys(SPLITS, 0) for _ in range(3))
    content = hashlib.sha256('\n'.join(vocabulary.tokens).encode())
    unknown = Unknown(vocabulary)
    for split, records in packed(paragraphs, vocabulary, length, unknown):
        writer.add_examples({split: [{'tokens': record} for record in records]})
        numbers[split] += len(records)
        tokens[split] += sum(map(len, records))
        ordinary[split] += sum(int((~vocabulary.special[record]).sum()) for record in records)
        for record in records:
            content.update(split.encode() + record.tobytes())
    for split in SPLITS:
        if not ordinary[split]:
            raise Refusal(_why_empty(split, numbers[split], unknown))
        metadata[f'num_{split}'] = numbers[split]
        metadata[f'{split}_tokens'] = tokens[split]
    metadata['fingerprint'] = content.hexdigest()[:16]
    metadata['unknown_share'] = unknown.share
    metadata['unknown_words'] = unknown.commonest()
    writer.close_all()


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
           unknown: Unknown) -> Iterator[tuple[str, list[Int32[np.ndarray, '_']]]]:
    """Yields (split, records) for (split, paragraph), and counts the unknown words."""
    encode = vocabulary.tokenizer().encode_batch_fast
    packers = {split: Packer(length, vocabulary.cls_id, vocabulary.sep_id) for split in SPLITS}
    for batch in _batches(paragraphs):
        full: dict[str, list] = {split: [] for split in SPLITS}
        texts = [paragraph for _, paragraph in batch]
        encoded = [encoding.ids for encoding in encode(texts, add_special_tokens=False)]
        unknown.count(texts, encoded)
        for (split, _), ids in zip(batch, encoded):
            full[split] += packers[split].add(ids)
        yield from full.items()
    for split, packer in packers.items():
        yield split, packer.rest()


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

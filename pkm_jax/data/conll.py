"""Words with a label each, in the columns of CoNLL's shared tasks: a word a line."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from pkm_jax.data.files import expand, read_text
from pkm_jax.refusal import Refusal

_DOCUMENT = '-DOCSTART-'


class Sentence(NamedTuple):
    """Words, their labels, and the line of the first word."""
    words: list[str]
    labels: list[str]
    path: str
    line: int

    def place(self, number: int) -> str:
        """Where a word is."""
        return f'{self.path}, line {self.line + number}'


def read_conll(path: str, word: int, label: int) -> list[Sentence]:
    """The sentences of a file: columns parted by tabs, else by spaces; an empty line ends each.

    word, label: columns, counted from 0, or from the last one with -1. Lines with -DOCSTART- part
    documents and are left out.

    Raises:
      Refusal: it cannot be read, holds no words, or a line has other columns than the first.
    """
    file = Path(expand(path))
    sentences = list(_sentences(file, word, label))
    if not sentences:
        raise Refusal(f'{file} holds no words: each line has a word and its label.')
    return sentences


def _sentences(file: Path, word: int, label: int) -> Iterator[Sentence]:
    columns = first = 0
    rows: list[list[str]] = []

    def sentence():
        return Sentence([row[word] for row in rows], [row[label] for row in rows], str(file), first)

    for number, line in enumerate([*read_text(file).split('\n'), ''], 1):
        values = [value for value in re.split(r'\t' if '\t' in line else ' +', line.strip(' \r'))
                  if value.strip()]
        if not values or values[0] == _DOCUMENT:
            if rows:
                yield sentence()
            rows = []
            continue
        columns = columns or _columns(values, word, label, f'{file}, line {number}')
        if len(values) != columns:
            raise Refusal(f'{file}, line {number} has {len(values)} columns, where the first line '
                          f'has {columns}: {line[:80]!r}.')
        first = first if rows else number
        rows.append(values)


def _columns(values: list[str], word: int, label: int, place: str) -> int:
    """The number of columns, checked to have those of the word and the label."""
    for field, column in (('data.word_column', word), ('data.label_column', label)):
        if not -len(values) <= column < len(values):
            raise Refusal(f'{place} has {len(values)} columns, and {field} = {column} is none of '
                          f'them, counted from 0 or back from -1.')
    if word % len(values) == label % len(values):
        raise Refusal(f'{place} has {len(values)} columns, of which data.word_column = {word} and '
                      f'data.label_column = {label} are the same: the label is missing.')
    return len(values)

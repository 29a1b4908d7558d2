"""Texts given on a command line, in a file or on standard input."""

import argparse
import gzip
import json
import lzma
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from pkm_jax.data import encodings
from pkm_jax.data.files import expand, refuse_pointer
from pkm_jax.data.tables import read_table
from pkm_jax.refusal import Refusal

_OPENERS: dict[str, Callable] = {'.gz': gzip.open, '.xz': lzma.open}
TABLES = ('.tsv', '.csv', '.parquet')       # have columns, and are read whole


class Text(NamedTuple):
    """A text, or those of a pair, and where it is from, for messages."""
    parts: tuple[str, ...]
    where: str

    @property
    def content(self) -> str:
        """The only or the first text."""
        return self.parts[0]


class Fields(NamedTuple):
    """What the parts of a text are called in files with names, and how many are needed."""
    names: tuple[str, ...] = ('text',)
    least: int = 1


def add_arguments(parser: argparse.ArgumentParser, folder: str) -> None:
    """What programs that read a model and texts have in common; `folder` says what theirs is."""
    add = parser.add_argument
    add('folder', metavar='FOLDER', help=folder)
    add('texts', metavar='TEXT', nargs='*', help='texts; else --file or standard input')
    add('--file', default='', help='a text in each line; plain, .gz or .xz')
    add('--batch', type=int, default=32, help='texts computed at a time (32)')


def given(texts: Sequence[str], file: str, fields: Fields) -> Iterator[Text]:
    """The texts of a command line, else of a file (plain, .gz, .xz), else of standard input.

    On a command line the texts are the parts of one where two are needed. A line has a text, the
    parts of a pair with a tab between; of a .jsonl file an object with the fields, of a .tsv, .csv
    or .parquet file a row with such columns. Lines without a word are left out. Lines are read when
    they are asked for.

    Raises:
      Refusal: both texts and a file; parts are missing; the file cannot be read, is damaged or not
        UTF-8.
    """
    if texts and file:
        raise Refusal(f'--file={file} and texts beside it: give one of them.')
    if texts and fields.least > 1:
        return iter([_checked(tuple(texts), 'the command line', fields)])
    if texts:
        return (Text((text,), f'text {number}') for number, text in enumerate(texts, 1))
    if not file:
        return _lines(sys.stdin.buffer, 'standard input', fields)
    path = Path(expand(file))
    if path.suffix.lower() in TABLES:
        return (_checked(tuple(str(row.values[name]) for name in fields.names
                               if name in row.values), row.place, fields)
                for row in read_table(file, fields.names[:fields.least]))
    return _lines_of(path, fields)


def _lines_of(path: Path, fields: Fields) -> Iterator[Text]:
    if path.is_dir():
        raise Refusal(f'--file={path} is a folder: name a file with a text in each line.')
    refuse_pointer(path)
    try:
        with _OPENERS.get(path.suffix.lower(), open)(path, 'rb') as lines:
            yield from _lines(lines, str(path), fields)
    except (EOFError, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise Refusal(f'{path} is damaged ({error}): fetch it again.') from error


def _lines(lines: Iterable[bytes], name: str, fields: Fields) -> Iterator[Text]:
    objects = '.jsonl' in Path(name).suffixes
    for number, line in enumerate(lines, 1):
        where = f'{name}, line {number}'
        try:
            content = line.decode('utf-8-sig' if number == 1 else 'utf-8').strip()
        except UnicodeDecodeError as error:
            raise Refusal(f'{where} is not UTF-8{encodings.guess_in_words(line)}: save it as '
                          f'UTF-8.') from error
        if not content:
            continue
        if objects:
            yield _checked(_values(content, where, fields), where, fields)
        else:
            parts = content.split('\t') if len(fields.names) > 1 else [content]
            yield _checked(tuple(parts), where, fields)


def _values(line: str, where: str, fields: Fields) -> tuple[str, ...]:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise Refusal(f'{where} is no JSON ({error}): a .jsonl file has one object a '
                      f'line.') from error
    if not isinstance(found, dict):
        raise Refusal(f'{where} is no JSON object but a {type(found).__name__}.')
    return tuple(str(found[name]) for name in fields.names if found.get(name) is not None)


def _checked(parts: tuple[str, ...], where: str, fields: Fields) -> Text:
    if not fields.least <= len(parts) <= len(fields.names):
        raise Refusal(f'{where} has {len(parts)} of the texts {", ".join(fields.names)}, and '
                      f'{fields.least} are needed: give them as separate arguments, with a tab '
                      f'between in a line, or by name in a .jsonl, .tsv, .csv or .parquet file.')
    return Text(parts, where)

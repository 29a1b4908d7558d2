"""Rows of other people's tables, each with the line that a person finds it at."""

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pkm_jax.data.files import expand, parse_json, read_text, refuse_pointer
from pkm_jax.refusal import Refusal

LONGEST_FIELD = 2**31 - 1       # characters, instead of the 131,072 of the csv module


class Row(NamedTuple):
    """The values of a row by column, and where it is: 'reviews.tsv, line 7'."""
    values: dict[str, Any]
    place: str


def read_table(path: str, columns: Sequence[str], optional: Sequence[str] = ()) -> list[Row]:
    """The rows of a .tsv, .csv, .jsonl or .parquet file, each of which has all of `columns`.

    A .tsv has no quotes: a tab ends a value wherever it stands. In a .csv, values in double quotes
    may hold commas, line ends and doubled quotes. Both begin with a line of column names.

    Raises:
      Refusal: it cannot be read, has no rows, or a row lacks a value; file and line are named.
    """
    file = Path(expand(path))
    readers = {'.tsv': _tsv, '.csv': _csv, '.jsonl': _jsonl, '.parquet': _parquet}
    if file.suffix.lower() not in readers:
        raise Refusal(f'{file}: its name must end in one of {", ".join(readers)}, which says how '
                      'it is read.')
    rows = list(readers[file.suffix.lower()](file))
    if not rows:
        raise Refusal(f'{file} holds no rows: every example needs one.')
    wanted = (*columns, *(name for name in optional if name in rows[0].values))
    for row in rows:
        missing = [name for name in wanted if row.values.get(name) is None]
        if missing and missing[0] in row.values:
            raise Refusal(f'{row.place}: the value of {missing[0]!r} is null: every example needs '
                          'one.')
        if missing:
            raise Refusal(f'{row.place} has no column {missing[0]!r}, only '
                          f'{", ".join(map(repr, row.values))}: name the column by its field of '
                          'the section data.')
    return rows


def read_tsv(
    path: str, header: Sequence[str] | None = None, skipped: list[str] | None = None,
) -> Iterator[Row]:
    """The rows of a file of tabs without quotes; its first line names the columns, or `header`.

    A row with another number of tabs is refused, or its place is added to `skipped`.

    Raises:
      Refusal: it cannot be read, is empty, or has such a row.
    """
    lines = read_text(Path(expand(path))).split('\n')
    if not any(lines):
        raise Refusal(f'{path} is empty: its first line names the columns.')
    names = list(header) if header else lines[0].split('\t')
    for number, line in enumerate(lines[0 if header else 1:], 1 if header else 2):
        if not line and number == len(lines):
            continue
        values, place = line.split('\t'), f'{path}, line {number}'
        if len(values) == len(names):
            yield Row(dict(zip(names, values)), place)
        elif skipped is not None:
            skipped.append(place)
        else:
            raise Refusal(f'{place} has {len(values) - 1} tabs, where {len(names) - 1} part its '
                          f'{len(names)} columns ({", ".join(names)}): {line[:80]!r}. Mend the '
                          'line, or write texts with tabs as .csv or .jsonl.')


def _tsv(file: Path) -> Iterator[Row]:
    return read_tsv(str(file))


def _csv(file: Path) -> Iterator[Row]:
    csv.field_size_limit(LONGEST_FIELD)
    reader = csv.reader(io.StringIO(read_text(file), newline=''), strict=True)
    names: list[str] = []
    before = 0      # lines of the rows so far: a row can have several
    try:
        for values in reader:
            place, before = f'{file}, line {before + 1}', reader.line_num
            if not values:
                continue
            if not names:
                names = values
            elif len(values) != len(names):
                raise Refusal(f'{place} has {len(values)} values, where the first line names '
                              f'{len(names)} columns ({", ".join(names)}): values with commas or '
                              'line ends stand in double quotes.')
            else:
                yield Row(dict(zip(names, values)), place)
    except csv.Error as error:
        raise Refusal(f'{file}, line {before + 1} is no CSV ({error}): a double quote within a '
                      'quoted value is written twice.') from error


def _jsonl(file: Path) -> Iterator[Row]:
    for number, line in enumerate(read_text(file).split('\n'), 1):
        if not line.strip():
            continue
        place = f'{file}, line {number}'
        try:
            found = parse_json(line)
        except (ValueError, RecursionError) as error:
            raise Refusal(f'{place} is no JSON ({error}): a .jsonl file has one object a '
                          'line.') from error
        if not isinstance(found, dict):
            raise Refusal(f'{place} is no JSON object but a {type(found).__name__}: a .jsonl file '
                          'has one object a line.')
        yield Row(found, place)


def _parquet(file: Path) -> Iterator[Row]:
    import pyarrow  # not needed where files are text
    import pyarrow.parquet
    refuse_pointer(file)
    try:
        rows = pyarrow.parquet.read_table(file).to_pylist()
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise Refusal(f'{file} is no Parquet file that can be read ({str(error)[:200]}): write it '
                      'again.') from error
    for number, values in enumerate(rows, 1):
        yield Row(values, f'{file}, row {number}')

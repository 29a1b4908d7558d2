"""Text files to lines: which files are meant, and what is in them, whatever is in them."""

import glob
import gzip
import io
import itertools
import json
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pkm_jax.data import encodings
from pkm_jax.data.corpus import LONGEST_LINE, Corpus, Counts, bounded_lines, safe_name
from pkm_jax.data.files import ContentHashes, expand, refuse_broken_link, refuse_pointer
from pkm_jax.data.long_json import text_of_long_object
from pkm_jax.data.xz import open_xz
from pkm_jax.refusal import Refusal

LONGEST_OBJECT = 2**20       # characters of a JSON line that is parsed as a whole
MOST_UNDECODABLE = 0.001     # of a file's characters, beyond the first UNDECODABLE_ALLOWED
UNDECODABLE_ALLOWED = 10
_ENOUGH = 2**20              # characters after which a file is judged before its end
_OPENERS: dict[str, Callable] = {'.gz': gzip.open, '.xz': open_xz}
_KINDS = 'name .txt or .jsonl files, plain, .gz or .xz'
_SURROGATES = re.compile('[\ud800-\udfff]')


def text_files(patterns: str | list[str], hashes: ContentHashes,
               encoding: str = 'utf-8') -> Corpus:
    """The corpus of all .txt and .jsonl files, plain, .gz or .xz, that are named or match.

    patterns: paths and globs; a str holds several with ',' between. `~` is expanded; what exists
        under a name with brackets or commas is that file.
    encoding: of files that do not begin with a byte order mark.
    Raises:
      Refusal: naming a pattern that matches nothing, a broken link, a folder, a file of another
        kind, one that cannot be read or is a git-lfs pointer, or the encoding.
    """
    encodings.check_encoding(encoding)
    patterns = _split(patterns) if isinstance(patterns, str) else list(patterns)
    matches = {pattern: _matches(pattern) for pattern in patterns}
    missing = [pattern for pattern, found in matches.items() if not found]
    if missing or not patterns:
        named = ', '.join(map(repr, missing)) or 'an empty list'
        raise Refusal(f'no text file matches {named} (looked in {os.getcwd()}): {_KINDS}, a '
                      'prepared directory, or "state-of-the-union"')
    files = sorted({Path(path) for found in matches.values() for path in found})
    for path in files:
        if _kind(path) not in ('.txt', '.jsonl'):
            raise Refusal(f'{path}: only .txt and .jsonl files, plain, .gz or .xz, can be read as '
                          'text')
        refuse_pointer(path)
    content = [[_kind(path), path.suffix.lower(), hashes.of(path)] for path in files]
    size = sum(path.stat().st_size for path in files)
    names = ', '.join(path.name for path in files[:3]) + (', …' if len(files) > 3 else '')
    return Corpus(
        name=safe_name(_bare_name(files[0]) if len(files) == 1 else f'{len(files)}-files'),
        described=f'{names} ({len(files):,} files, {size / 1e6:,.1f} MB)',
        identity=json.dumps([content, encoding]), size=size,
        lines=lambda counts: (line for path in files for line in _read(path, encoding, counts)))


def _split(corpus: str) -> list[str]:
    """The paths and globs in a str with ',' between them; a comma within a name is left there."""
    parts = corpus.split(',')
    patterns, start = [], 0
    while start < len(parts):
        joined = {end: _stripped(','.join(parts[start:end]))
                  for end in range(len(parts), start, -1)}
        start = next(end for end, name in joined.items() if end == start + 1 or _found(name))
        if joined[start]:
            patterns.append(joined[start])
    return patterns


def _stripped(name: str) -> str:
    """A name without the spaces around it, unless a file has them."""
    return name if os.path.lexists(expand(name)) else name.strip()


def _matches(pattern: str) -> list[str]:
    """The files that a path or glob means."""
    path = expand(pattern)
    if os.path.isdir(path):
        raise Refusal(f'{pattern} is a folder: name the files in it, such as '
                      f'{os.path.join(pattern, "*.txt")!r}')
    found = _found(pattern)
    for file in found:
        refuse_broken_link(file)
    if os.path.exists(path) and not os.path.isfile(path):
        raise Refusal(f'{pattern} is a pipe or a device, which cannot be read twice, as text is: '
                      'write it to a file first')
    return [file for file in found if os.path.isfile(file)]


def _found(pattern: str) -> list[str]:
    """What has exactly this name, else what matches it, else what does with its brackets plain."""
    path = expand(pattern)
    if os.path.lexists(path):
        return [path]
    return (glob.glob(path, recursive=True)
            or glob.glob(path.replace('[', '[[]'), recursive=True))


def _read(path: Path, encoding: str, counts: Counts) -> Iterator[str]:
    """Yields the lines of a .txt file or those of the texts in a .jsonl file."""
    before = counts.bytes_read
    try:
        with path.open('rb') as raw, _opened(raw, path) as data:
            encoding = encodings.from_mark(data.peek(4)) or encoding
            _refuse_utf8(path, encoding)
            text = _CheckedText(data, encoding, path, counts)
            pieces = (iter(lambda: text.read(LONGEST_LINE), '') if _kind(path) == '.txt'
                      else _json_texts(text.readline, path, counts))
            for line in bounded_lines(pieces, counts):
                counts.bytes_read = before + raw.tell()
                yield line
            text.judge()
    except (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile) as error:
        raise Refusal(f'{path} is damaged ({error}): fetch it again, or leave it out') from error
    except OSError as error:
        raise Refusal(f'{path} cannot be read: {error.strerror or error}') from error
    except UnicodeError as error:
        raise Refusal(f'{path} is not {encoding} ({error}): set data.encoding to what it is '
                      'written in') from error


def _refuse_utf8(path: Path, encoding: str) -> None:
    """Refuses a file that is UTF-8 though `encoding` says another, which may read anything."""
    if encodings.is_utf8(encoding):
        return
    with path.open('rb') as raw, _opened(raw, path) as data:
        if encodings.holds_utf8(data.read(_ENOUGH)):
            raise Refusal(f'{path} is UTF-8, not {encoding}: leave data.encoding at utf-8, and '
                          'convert what is in another encoding to it')


def _opened(
    raw: io.BufferedReader, path: Path,
) -> io.BufferedReader | gzip.GzipFile:
    opener = _OPENERS.get(path.suffix.lower())
    return opener(raw) if opener else raw


class _CheckedText:
    """The characters of a file; those that cannot be decoded, and zeros, are replaced and counted.

    Raises Refusal where they are more than a small share: that is another encoding.
    """

    def __init__(self, data: Any, encoding: str, path: Path, counts: Counts):
        self._stream = io.TextIOWrapper(data, encoding, errors=encodings.MARK_UNDECODABLE)
        self._encoding, self._path, self._counts = encoding, path, counts
        self._characters = self._undecodable = 0

    def read(self, size: int) -> str:
        return self._checked(self._stream.read(size))

    def readline(self, size: int) -> str:
        return self._checked(self._stream.readline(size))

    def _checked(self, piece: str) -> str:
        self._characters += len(piece)
        bad = sum(map(piece.count, encodings.SIGNS_OF_ANOTHER))
        if bad:
            for sign in encodings.SIGNS_OF_ANOTHER:
                piece = piece.replace(sign, '\N{REPLACEMENT CHARACTER}')
            self._undecodable += bad
            self._counts.replaced_characters += bad
            if self._characters > _ENOUGH:
                self.judge()
        return piece

    def judge(self) -> None:
        """Refuses the file where too much of what was read so far could not be decoded."""
        allowed = max(UNDECODABLE_ALLOWED, MOST_UNDECODABLE * self._characters)
        if self._undecodable > allowed:
            likely = _guess(self._path, self._encoding)
            remedy = (f'likely it is {likely}: set data.encoding={likely!r}, or convert it to UTF-8'
                      if likely else 'set data.encoding to what it is written in, if it is a '
                      'text in one encoding')
            raise Refusal(f'{self._path} is not {self._encoding}: {self._undecodable:,} of the '
                          f'{self._characters:,} characters read cannot be decoded; {remedy}')


def _guess(path: Path, encoding: str) -> str | None:
    """The likely encoding of a file, from its first part that is not in `encoding`."""
    with path.open('rb') as raw, _opened(raw, path) as data:
        for sample in iter(lambda: data.read(encodings.SAMPLE), b''):
            marked = sample.decode(encoding, errors=encodings.MARK_UNDECODABLE)
            if sum(map(marked.count, encodings.SIGNS_OF_ANOTHER)) > 1:      # one: a cut character
                return encodings.guess(sample)
    return None


def _json_texts(readline: Callable[[int], str], path: Path, counts: Counts) -> Iterator[str]:
    """Yields every object's field "text", each ended by a line end; counts lines that have none."""
    for number in itertools.count(1):
        line = readline(LONGEST_OBJECT)
        if not line:
            return
        whole = line.endswith('\n') or len(line) < LONGEST_OBJECT
        more = iter(()) if whole else _until_line_end(readline)
        try:
            if not line.strip():
                counts.empty_lines += 1
            elif whole:
                yield _joined_halves(json.loads(line)['text']) + '\n'
            else:
                for part in text_of_long_object(itertools.chain([line], more)):
                    yield _joined_halves(part)
                yield '\n'
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            counts.malformed(f'{path}, line {number} ({type(error).__name__}: {str(error)[:100]})')
            for _ in more:      # the rest of a long line
                pass


def _until_line_end(readline: Callable[[int], str]) -> Iterator[str]:
    while piece := readline(LONGEST_OBJECT):
        yield piece
        if piece.endswith('\n'):
            return


def _joined_halves(text: str) -> str:
    """JSON may write a character beyond U+FFFF as two halves; half a one is replaced."""
    if not isinstance(text, str):
        raise TypeError(f'its "text" is a {type(text).__name__}')
    if not _SURROGATES.search(text):
        return text
    return text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')


def _kind(path: Path) -> str:
    """The ending that tells how a file is read, without that of its compression: '.txt'."""
    return Path(path.stem if path.suffix.lower() in _OPENERS else path).suffix.lower()


def _bare_name(path: Path) -> str:
    name = path.stem if path.suffix.lower() in _OPENERS else path.name
    return Path(name).stem

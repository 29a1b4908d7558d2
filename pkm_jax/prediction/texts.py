"""Texts given on a command line, in a file or on standard input, and how they are cut."""

import gzip
import lzma
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from pkm_jax.data import encodings
from pkm_jax.data.files import expand, refuse_pointer
from pkm_jax.data.vocabulary import Vocabulary
from pkm_jax.refusal import Refusal


class Text(NamedTuple):
    """One text and where it is from, for messages."""
    content: str
    where: str


def given(texts: Sequence[str], file: str) -> Iterator[Text]:
    """The texts themselves, else the lines of a file (plain, .gz, .xz), else of standard input.

    Lines without a word are left out. Lines are read when they are asked for.

    Raises:
      Refusal: both texts and a file; the file cannot be read, is damaged or not UTF-8.
    """
    if texts and file:
        raise Refusal(f'--file={file} and texts beside it: give one of them.')
    if texts:
        return (Text(text, f'text {number}') for number, text in enumerate(texts, 1))
    if file:
        return _lines_of(Path(expand(file)))
    return _lines(sys.stdin.buffer, 'standard input')


def _lines_of(path: Path) -> Iterator[Text]:
    if path.is_dir():
        raise Refusal(f'--file={path} is a folder: name a file with a text in each line.')
    refuse_pointer(path)
    openers: dict[str, Callable] = {'.gz': gzip.open, '.xz': lzma.open}
    try:
        with openers.get(path.suffix.lower(), open)(path, 'rb') as lines:
            yield from _lines(lines, str(path))
    except (EOFError, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise Refusal(f'{path} is damaged ({error}): fetch it again.') from error


def _lines(lines: Iterable[bytes], name: str) -> Iterator[Text]:
    for number, line in enumerate(lines, 1):
        try:
            content = line.decode('utf-8-sig' if number == 1 else 'utf-8').strip()
        except UnicodeDecodeError as error:
            raise Refusal(f'{name}, line {number} is not UTF-8'
                          f'{encodings.guess_in_words(line)}: save it as UTF-8.') from error
        if content:
            yield Text(content, f'{name}, line {number}')


class Cutter:
    """Cuts texts to [CLS] … [SEP] as transformers does: names of special tokens are these tokens.

    length: most tokens of a text; what is beyond is cut off, and `truncated` counts such texts.
    ends: whether [SEP] follows the text.
    `tokens` counts those of all texts.
    """

    def __init__(self, vocabulary: Vocabulary, length: int, *, ends: bool = True):
        self._tokenizer = vocabulary.tokenizer()
        self._tokenizer.encode_special_tokens = False
        self._first = [vocabulary.cls_id]
        self._last = [vocabulary.sep_id] if ends else []
        self.room = length - 1 - len(self._last)
        self.truncated = self.tokens = 0

    def __call__(self, content: str) -> tuple[list[int], list[int]]:
        """The ids of a text, and those that were cut off."""
        ids = self._tokenizer.encode(content, add_special_tokens=False).ids
        kept, beyond = ids[:self.room], ids[self.room:]
        whole = [*self._first, *kept, *self._last]
        self.truncated += bool(beyond)
        self.tokens += len(whole)
        return whole, beyond

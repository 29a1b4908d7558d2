"""A text that can be read more than once: its unique paragraphs, in a training and a validation
split."""

import dataclasses
import hashlib
import re
from collections.abc import Callable, Generator, Iterable, Iterator

from pkm_jax.refusal import Refusal

LONGEST_LINE = 100_000       # characters; a longer one is split: a file without line ends must fit
PARAGRAPHS_PER_BLOCK = 16    # neighbours that go to the same split, to keep packed text connected
_LONGEST_NAME = 80           # bytes of a corpus's name in those of folders; file systems take 255


@dataclasses.dataclass
class Counts:
    """What was met while reading a corpus; grows as it is read."""
    bytes_read: int = 0
    paragraphs: int = 0
    duplicates: int = 0
    empty_lines: int = 0
    split_lines: int = 0
    replaced_characters: int = 0
    malformed_lines: int = 0
    first_malformed: str = ''

    def malformed(self, where: str) -> None:
        """Counts a line that holds no text; the first one's place and fault are kept."""
        self.malformed_lines += 1
        self.first_malformed = self.first_malformed or where

    def summary(self) -> str:
        """One line for the log; only paragraphs, and what was left out or changed."""
        noted = {'duplicates dropped': self.duplicates, 'empty lines skipped': self.empty_lines,
                 'parts cut off long lines': self.split_lines,
                 'characters replaced that could not be decoded': self.replaced_characters,
                 'lines without a JSON object with a "text" skipped, the first of them '
                 f'{self.first_malformed}': self.malformed_lines}
        return ', '.join([f'{self.paragraphs:,} paragraphs']
                         + [f'{number:,} {what}' for what, number in noted.items() if number])


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A source of text that can be read more than once.

    name: for folders; described: for people.
    identity: changes whenever the text changes.
    size: the number of bytes that `Counts.bytes_read` grows to; None: not known beforehand.
    """
    name: str
    described: str
    identity: str
    size: int | None
    lines: Callable[[Counts], Iterator[str]]

    def paragraphs(self, counts: Counts) -> Iterator[str]:
        """Yields every distinct paragraph once, white space normalised.

        Keeps a hash of each in memory.
        Raises:
          Refusal: there is none, or a file cannot be read.
        """
        seen: set[int] = set()
        for line in self.lines(counts):
            paragraph = _normalised(line)
            if not paragraph:
                counts.empty_lines += 1
                continue
            digest = _hash(paragraph)
            if digest in seen:
                counts.duplicates += 1
                continue
            seen.add(digest)
            counts.paragraphs += 1
            yield paragraph
        if not seen:
            raise Refusal(f'the corpus {self.described} holds no text ({counts.summary()}): name '
                          'files with one paragraph a line (.txt), or one JSON object with a '
                          '"text" a line (.jsonl)')


def _normalised(line: str) -> str:
    """The words of a line with a space between them."""
    # The only white space that is printable is ' '. To see that most lines are as they should be
    # takes a fifth of the time to split them.
    if line.isprintable() and '  ' not in line and line.strip(' ') == line:
        return line
    return ' '.join(line.split())


@dataclasses.dataclass(frozen=True)
class Splits:
    """Which paragraphs are held out: the hash of a block's first paragraph decides for the block.

    moved: {number of a block: its split} where the hashes leave one split empty.
    """
    validation_fraction: float
    block: int = PARAGRAPHS_PER_BLOCK
    moved: dict[int, str] = dataclasses.field(default_factory=dict)

    @classmethod
    def plan(cls, paragraphs: Iterable[str], validation_fraction: float) -> 'Splits':
        """Splits that both hold text. Reads on until they do: of a small text all.

        A split that is empty gets the block whose hash comes next; a text of a single block is
        split by its paragraphs, and a single paragraph is to train on.
        """
        splits = cls(validation_fraction)
        heads: dict[int, int] = {}
        first_block: list[str] = []
        for number, paragraph in enumerate(paragraphs):
            if number < splits.block:
                first_block.append(paragraph)
            if number % splits.block == 0:
                heads[number // splits.block] = _hash(f'split {paragraph}')
                if len({splits._of(head) for head in heads.values()}) == 2:
                    return splits
                heads = dict(_extremes(heads))
        if len(first_block) < 2:
            return dataclasses.replace(splits, moved={0: 'train'})
        if len(heads) == 1:
            heads = {number: _hash(f'split {paragraph}')
                     for number, paragraph in enumerate(first_block)}
            splits = dataclasses.replace(splits, block=1)
        missing = {'train', 'validation'} - {splits._of(head) for head in heads.values()}
        extremes = dict(zip(('validation', 'train'), _extremes(heads), strict=True))
        return dataclasses.replace(splits, moved={extremes[split][0]: split for split in missing})

    def assign(self, paragraphs: Iterable[str]) -> Iterator[tuple[str, str]]:
        """Yields ('train' or 'validation', paragraph)."""
        for number, paragraph in enumerate(paragraphs):
            if number % self.block == 0:
                split = self._of(_hash(f'split {paragraph}'))
                split = self.moved.get(number // self.block, split)
            yield split, paragraph

    def _of(self, head: int) -> str:
        return 'validation' if head < self.validation_fraction * 2**64 else 'train'


def _extremes(heads: dict[int, int]) -> list[tuple[int, int]]:
    """The items with the least and the greatest hash."""
    ordered = sorted(heads.items(), key=lambda item: item[1])
    return [ordered[0], ordered[-1]]


def bounded_lines(pieces: Iterable[str], counts: Counts) -> Iterator[str]:
    """Yields the lines of a text that comes in pieces.

    Those over LONGEST_LINE characters come in several parts, cut at spaces if possible.
    """
    rest = ''
    for piece in pieces:
        *lines, rest = (rest + piece).split('\n')
        for line in lines:
            yield (yield from _cut(line, counts))
        rest = yield from _cut(rest, counts)
    if rest:
        yield rest


def _cut(line: str, counts: Counts) -> Generator[str, None, str]:
    """Yields parts from the beginning of a long line; returns what is left of it."""
    while len(line) > LONGEST_LINE:
        counts.split_lines += 1
        place = line.rfind(' ', LONGEST_LINE // 2, LONGEST_LINE)
        place = LONGEST_LINE if place < 0 else place
        yield line[:place]
        line = line[place:]
    return line


def safe_name(name: str) -> str:
    """A name as every file system takes it: no odd characters, not too long."""
    plain = re.sub(r'[^\w.-]', '-', name).lstrip('.-')
    return plain.encode()[:_LONGEST_NAME].decode(errors='ignore') or 'text'


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())

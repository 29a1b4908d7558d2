"""The text that comes with the program, and how it was made."""

import hashlib
import io
import lzma
import tarfile

import pytest

from pkm_jax.data import dataset
from pkm_jax.data.corpus import Counts
from pkm_jax.data.files import ContentHashes
from pkm_jax.data.texts import make

SENTENCES = [f'The state of the Union is good in year {number}.' for number in range(40)]


def test_the_shipped_text_is_what_its_readme_says(tmp_path):
    path = dataset.SHIPPED['state-of-the-union']
    text, readme = lzma.decompress(path.read_bytes()), (path.parent / 'README.md').read_text()
    assert hashlib.sha256(text).hexdigest() in readme
    assert f'{len(text.split()):,} words in {len(text.splitlines()):,} paragraphs' in readme
    corpus = dataset._open_text('state-of-the-union', 'utf-8', ContentHashes(tmp_path))
    counts = Counts()
    assert sum(1 for _ in corpus.paragraphs(counts)) == counts.paragraphs > 6_000
    assert corpus.name == 'state_of_the_union' and counts.duplicates < 10


@pytest.fixture
def archive(tmp_path):
    files = {'1909_a_r.txt': 'Too early.', '1911_b_r.txt': ' '.join(SENTENCES),
             '1910_c_d.txt': 'My fellow citizens— “peace” [Footnote 1: no.] it is. (Applause.) Thanks.'}
    with tarfile.open(tmp_path / 'archive.tgz', 'w:gz') as tar:
        for name, text in files.items():
            entry = tarfile.TarInfo(f'package/data/{name}')
            entry.size = len(text.encode())
            tar.addfile(entry, io.BytesIO(text.encode()))
    return tmp_path / 'archive.tgz'


def test_addresses_become_paragraphs_of_whole_sentences(archive, tmp_path):
    make.make(archive, tmp_path / 'text.xz')
    first, *rest = lzma.decompress((tmp_path / 'text.xz').read_bytes()).decode().splitlines()
    assert first == 'My fellow citizens - "peace" it is. Thanks.'
    assert ' '.join(rest) == ' '.join(SENTENCES) and len(rest) == 3
    assert all(make.PARAGRAPH <= len(line) < make.PARAGRAPH + 60 for line in rest[:-1])

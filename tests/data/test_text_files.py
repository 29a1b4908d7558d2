import gzip
import json
import lzma

import pytest

from pkm_jax.data import corpus, text_files as readers
from pkm_jax.data.corpus import Counts
from pkm_jax.data.files import ContentHashes
from pkm_jax.refusal import Refusal


@pytest.fixture
def open_files(tmp_path):
    """The corpus of files."""
    return lambda patterns, encoding='utf-8': readers.text_files(
        patterns, ContentHashes(tmp_path / 'hashes'), encoding)


@pytest.fixture
def read(open_files):
    """The paragraphs of files, and what was counted."""
    def paragraphs(patterns, encoding='utf-8') -> tuple[list[str], Counts]:
        counts = Counts()
        return list(open_files(patterns, encoding).paragraphs(counts)), counts
    return paragraphs


def test_all_kinds_of_files_are_read_in_the_order_of_their_names(read, tmp_path):
    (tmp_path / 'a.txt').write_text('from a text file\n')
    (tmp_path / 'b.txt.gz').write_bytes(gzip.compress(b'from gzip\n'))
    (tmp_path / 'c.txt.xz').write_bytes(lzma.compress(b'from xz\n'))
    article = {'title': 'x', 'text': 'from json\nits second line'}
    (tmp_path / 'd.jsonl').write_text(json.dumps(article) + '\n')
    (tmp_path / 'e.jsonl.gz').write_bytes(gzip.compress(b'{"text": "from json in gzip"}\n'))
    (tmp_path / 'f.jsonl.xz').write_bytes(lzma.compress(b'{"text": "from json in xz"}\n'))
    paragraphs, _ = read([str(tmp_path / '*.txt*'), str(tmp_path / '*.jsonl*')])
    assert paragraphs == ['from a text file', 'from gzip', 'from xz', 'from json',
                          'its second line', 'from json in gzip', 'from json in xz']


def test_duplicates_and_empty_lines_are_dropped_and_counted_across_files(read, tmp_path):
    (tmp_path / 'a.txt').write_text('one\n\n  \ntwo\none\n')
    (tmp_path / 'b.txt').write_text('two \nthree')
    paragraphs, counts = read(str(tmp_path / '*.txt'))
    assert paragraphs == ['one', 'two', 'three']
    assert (counts.paragraphs, counts.duplicates, counts.empty_lines) == (3, 2, 2)
    assert '2 duplicates dropped' in counts.summary()


def test_invalid_utf8_is_replaced_counted_and_reported(read, tmp_path):
    (tmp_path / 'a.txt').write_bytes(b'\xef\xbb\xbfbyte order mark\nbad \xff and \xfe byte\n'
                                     b'good caf\xc3\xa9\n')
    paragraphs, counts = read(str(tmp_path / 'a.txt'))
    mark = '\N{REPLACEMENT CHARACTER}'
    assert paragraphs == ['byte order mark', f'bad {mark} and {mark} byte', 'good café']
    assert counts.replaced_characters == 2
    assert '2 characters replaced' in counts.summary()


def test_an_overlong_line_is_split_at_spaces_and_nothing_is_lost(read, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, 'LONGEST_LINE', 50)
    words = [f'word{number}' for number in range(40)]
    no_spaces = ''.join(f'{number:03}' for number in range(40))
    (tmp_path / 'a.txt').write_text(' '.join(words) + '\nshort line\n' + no_spaces + '\n')
    paragraphs, counts = read(str(tmp_path / 'a.txt'))
    assert all(len(paragraph) <= 50 for paragraph in paragraphs)
    assert ' '.join(paragraphs[:-4]).split() == words
    assert paragraphs[-4] == 'short line'
    assert ''.join(paragraphs[-3:]) == no_spaces
    assert counts.split_lines == len(paragraphs) - 3


def test_lines_without_a_text_are_skipped_and_counted(read, tmp_path):
    lines = ['{"text": "good"}', '{"text": 3}', '{"title": "none"}', '{"text": "cut', '[1, 2]',
             r'{"text": "odd \ud800"}']
    (tmp_path / 'a.jsonl').write_text('\n'.join(lines))
    paragraphs, counts = read(str(tmp_path / 'a.jsonl'))
    assert paragraphs == ['good', 'odd \N{REPLACEMENT CHARACTER}']
    assert counts.malformed_lines == 4


def test_bytes_read_reach_the_size_of_the_corpus(read, open_files, tmp_path):
    (tmp_path / 'a.txt').write_text('one\ntwo\n')
    (tmp_path / 'b.txt.gz').write_bytes(gzip.compress(b'three\nfour\n'))
    _, counts = read(str(tmp_path / '*'))
    assert counts.bytes_read == open_files(str(tmp_path / '*')).size


def test_missing_unknown_empty_and_damaged_files_are_refused_by_name(read, tmp_path):
    with pytest.raises(Refusal, match='nothing-here'):
        read([str(tmp_path / 'nothing-here*.txt')])
    with pytest.raises(Refusal, match='empty list'):
        read([])
    (tmp_path / 'a.pdf').write_text('text')
    with pytest.raises(Refusal, match='a.pdf'):
        read(str(tmp_path / '*.pdf'))
    (tmp_path / 'empty.txt').write_text('\n \n')
    with pytest.raises(Refusal, match='empty.txt .* holds no text.*2 empty lines'):
        read(str(tmp_path / 'empty.txt'))
    for name, content in [('cut.txt.xz', lzma.compress(b'text ' * 100)[:-20]),
                          ('cut.txt.gz', gzip.compress(b'text ' * 100)[:-9]),
                          ('not.txt.gz', b'plain text')]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(Refusal, match=f'{name} is damaged'):
            read(str(tmp_path / name))

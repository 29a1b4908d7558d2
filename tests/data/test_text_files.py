import gzip
import hashlib
import json
import lzma
import os
import tracemalloc

import pytest

from pkm_jax.data import corpus
from pkm_jax.data import text_files as readers
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


RUSSIAN = [f'память ключ значение {n}' for n in range(400)]


@pytest.mark.parametrize('encoding', ['utf-16', 'utf-32', 'utf-8-sig'])
@pytest.mark.parametrize('ending', ['.txt', '.txt.gz', '.jsonl', '.jsonl.xz'])
def test_a_byte_order_mark_tells_the_encoding(read, tmp_path, encoding, ending):
    lines = [json.dumps({'text': line}, ensure_ascii=False) if 'json' in ending else line
             for line in RUSSIAN]
    content = '\r\n'.join(lines).encode(encoding)
    compress = {'.gz': gzip.compress, '.xz': lzma.compress}.get(ending[-3:], bytes)
    (tmp_path / f'a{ending}').write_bytes(compress(content))
    paragraphs, counts = read(str(tmp_path / f'a{ending}'))
    assert paragraphs == RUSSIAN and not counts.replaced_characters


@pytest.mark.parametrize('encoding, text', [
    ('cp1251', 'память ключ значение'), ('koi8_r', 'память ключ значение'),
    ('cp1252', 'Das schöne Mädchen möchte größer sein'), ('shift_jis', 'メモリのキーと値です'),
    ('euc_jp', 'メモリのキーと値です'), ('gb18030', '我们在中国的大学学习'), ('big5', '我們在中國的大學學習'),
    ('euc_kr', '우리는 기억을 읽고 있다'), ('utf-16-le', 'память ключ'), ('utf-16-be', 'memory key'),
    ('cp1253', 'μνήμη και κλειδί της αξίας'), ('cp1255', 'זיכרון ומפתח של הטבלה'),
    ('cp850', 'Das schöne Mädchen'), ('mac_roman', 'Das schöne Mädchen'),
    ('iso8859_2', 'gęślą jaźń'), ('cp1250', 'tükörfúrógép az árvízben, tűrő'),
    ('cp866', 'память ключ значение'), ('iso2022_jp', 'メモリのキーと値です'),
    ('utf-32-le', 'memory key'), ('utf-32-be', 'память ключ')])
def test_another_encoding_is_refused_with_its_likely_name_and_read_when_named(
        read, tmp_path, encoding, text):
    lines = ['plain text comes first'] * (encoding[:3] != 'utf') + [
        f'{text} {n}' for n in range(400)]
    (tmp_path / 'a.txt').write_bytes('\n'.join(lines).encode(encoding))
    with pytest.raises(Refusal, match=rf"a.txt is not utf-8: .*data.encoding='{encoding}'"):
        read(str(tmp_path / 'a.txt'))
    assert read(str(tmp_path / 'a.txt'), encoding)[0] == lines


def test_a_file_that_is_no_text_is_refused(read, tmp_path):
    (tmp_path / 'a.txt').write_bytes(bytes(range(256)) * 40)
    with pytest.raises(Refusal, match='a.txt is not utf-8: .*if it is a text'):
        read(str(tmp_path / 'a.txt'))


def test_a_text_in_two_encodings_gets_no_remedy_that_spoils_one(read, tmp_path):
    lines = '\n'.join(f'Das schöne Mädchen möchte größer sein {n}' for n in range(200))
    (tmp_path / 'a.txt').write_bytes(lines.encode() + lines.encode('latin-1'))
    with pytest.raises(Refusal, match='if it is a text in one encoding'):
        read(str(tmp_path / 'a.txt'))


@pytest.mark.parametrize('encoding', ['latin-1', 'cp1252', 'koi8_r'])
@pytest.mark.parametrize('ending', ['.txt', '.jsonl.gz'])
def test_utf8_is_not_read_as_an_encoding_that_reads_anything(read, tmp_path, encoding, ending):
    content = '\n'.join(json.dumps({'text': line}, ensure_ascii=False) for line in RUSSIAN).encode()
    (tmp_path / f'a{ending}').write_bytes(gzip.compress(content) if 'gz' in ending else content)
    with pytest.raises(Refusal, match=f'is UTF-8, not {encoding}: leave data.encoding at utf-8'):
        read(str(tmp_path / f'a{ending}'), encoding)


def test_a_small_share_of_damage_is_replaced(read, tmp_path):
    lines = [b'line %d of a text' % n for n in range(4_000)]
    lines[2_000] = b'\xff' * 12
    (tmp_path / 'a.txt').write_bytes(b'\n'.join(lines))
    paragraphs, counts = read(str(tmp_path / 'a.txt'))
    assert len(paragraphs) == 4_000 and counts.replaced_characters == 12


@pytest.mark.parametrize('encoding', ['klingon', 'base64', 'rot13', ''])
def test_what_is_no_encoding_is_refused(read, tmp_path, encoding):
    (tmp_path / 'a.txt').write_text('text')
    with pytest.raises(Refusal, match=f"data.encoding = '{encoding}'"):
        read(str(tmp_path / 'a.txt'), encoding)


def test_no_line_of_json_stops_a_corpus(read, tmp_path):
    bad = ['{"id": ' + '9' * 4400 + ', "text": "x"}', '[' * 100_000, '{"text": 1e999}',
           '{"a"' * 9_000, '{"text": null}', 'null', '"text"', '{"text": "?',
           '\x00', '{"text": ["list"]}']
    good = [f'{{"text": "a line {n}"}}' for n in range(400)]
    (tmp_path / 'big.jsonl').write_text('\n'.join([*good, *bad, '', '{"text": "the end"}']))
    paragraphs, counts = read(str(tmp_path / 'big.jsonl'))
    assert len(paragraphs) == 401 and paragraphs[-1] == 'the end'
    assert counts.malformed_lines == len(bad) and counts.empty_lines == 1
    assert 'big.jsonl, line 401 (ValueError: ' in counts.summary()


@pytest.mark.parametrize('name', [
    'data [v2]/a.txt', 'a,b.txt', 'a*b.txt', 'a?b.txt', ' a.txt', 'a.TXT', 'a b.Txt', 'ü.txt',
    '[!a].txt', 'n' * 240 + '.txt', '文' * 80 + '.txt', "it's.txt", 'a\nb.txt', '-a.txt', '..a.txt', '{a}.txt',
    os.fsdecode(b'latin-\xe9.txt')])
def test_files_of_any_name_are_read(open_files, read, tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text('in the file')
    assert read(str(path))[0] == ['in the file']
    folder = open_files(str(path)).name
    assert len(os.fsencode(folder)) <= 80 and '/' not in folder and folder == folder.strip('.')
    (tmp_path / folder).mkdir()


def test_upper_case_endings_are_endings(read, tmp_path):
    (tmp_path / 'a.TXT.GZ').write_bytes(gzip.compress(b'one'))
    (tmp_path / 'b.JSONL').write_text('{"text": "two"}')
    assert read(str(tmp_path / '*'))[0] == ['one', 'two']


def test_commas_part_globs_unless_they_are_in_a_name(read, tmp_path):
    for name in ('a.txt', 'b.txt', 'c,d.txt'):
        (tmp_path / name).write_text(f'in {name}')
    at = f'{tmp_path}/'
    assert read(f'{at}a.txt, {at}b*.txt,{at}c,d.txt')[0] == ['in a.txt', 'in b.txt', 'in c,d.txt']
    assert read(f'{at}a.txt,')[0] == ['in a.txt']
    assert read([f'{at}c,d.txt', f'{at}b.txt'])[0] == ['in b.txt', 'in c,d.txt']
    with pytest.raises(Refusal, match='e.txt'):
        read(f'{at}a.txt,{at}e.txt')


def test_a_glob_below_a_folder_with_brackets_is_read(read, tmp_path):
    (tmp_path / 'data [v2]').mkdir()
    (tmp_path / 'data [v2]' / 'a.txt').write_text('text')
    assert read(str(tmp_path / 'data [v2]' / '*.txt'))[0] == ['text']


def test_a_tilde_is_expanded(read, tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    (tmp_path / 'a.txt').write_text('at home')
    assert read('~/a.txt')[0] == read('~/*.txt')[0] == ['at home']


def test_folders_links_and_pointers_are_named(read, tmp_path):
    with pytest.raises(Refusal, match=r"is a folder: name the files in it, such as '.*\*.txt'"):
        read(str(tmp_path))
    (tmp_path / 'a.txt').write_text('text')
    (tmp_path / 'b.txt').symlink_to('gone.txt')
    for pattern in ('b.txt', '*.txt'):
        with pytest.raises(Refusal, match='b.txt is a link to gone.txt, which is not there'):
            read(str(tmp_path / pattern))
    (tmp_path / 'c.txt').write_text('version https://git-lfs.github.com/spec/v1\noid sha256:0\n')
    with pytest.raises(Refusal, match='c.txt is a git-lfs pointer'):
        read(str(tmp_path / 'c.txt'))


@pytest.mark.parametrize('address', ['http://a.org/a.txt', 's3://b/a.txt', 'a.txt,hdfs://b.txt'])
def test_addresses_that_are_not_read_are_refused(read, tmp_path, monkeypatch, address):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'a.txt').write_text('text')
    with pytest.raises(Refusal, match='only files, folders and gs:// are read'):
        read(address)


def test_spaces_around_a_name_are_its_own_where_a_file_has_them(read, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in (' a.txt', 'b.txt'):
        (tmp_path / name).write_text(f'in {name}')
    assert read(' a.txt, b.txt')[0] == ['in  a.txt'.replace('  ', ' '), 'in b.txt']


def test_a_pipe_is_called_that(read, tmp_path):
    os.mkfifo(tmp_path / 'a.txt')
    with pytest.raises(Refusal, match='a.txt is a pipe or a device'):
        read(str(tmp_path / 'a.txt'))


def test_a_file_that_vanishes_is_named(open_files, tmp_path):
    (tmp_path / 'a.txt').write_text('text')
    text = open_files(str(tmp_path / 'a.txt'))
    (tmp_path / 'a.txt').unlink()
    with pytest.raises(Refusal, match='a.txt cannot be read: No such file'):
        list(text.paragraphs(Counts()))


@pytest.mark.parametrize('text', ['ein "Zitat" \\ und 🙂 mehr\n' * 40, '\\u00e9 ' * 80])
def test_a_long_object_is_read_in_parts(read, tmp_path, monkeypatch, text):
    monkeypatch.setattr(readers, 'LONGEST_OBJECT', 7)
    rows = [{'text': text}, {'id': 1, 'meta': {'text': 'no', 'list': [1, '"}']}, 'text': text + '2'},
            {'title': 'text'}, {'text': 'short'}]
    (tmp_path / 'a.jsonl').write_text('\n'.join(
        [*map(json.dumps, rows), '{"text": "cut', '{"text": "bad \\x escape"}', '["text"]']))
    paragraphs, counts = read(str(tmp_path / 'a.jsonl'))
    expected = [line for row in rows if 'text' in row for line in row['text'].split('\n')]
    expected = [' '.join(line.split()) for line in expected if line.strip()]
    paragraphs = [line for line in paragraphs if line not in ('cut', 'bad')]
    assert paragraphs == list(dict.fromkeys(expected))
    assert counts.malformed_lines == 4 and 'line 3 ' in counts.first_malformed


@pytest.mark.parametrize('ending', ['.txt', pytest.param('.jsonl', marks=pytest.mark.slow)])
def test_memory_does_not_grow_with_a_document(open_files, tmp_path, ending):
    def peak(megabytes: int) -> int:
        words = ' '.join(str(number) for number in range(20_000))
        with (tmp_path / f'a{ending}').open('w') as file:
            file.write('{"text": "' if ending == '.jsonl' else '')
            for part in range(megabytes * 10):
                file.write(f'part {part} {words[:100_000]} ')
            file.write('"}' if ending == '.jsonl' else '')
        tracemalloc.start()
        for _ in open_files(str(tmp_path / f'a{ending}')).paragraphs(Counts()):
            pass
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    assert peak(16) < peak(4) + 2**20


def test_what_is_the_same_text_has_the_same_identity_and_other_text_another(tmp_path):
    """Whatever names, sizes and times say, and whatever is remembered."""
    hashes = ContentHashes(tmp_path / 'hashes')

    def identity(pattern: str, encoding: str = 'utf-8') -> str:
        return readers.text_files(str(tmp_path / pattern), hashes, encoding).identity

    for folder, text in (('one', 'aaaa'), ('two', 'bbbb'), ('three', 'aaaa')):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / 'a.txt').write_text(text)
        os.utime(tmp_path / folder / 'a.txt', (0, 0))
    one, two, three = (identity(f'{folder}/*.txt')
                       for folder in ('one', 'two', 'three'))
    assert one == three != two
    (tmp_path / 'one' / 'a.txt').write_text('cccc')     # the same path, size, inode and time
    os.utime(tmp_path / 'one' / 'a.txt', (0, 0))
    assert identity('one/*.txt') not in (one, two)
    assert identity('two/*.txt', 'latin-1') != two
    (tmp_path / 'two' / 'b.txt').write_text('aaaa')
    assert identity('two/*.txt') != two


def test_a_file_is_hashed_once(tmp_path, monkeypatch):
    (tmp_path / 'a.txt').write_text('text')
    hashes = ContentHashes(tmp_path / 'cache')
    found = hashes.of(tmp_path / 'a.txt')
    hashes.save()
    again = ContentHashes(tmp_path / 'cache')
    monkeypatch.setattr(hashlib, 'file_digest', None)
    assert again.of(tmp_path / 'a.txt') == found == hashlib.sha256(b'text').hexdigest()
    (tmp_path / 'cache' / 'content-hashes.json').write_text('{"cut')
    monkeypatch.undo()
    assert ContentHashes(tmp_path / 'cache').of(tmp_path / 'a.txt') == found

"""Rows of tables, and what is said of those that cannot be used."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from pkm_jax.data.tables import read_table
from pkm_jax.refusal import Refusal

ROWS = [{'text': 'a "quoted, word', 'label': 'x'}, {'text': 'line\u2028separator', 'label': 'y'}]


@pytest.fixture
def written(tmp_path):
    """Writes a file of that name; returns its path."""
    def write(name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)
    return write


def test_all_formats_give_the_same_rows(written, tmp_path):
    tabs = written('a.tsv', 'label\ttext\n' + ''.join(f'{r["label"]}\t{r["text"]}\n' for r in ROWS))
    lines = written('a.jsonl', ''.join(json.dumps(row) + '\n\n' for row in ROWS))
    commas = written('a.csv', '\ufefftext,label\r\n"a ""quoted, word",x\r\nline\u2028separator,y\r\n')
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / 'a.parquet')
    for path in (tabs, lines, commas, str(tmp_path / 'a.parquet')):
        assert [row.values for row in read_table(path, ['text', 'label'])] == ROWS, path


def test_places_are_lines_of_the_file(written):
    commas = written('a.csv', 'text,label\n"two\nlines",x\nb,y\n')
    assert [row.place for row in read_table(commas, ['text'])] == [
        f'{commas}, line 2', f'{commas}, line 4']
    lines = written('a.jsonl', '{"text": "a"}\n\n{"text": "b"}')
    assert [row.place for row in read_table(lines, ['text'])] == [
        f'{lines}, line 1', f'{lines}, line 3']


@pytest.mark.parametrize('name, content, message', [
    ('a.tsv', '', 'a.tsv is empty'),
    ('a.tsv', 'text\tlabel\n', 'a.tsv holds no rows'),
    ('a.tsv', 'text\tlabel\na\tb\na\tb\tc\n', r'a.tsv, line 3 has 2 tabs, where 1 part its 2'),
    ('a.tsv', 'text\tlabel\na\tb\n\nc\td\n', r'a.tsv, line 3 has 0 tabs'),
    ('a.tsv', 'sentence\tlabel\na\tb\n', r"a.tsv, line 2 has no column 'text', only 'sentence', 'label'"),
    ('a.csv', '', 'a.csv holds no rows'),
    ('a.csv', 'text,label\n"a\nb",c\na\n', 'a.csv, line 4 has 1 values'),
    ('a.csv', 'text,label\na,b\n"a"b,c\n', 'a.csv, line 3 is no CSV'),
    ('a.csv', 'text,label\n"a,c\n', 'a.csv, line 2 is no CSV'),
    ('a.jsonl', '{"text": "a"}\n{"text": \n', 'a.jsonl, line 2 is no JSON'),
    ('a.jsonl', '[1]\n', 'a.jsonl, line 1 is no JSON object but a list'),
    ('a.jsonl', '{"text": "a"}\n{"label": "a"}\n', "a.jsonl, line 2 has no column 'text'"),
    ('a.jsonl', '{"text": null}\n', "a.jsonl, line 1: the value of 'text' is null"),
    ('a.jsonl', '{"text": "a"}\n{"text": "\\ud83d"}\n', 'a.jsonl, line 2 is no JSON .*surrogates'),
    ('a.parquet', 'no', 'a.parquet is no Parquet file'),
    ('a.tsv', b'text\n\xff\n', r'a.tsv is not UTF-8 \(line 2'),
    ('a.txt', 'a', 'must end in one of .tsv, .csv, .jsonl, .parquet'),
])
def test_what_cannot_be_used_is_named_with_its_line(written, name, content, message):
    with pytest.raises(Refusal, match=message):
        read_table(written(name, content), ['text'])

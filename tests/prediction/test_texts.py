"""Texts from a command line, files and standard input; what is no text is named with its line."""

import gzip
import io
import json
import sys

import pytest

from pkm_jax.prediction.texts import Fields, given
from pkm_jax.refusal import Refusal

SINGLE, PAIR = Fields(), Fields(('question', 'context'), 2)


def write(path, content):
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def parts(file, fields=SINGLE):
    return [text.parts for text in given([], file, fields)]


def test_lines_are_texts_and_empty_ones_are_none(tmp_path):
    file = write(tmp_path / 'a.txt', '\ufeffone\n\n  two \n')
    assert parts(file) == [('one',), ('two',)]
    packed = write(tmp_path / 'a.txt.gz', gzip.compress(b'one\ttwo'))
    assert parts(packed) == [('one\ttwo',)]
    assert parts(packed, PAIR) == [('one', 'two')]


def test_files_with_names_give_the_parts_by_them(tmp_path):
    row = {'context': 'c', 'id': 7, 'question': 'q'}
    assert parts(write(tmp_path / 'a.jsonl', json.dumps(row)), PAIR) == [('q', 'c')]
    assert parts(write(tmp_path / 'a.csv', 'context,question\n"c, d",q\n'), PAIR) == [('q', 'c, d')]


def test_standard_input_and_the_command_line(monkeypatch):
    monkeypatch.setattr(sys, 'stdin', io.TextIOWrapper(io.BytesIO(b'one\ntwo\n')))
    assert [text.parts for text in given([], '', Fields())] == [('one',), ('two',)]
    assert [text.parts for text in given(['a', 'b'], '', Fields())] == [('a',), ('b',)]
    assert [text.parts for text in given(['a', 'b'], '', PAIR)] == [('a', 'b')]


@pytest.mark.parametrize('name, content, fields, words', [
    ('a.txt', b'one\n\xff\n', Fields(), 'a.txt, line 2 is not UTF-8'),
    ('a.txt', 'q\tc\nq\n', PAIR, 'a.txt, line 2 has 1 of the texts question, context'),
    ('a.jsonl', '{"question": "q"}', PAIR, 'a.jsonl, line 1 has 1 of the texts'),
    ('a.jsonl', '{', Fields(), 'line 1 is no JSON'),
    ('a.jsonl', '[]', Fields(), 'line 1 is no JSON object but a list'),
    ('a.gz', b'no', Fields(), 'a.gz is damaged'),
    ('a.tsv', 'x\ty\n1\t2\n', Fields(), "a.tsv, line 2 has no column 'text'"),
])
def test_what_is_no_text_is_named(tmp_path, name, content, fields, words):
    file = write(tmp_path / name, content)
    with pytest.raises(Refusal, match=words):
        list(given([], file, fields))


def test_texts_and_a_file_are_one_too_many(tmp_path):
    with pytest.raises(Refusal, match='give one of them'):
        given(['a'], 'b.txt', Fields())
    with pytest.raises(Refusal, match='is a folder'):
        list(given([], str(tmp_path), Fields()))

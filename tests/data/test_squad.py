"""Questions in SQuAD's JSON, and what is said of those that cannot be used."""

import gzip
import json
import lzma

import pytest

from pkm_jax.data import squad
from pkm_jax.data.squad import read_squad, unalignable
from pkm_jax.refusal import Refusal


def content(**changes):
    question = {'id': 'q1', 'question': 'Who?', 'answers': [{'text': 'Ann', 'answer_start': 0}]}
    return {'version': '1.1', 'data': [{'title': 't', 'paragraphs': [
        {'context': 'Ann left.', 'qas': [question | changes]}]}]}


def read(tmp_path, found, name='a.json'):
    path = tmp_path / name
    path.write_bytes(found if isinstance(found, bytes) else json.dumps(found).encode())
    return read_squad([str(path)])


def test_questions_of_both_versions(tmp_path):
    one, = read(tmp_path, content())
    assert one[:3] == ('q1', 'Who?', 'Ann left.') and one.answers == (('Ann', 0),)
    assert unalignable(one) == ''
    none, = read(tmp_path, content(is_impossible=True, answers=[], plausible_answers=[
        {'text': 'Ann', 'answer_start': 0}]))
    assert none.answers == ()


def test_packed_files(tmp_path):
    packed = lzma.compress(json.dumps(content()).encode())
    assert read(tmp_path, packed, 'a.json.xz')[0].id == 'q1'
    with pytest.raises(Refusal, match=r'a.json.xz cannot be read'):
        read(tmp_path, packed[:40], 'a.json.xz')
    packed = bytearray(gzip.compress(json.dumps(content()).encode()))
    assert read(tmp_path, bytes(packed), 'a.json.gz')[0].id == 'q1'
    packed[14] ^= 255
    with pytest.raises(Refusal, match=r'a.json.gz cannot be read'):
        read(tmp_path, bytes(packed), 'a.json.gz')


@pytest.mark.parametrize('name, pack', [('a.json.gz', gzip.compress), ('a.json.xz', lzma.compress)])
def test_what_unpacks_to_too_much_is_not_read(tmp_path, monkeypatch, name, pack):
    monkeypatch.setattr(squad, 'MOST_BYTES', 1_000)
    with pytest.raises(Refusal, match=f'{name} holds more than 1,000 bytes of JSON.* split it'):
        read(tmp_path, pack(b' ' * 10_000_000 + json.dumps(content()).encode()), name)


def test_an_answer_elsewhere_is_told(tmp_path):
    one, = read(tmp_path, content(answers=[{'text': 'Ann', 'answer_start': 4}]))
    assert unalignable(one) == "the answer is 'Ann', but at 4 stands 'lef'"


@pytest.mark.parametrize('found, message', [
    (b'', 'a.json is empty'), (b'\n{"data": [}', r'a.json is no JSON \(line 2, column 11'),
    (b'\xff{}', 'a.json is not UTF-8'), ({'data': []}, 'holds no questions'),
    ({'questions': []}, "a.json has no 'data' that is a list"),
    ({'data': [{'paragraphs': [{'qas': []}]}]}, r"data\[0\].paragraphs\[0\] has no 'context'"),
    (content(answers=[{'text': 'Ann', 'answer_start': 9}]),
     r'qas\[0\] \(id q1\): answer_start = 9, outside of a paragraph of 9 characters'),
    (content(answers=[{'text': 'Ann', 'answer_start': -1}]), 'answer_start = -1, outside'),
    (content(answers=[{'text': 'Ann', 'answer_start': '0'}]), "has no 'answer_start' that is a int"),
    (content(answers=3), "has no 'answers' that is a list"),
    (content(question='\ud83d'), 'a.json cannot be read .*surrogates'),
    (b'{"data": ' + b'9' * 5000 + b'}', 'a.json cannot be read'),
    (content(question=None), r"\(id q1\) has no 'question'"), (content(id=''), "has no 'id'"),
])
def test_what_cannot_be_used_is_named(tmp_path, found, message):
    with pytest.raises(Refusal, match=message):
        read(tmp_path, found)


def test_ids_are_there_once(tmp_path):
    (tmp_path / 'b.json').write_text(json.dumps(content()))
    read(tmp_path, content())
    with pytest.raises(Refusal, match=r'b.json: .* its id is there twice, first at .*a.json'):
        read_squad([str(tmp_path / 'a.json'), str(tmp_path / 'b.json')])

"""Whatever bytes a file holds, a reader of text or vocabularies uses them or refuses them.

More of them: pytest --hypothesis-profile=thorough tests/data/test_foreign_bytes.py
"""

import gzip
import json
import lzma

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pkm_jax.data import corpus, dataset, tokenizer
from pkm_jax.data import text_files as readers
from pkm_jax.data.corpus import Counts
from pkm_jax.data.files import ContentHashes
from pkm_jax.data.long_json import text_of_long_object
from pkm_jax.data.vocabulary import word_pieces
from pkm_jax.refusal import Refusal
from tests.foreign_bytes import JSON, altered, damaged

WORDS = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', 'a', 'b', '##c', 'schön', '東']
LINES = b'{"text": "a line"}\n{"text": "sch\\u00f6n \\ud83d\\ude42"}\n{"id": 1, "text": "x\\ny"}\n'
PLAIN = 'a line\r\nschön 東\n\n\x0b a line\n'.encode()
PIECES = json.loads(word_pieces(WORDS).description)


def read(folder, name: str, content: bytes, encoding: str = 'utf-8') -> list[str]:
    (folder / name).write_bytes(content)
    text = readers.text_files([str(folder / name)], ContentHashes(folder), encoding)
    return list(text.paragraphs(Counts()))


@pytest.mark.parametrize('name, compress', [
    ('a.txt', bytes), ('a.jsonl', bytes), ('a.txt.gz', gzip.compress), ('a.jsonl.xz', lzma.compress)])
@given(data=st.data())
def test_text_is_read_or_refused(tmp_path, name, compress, data):
    whole = compress(LINES if 'jsonl' in name else PLAIN)
    content = data.draw(st.binary() | damaged(whole) | st.binary().map(compress))
    encoding = data.draw(st.sampled_from(['utf-8', 'utf-16', 'shift_jis', 'utf-7', 'gb18030']))
    try:
        paragraphs = read(tmp_path, name, content, encoding)
    except Refusal as refusal:
        assert name in str(refusal)
    else:
        assert paragraphs and len(set(paragraphs)) == len(paragraphs)
        for paragraph in paragraphs:
            assert paragraph == ' '.join(paragraph.split()) and paragraph.encode()


@given(st.lists(st.text(st.characters(exclude_categories=['Cs', 'Cc']), min_size=1), min_size=1),
       st.sampled_from(['utf-8', 'utf-8-sig', 'utf-16', 'utf-32']))
def test_every_text_comes_back(tmp_path, lines, encoding):
    expected = list(dict.fromkeys(' '.join(line.split()) for line in lines if line.strip()))
    if not expected:
        return
    lines = [line.replace('\udcff', '') for line in lines]
    assert read(tmp_path, 'a.txt', '\n'.join(lines).encode(encoding)) == expected
    rows = '\n'.join(json.dumps({'text': line}) for line in lines)
    assert read(tmp_path, 'a.jsonl', rows.encode(encoding)) == expected


@given(st.lists(JSON | st.fixed_dictionaries({'text': JSON})))
def test_no_line_of_json_stops_a_corpus(tmp_path, rows):
    lines = [json.dumps(row) for row in [*rows, {'text': 'the end'}]]
    assert read(tmp_path, 'a.jsonl', '\n'.join(lines).encode())[-1] == 'the end'


@given(st.dictionaries(st.text(), JSON), st.text(), st.integers(1, 9), st.booleans())
def test_a_long_object_gives_the_text_that_json_gives(before, text, size, ascii):
    whole = json.dumps(before | {'text': text}, ensure_ascii=ascii)
    pieces = [whole[start:start + size] for start in range(0, len(whole), size)]
    found = ''.join(text_of_long_object(pieces))
    assert found.encode('utf-16', 'surrogatepass') == text.encode('utf-16', 'surrogatepass')


@given(st.text(), st.integers(1, 9))
def test_a_long_line_that_is_no_object_raises_what_is_counted(line, size):
    pieces = [line[start:start + size] for start in range(0, len(line), size)]
    try:
        list(text_of_long_object(pieces))
    except (ValueError, KeyError):
        pass


@given(st.lists(st.text('ab \n', max_size=30)), st.integers(4, 12))
def test_lines_are_bounded_and_nothing_is_lost(pieces, longest):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, 'LONGEST_LINE', longest)
        lines = list(corpus.bounded_lines(pieces, Counts()))
    assert max(map(len, lines), default=0) <= longest
    assert ''.join(lines) == ''.join(pieces).replace('\n', '')


@given(st.text(st.characters(exclude_characters='/\0', exclude_categories=['Cs']), min_size=1,
               max_size=60))
def test_a_file_of_any_name_is_read(tmp_path, name):
    name += '.txt'
    if len(name.encode()) > 255:
        return
    (tmp_path / name).write_text('text')
    text = readers.text_files(str(tmp_path / name), ContentHashes(tmp_path))
    assert list(text.paragraphs(Counts())) == ['text']


@given(st.text())
def test_whatever_is_asked_for_is_found_or_refused(tmp_path, corpus):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        with pytest.raises(Refusal):
            dataset.prepare(corpus, cache=tmp_path / 'cache')


def load(folder, name: str, content: bytes) -> None:
    """Loads and uses the vocabulary, or sees it refused with its file's name."""
    (folder / name).write_bytes(content)
    try:
        vocabulary = tokenizer.load(folder)
    except Refusal as refusal:
        assert str(folder) in str(refusal)
        return
    vocabulary.tokenizer().encode('a bc schön 東')
    assert len(set(vocabulary.tokens)) == len(vocabulary.tokens) > vocabulary.mask_id
    vocabulary.special, vocabulary.pad_id


@given(st.binary() | damaged('\n'.join(WORDS).encode()) | st.lists(st.text()).map(
    lambda words: '\n'.join([*WORDS, *words]).encode('utf-8', 'replace')))
def test_a_vocab_txt_is_read_or_refused(tmp_path, content):
    load(tmp_path, 'vocab.txt', content)


@given(st.binary() | altered(PIECES) | damaged(json.dumps(PIECES).encode())
       | JSON.map(lambda value: json.dumps(value).encode()))
def test_a_tokenizer_json_is_read_or_refused(tmp_path, content):
    load(tmp_path, 'tokenizer.json', content)


@pytest.mark.parametrize('name', ['tokenizer_config.json', 'special_tokens_map.json',
                                  'added_tokens.json', 'config.json'])
@given(data=st.data())
def test_what_lies_beside_a_vocab_txt_is_read_or_refused(tmp_path, name, data):
    (tmp_path / 'vocab.txt').write_text('\n'.join(WORDS))
    config = {'do_lower_case': True, 'strip_accents': False, 'mask_token': '[MASK]',
              'tokenizer_class': 'BertTokenizer', 'wordpieces_prefix': '##', 'cls_token':
              {'content': '[CLS]'}, 'added_tokens_decoder': {'10': {'content': 'x', 'special': True}}}
    load(tmp_path, name, data.draw(altered(config) | damaged(json.dumps(config).encode()) | st.builds(
        lambda value: json.dumps(value).encode(), JSON)))

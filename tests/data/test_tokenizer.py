"""Folders of other people: their tokenizer is used as it is, or refused by name."""

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from pkm_jax.data import tokenizer
from pkm_jax.data.masking import Masking
from pkm_jax.data.vocabulary import SpecialTokens
from pkm_jax.refusal import Refusal

SPECIAL = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]']
WORDS = [*SPECIAL, 'möchte', 'mochte', 'schön', 'schon', 'a', '##b', *'0123456789']


def write_words(folder: Path, words=WORDS, **config) -> Path:
    """A folder with a vocab.txt and, where `config` is given, a tokenizer_config.json."""
    folder.mkdir(exist_ok=True)
    (folder / 'vocab.txt').write_text('\n'.join(words) + '\n', encoding='utf-8')
    if config:
        (folder / 'tokenizer_config.json').write_text(json.dumps(config))
    return folder


def write_pieces(folder: Path, **normalizer) -> Path:
    """A folder with the tokenizer.json of a BERT whose normaliser is set so."""
    built = Tokenizer(models.WordPiece({word: n for n, word in enumerate(WORDS)},
                                       unk_token='[UNK]'))
    built.normalizer = normalizers.BertNormalizer(**normalizer)
    built.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    folder.mkdir(exist_ok=True)
    built.save(str(folder / 'tokenizer.json'))
    return folder


def tokens(path: Path, text: str, **options) -> list[str]:
    vocabulary = tokenizer.load(path, **options)
    return vocabulary.tokenizer().encode(text, add_special_tokens=False).tokens


@pytest.mark.parametrize('lowercase, strip, expected', [
    (True, False, ['möchte', 'schön']), (True, True, ['mochte', 'schon']),
    (False, False, ['[UNK]', 'schön'])])
def test_what_a_tokenizer_json_says_is_done(tmp_path, lowercase, strip, expected):
    folder = write_pieces(tmp_path / 'de', lowercase=lowercase, strip_accents=strip)
    assert tokens(folder, 'Möchte schön') == expected
    assert tokens(folder / 'tokenizer.json', 'Möchte schön') == expected


def test_a_tokenizer_json_stands_above_its_vocab_txt(tmp_path):
    folder = write_pieces(write_words(tmp_path / 'de'), lowercase=True, strip_accents=False)
    for path in (folder, folder / 'vocab.txt'):
        assert tokens(path, 'MÖCHTE') == ['möchte']
    lines = []
    write_words(folder, [*SPECIAL, 'other'])
    assert tokens(folder / 'vocab.txt', 'other', log=lines.append) == ['other']
    assert 'has other words' in lines[0]


@pytest.mark.parametrize('config, expected', [
    (dict(do_lower_case=True, strip_accents=False), ['möchte', 'schön']),
    (dict(do_lower_case=True), ['mochte', 'schon']),
    (dict(do_lower_case=False), ['[UNK]', 'schön']),
    (dict(tokenizer_class='BertTokenizerFast'), ['mochte', 'schon'])])
def test_what_a_tokenizer_config_says_is_done_with_a_vocab_txt(tmp_path, config, expected):
    folder = write_words(tmp_path / 'de', **config)
    for path in (folder, folder / 'vocab.txt'):
        assert tokens(path, 'Möchte schön') == expected


def test_other_settings_of_berts_tokenizer_are_followed(tmp_path):
    words = [*SPECIAL, '東', '京', '東京', '@@b', 'a']
    folder = write_words(tmp_path / 'jp', words, do_lower_case=False, tokenize_chinese_chars=False,
                         wordpieces_prefix='@@')
    assert tokens(folder, '東京 ab') == ['東京', 'a', '@@b']
    assert tokenizer.load(folder).continuation.tolist() == [False] * 8 + [True, False]


def test_settings_decide_where_only_the_words_are_known(tmp_path):
    file = write_words(tmp_path / 'de') / 'vocab.txt'
    assert tokens(file, 'Schön', lowercase=True, strip_accents=True) == ['schon']
    assert tokens(file, 'Schön', lowercase=True, strip_accents=False) == ['schön']
    assert tokens(file, 'Schön', lowercase=False) == ['[UNK]']


@pytest.mark.parametrize('words, expected, said', [
    (['schon', 'a'], ['schon'], ['lowered, as no word has any', 'dropped, as no word has any']),
    (['schön', 'a'], ['schön'], ['lowered, as no word has any', "kept, as 'schön' has one"]),
    (['Schön', 'a'], ['Schön'], ["kept, as 'Schön' has them", "kept, as 'Schön' has one"])])
def test_a_guess_is_said_with_its_reason(tmp_path, words, expected, said):
    lines = []
    file = write_words(tmp_path / 'de', [*SPECIAL, *words]) / 'vocab.txt'
    assert tokens(file, 'Schön', log=lines.append) == expected
    assert len(lines) == 2
    for line, reason, setting in zip(lines, said, ('lowercase', 'strip_accents')):
        assert str(file) in line and f'Guessed: they are {reason}. data.{setting} decides' in line


@pytest.mark.parametrize('write, where', [
    (lambda folder: write_pieces(folder, lowercase=True, strip_accents=False), 'tokenizer.json'),
    (lambda folder: write_words(folder, do_lower_case=True, strip_accents=False),
     'tokenizer_config.json')])
def test_a_wish_that_the_folder_contradicts_is_refused(tmp_path, write, where):
    folder = write(tmp_path / 'de')
    assert tokens(folder, 'Schön', lowercase=True, strip_accents=False) == ['schön']
    for wish in (dict(lowercase=False), dict(strip_accents=True)):
        (setting,) = wish
        with pytest.raises(Refusal, match=f'data.{setting} = .*{where}'):
            tokenizer.load(folder, **wish)


def test_a_neighbour_that_says_something_else_is_named(tmp_path):
    folder = write_pieces(write_words(tmp_path / 'de', do_lower_case=False), lowercase=True)
    lines = []
    tokenizer.load(folder, log=lines.append)
    assert 'tokenizer.json lowers capitals' in lines[0] and 'do_lower_case False' in lines[0]


@pytest.mark.parametrize('config', [
    dict(tokenizer_class='BertJapaneseTokenizer', do_lower_case=False),
    dict(tokenizer_class='RobertaTokenizer'), dict(tokenizer_class='PreTrainedTokenizerFast'),
    dict(word_tokenizer_type='mecab'), dict(do_basic_tokenize=False),
    dict(never_split=['a b'])])
def test_words_that_another_tokenizer_cuts_are_refused(tmp_path, config):
    named = config.get('tokenizer_class', 'word_tokenizer_type')
    with pytest.raises(Refusal, match=f'vocab.txt: .*{named}.*tokenizer.json'):
        tokenizer.load(write_words(tmp_path / 'jp', **config))


def test_the_class_in_config_json_counts_too(tmp_path):
    folder = write_words(tmp_path / 'jp', do_lower_case=False)
    (folder / 'config.json').write_text('{"tokenizer_class": "BertJapaneseTokenizer"}')
    with pytest.raises(Refusal, match='BertJapaneseTokenizer'):
        tokenizer.load(folder)


def test_added_tokens_are_words(tmp_path):
    folder = write_words(tmp_path / 'en', do_lower_case=True, added_tokens_decoder={
        str(len(WORDS) + 1): {'content': '<user>', 'special': True}, '0': {'content': '[PAD]'}})
    (folder / 'added_tokens.json').write_text(json.dumps({'covid': len(WORDS)}))
    vocabulary = tokenizer.load(folder)
    assert vocabulary.tokens[-2:] == ('covid', '<user>')
    assert vocabulary.special[-2:].tolist() == [False, True]
    assert tokens(folder, 'covid a') == ['covid', 'a']
    (folder / 'added_tokens.json').write_text(json.dumps({'covid': 999}))
    with pytest.raises(Refusal, match='covid.*do not follow'):
        tokenizer.load(folder)


TEXT = ['the unforgettable orchestra remembers the lighthouse', 'möchte schön 京 🙂'] * 20


def byte_level() -> Tokenizer:
    built = Tokenizer(models.BPE())
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    built.train_from_iterator(TEXT, trainers.BpeTrainer(
        vocab_size=400, special_tokens=['<s>', '<pad>', '</s>', '<unk>', '<mask>'],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    return built


def unigram() -> Tokenizer:
    built = Tokenizer(models.Unigram())
    built.pre_tokenizer = pre_tokenizers.Metaspace()
    built.decoder = decoders.Metaspace()
    built.train_from_iterator(TEXT, trainers.UnigramTrainer(
        vocab_size=80, special_tokens=['<pad>', '<unk>', '<s>', '</s>', '<|hole|>'],
        unk_token='<unk>', show_progress=False))
    return built


@pytest.mark.parametrize('build, mask', [(byte_level, '<mask>'), (unigram, '<|hole|>')])
def test_byte_level_and_unigram_tokenizers_work_where_special_tokens_are_named(
        tmp_path, build, mask):
    built = build()
    built.enable_truncation(3)      # as some folders have it: a paragraph must stay whole
    built.enable_padding(length=50)
    built.save(str(tmp_path / 'tokenizer.json'))
    (tmp_path / 'special_tokens_map.json').write_text(json.dumps(
        {'mask_token': {'content': mask, 'lstrip': True}, 'cls_token': '<s>'}))
    vocabulary = tokenizer.load(tmp_path)
    assert vocabulary.special_tokens == SpecialTokens('<pad>', '<unk>', '<s>', '</s>', mask)
    encoding = vocabulary.tokenizer().encode(TEXT[0], add_special_tokens=False)
    assert built.decoder.decode(encoding.tokens).strip() == TEXT[0]
    begins = np.flatnonzero(~vocabulary.continuation[encoding.ids])
    assert len(begins) in (5, 6)        # byte-level: the first word has no space before it
    record = np.array([vocabulary.cls_id, *encoding.ids, vocabulary.sep_id], np.int32)
    masked, positions, _ = Masking(vocabulary, 0, 0.5, True, 60, 64)(record, 0, 0)
    assert positions.size and vocabulary.mask_id in masked
    vocabulary.save(tmp_path)
    assert tokenizer.load(tmp_path) == vocabulary and not (tmp_path / 'vocab.txt').exists()


def test_special_tokens_without_a_name_are_asked_for(tmp_path):
    unigram().save(str(tmp_path / 'tokenizer.json'))
    with pytest.raises(Refusal, match=r'tokenizer.json.*lacks \[MASK\].*special_tokens_map.json'):
        tokenizer.load(tmp_path)


@pytest.mark.parametrize('names, said', [
    ({'mask_token': '[PAD]'}, 'is its mask token and another special token too'),
    ({'mask_token': {'content': '<nope>'}}, 'lacks <nope>, which the files beside it name')])
@pytest.mark.parametrize('write', [write_words, write_pieces])
def test_special_tokens_that_cannot_be_are_refused(tmp_path, write, names, said):
    folder = write(tmp_path / 'de')
    (folder / 'special_tokens_map.json').write_text(json.dumps(names))
    with pytest.raises(Refusal, match=said):
        tokenizer.load(folder)


def test_whole_words_are_refused_where_pieces_do_not_tell(tmp_path):
    built = Tokenizer(models.BPE({word: n for n, word in enumerate([*SPECIAL, 'a', 'b'])}, [],
                                 unk_token='[UNK]'))
    built.save(str(tmp_path / 'tokenizer.json'))
    with pytest.raises(Refusal, match='data.whole_word'):
        tokenizer.load(tmp_path).continuation


@pytest.mark.parametrize('name, content, words', [
    ('tokenizer.json', b'{"model": {"type": "WordPiece", "vo', 'is damaged or cut short'),
    ('tokenizer.json', b'version https://git-lfs.github.com/spec/v1\noid sha256:1', 'git-lfs pull|'
     'git-lfs pointer.*git lfs pull'),
    ('tokenizer.json', b'{"added_tokens": []}', 'has no "model"'),
    ('tokenizer.json', b'[1, 2]', 'not a JSON object but a list'),
    ('tokenizer.json', b'{"model": {"type": "Quantum"}}', 'not read by the tokenizers library'),
    ('tokenizer.json', b'{"model": {"type": "BPE", "vocab": {}, "merges": []}}', 'lacks'),
    ('tokenizer.json', b'', 'is damaged or cut short'),
    ('tokenizer.json', b'[' * 100_000, 'is damaged or cut short'),
    ('vocab.txt', 'café\n'.encode('latin-1'), r'not UTF-8 \(line 1, likely cp1252\)'),
    ('vocab.txt', '\n'.join(WORDS).encode('utf-16'), 'not UTF-8 .*utf-16'),
    ('vocab.txt', b'version https://git-lfs.github.com/spec/v1\n', 'git-lfs pointer'),
    ('vocab.txt', b'', 'is empty'), ('vocab.txt', '\n'.join(WORDS).encode() + b'\0\0', 'zeros'),
    ('vocab.txt', '\n'.join([*SPECIAL, 'mö']).encode()[:-1], 'is cut short'), ('vocab.txt', b'{"[PAD]": 0}', 'holds JSON'),
    ('vocab.txt', '\n'.join([*WORDS, 'a']).encode(), "there twice: \\['a'\\]"),
    ('tokenizer_config.json', b'{"do_lower', 'is damaged or cut short'),
])
def test_damaged_files_are_refused_by_name_in_one_line(tmp_path, name, content, words):
    write_words(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(Refusal, match=words) as refusal:
        tokenizer.load(tmp_path)
    assert str(tmp_path / name) in str(refusal.value) and '\n' not in str(refusal.value)


def test_what_is_no_vocabulary_is_refused_with_what_to_do(tmp_path):
    (tmp_path / 'linked').mkdir()
    (tmp_path / 'linked' / 'vocab.txt').symlink_to('nowhere')
    with pytest.raises(Refusal, match='linked/vocab.txt is a link to nowhere, which is not there'):
        tokenizer.load(tmp_path / 'linked')
    with pytest.raises(Refusal, match='no vocabulary at .*missing: name a vocab.txt'):
        tokenizer.load(tmp_path / 'missing')
    (tmp_path / 'vocab.json').write_text('{"[PAD]": 0, "[UNK]": 1}')
    with pytest.raises(Refusal, match='vocab.json .*only words and their ids'):
        tokenizer.load(tmp_path / 'vocab.json')
    (tmp_path / 'merges.txt').touch()
    with pytest.raises(Refusal, match=r'merges.txt, vocab.json .*save_pretrained'):
        tokenizer.load(tmp_path)


def test_windows_line_ends_and_marks_are_no_part_of_words(tmp_path):
    (tmp_path / 'vocab.txt').write_bytes(b'\xef\xbb\xbf' + '\r\n'.join(WORDS).encode())
    assert list(tokenizer.load(tmp_path).tokens) == WORDS

"""Vocabularies: trained the same everywhere, keeping what scripts need, saved and loaded whole."""

import pickle
import subprocess
import sys
import unicodedata

import numpy as np
import pytest

from pkm_jax.data import tokenizer
from pkm_jax.data import vocabulary as vocabularies
from pkm_jax.data.vocabulary import SpecialTokens, Vocabulary, word_pieces
from pkm_jax.refusal import Refusal

SPECIAL = ('[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]')


def test_special_tokens_come_first_and_words_are_split_into_pieces(paragraphs):
    vocabulary = vocabularies.train(paragraphs, 200)
    assert vocabulary.tokens[:5] == SPECIAL
    assert [vocabulary.pad_id, vocabulary.unk_id, vocabulary.cls_id, vocabulary.sep_id,
            vocabulary.mask_id] == [0, 1, 2, 3, 4]
    assert len(vocabulary.tokens) == 200
    encoding = vocabulary.tokenizer().encode('The Unforgettable writers.', add_special_tokens=False)
    assert ''.join(encoding.tokens).replace('##', '') == 'theunforgettablewriters.'
    np.testing.assert_array_equal(vocabulary.continuation[encoding.ids],
                                  [token.startswith('##') for token in encoding.tokens])
    assert vocabulary.special.sum() == 5 and len(vocabulary.ordinary_ids) == 195


@pytest.mark.slow
def test_training_is_repeatable_in_another_process(paragraphs, text_file):
    script = ('import sys; from pkm_jax.data import vocabulary; '
              'print(vocabulary.train(open(sys.argv[1]), 300, log=lambda line: None).tokens)')
    other = subprocess.run([sys.executable, '-c', script, str(text_file)], check=True,
                           capture_output=True, text=True)
    assert other.stdout.strip() == str(vocabularies.train(paragraphs, 300).tokens)


def test_cased_vocabularies_keep_capitals(paragraphs):
    cased = vocabularies.train(paragraphs, 200, lowercase=False)
    uncased = vocabularies.train(paragraphs, 200, lowercase=True)
    assert cased.tokenizer().encode('N', add_special_tokens=False).tokens == ['N']
    assert uncased.tokenizer().encode('N', add_special_tokens=False).tokens == ['n']


@pytest.mark.parametrize('text', [
    'में हिन्दी की किताब', 'ที่ น้ำ', 'ガラス か が ハン パン', 'schön schon möchte mochte', 'tiếng Việt',
    'বাংলা ভাষায়', 'שָׁלוֹם', 'مُحَمَّد', 'தமிழ் மொழி', 'ខ្មែរ', 'žluťoučký kůň', '한국어 기억'])
def test_a_trained_vocabulary_keeps_the_marks_of_every_script(text):
    vocabulary = vocabularies.train([f'{text} {n}' for n in range(400)], 400)
    for form in ('NFC', 'NFD'):     # composed or not, it is the same text
        encoding = vocabulary.tokenizer().encode(unicodedata.normalize(form, text),
                                                 add_special_tokens=False)
        assert ' '.join(encoding.tokens).replace(' ##', '') == unicodedata.normalize(
            'NFC', text.lower())


def test_accents_are_dropped_on_request_and_that_is_said():
    lines = []
    vocabulary = vocabularies.train(['schön schon'] * 9, 50, strip_accents=True, log=lines.append)
    assert vocabulary.tokenizer().encode('schön', add_special_tokens=False).tokens == ['schon']
    assert 'accents and vowel signs dropped (data.strip_accents)' in lines[0]


def test_a_script_of_many_characters_keeps_nearly_all_of_them():
    characters = [chr(0x4e00 + n) for n in range(3_000)]
    text = [' '.join(characters[n:n + 50]) for n in range(0, 3_000, 50)]
    vocabulary = vocabularies.train(text, 30_000)
    assert sum(character in vocabulary.ids for character in characters) > 2_990


def test_sizes_asked_for_and_obtained_are_reported(paragraphs):
    lines = []
    vocabulary = vocabularies.train(paragraphs, 50_000, log=lines.append)
    assert len(vocabulary.tokens) < 50_000
    assert f'{len(vocabulary.tokens):,} tokens of 50,000 asked for' in lines[-1]
    assert 'too small' in lines[-1]
    with pytest.raises(Refusal, match='a vocabulary of 20 tokens cannot hold'):
        vocabularies.train(paragraphs, 20)


def test_a_large_corpus_is_sampled_evenly_and_repeatably():
    sample = vocabularies._sample((str(number) for number in range(10_000)), 1_000)
    assert sample == vocabularies._sample((str(number) for number in range(10_000)), 1_000)
    assert len(set(sample)) == 1_000
    assert abs(np.mean([int(number) for number in sample]) - 5_000) < 4 * 2_887 / 1_000 ** 0.5


def test_a_long_document_is_sampled_in_parts():
    words = [f'word{n}' for n in range(10_000)]
    sample = vocabularies._sample([' '.join(words)], 100)
    assert ' '.join(sample).split() == words
    assert max(map(len, sample)) <= vocabularies.LONGEST_SAMPLE


def test_vocabularies_are_saved_and_loaded_whole(tmp_path, paragraphs):
    vocabulary = vocabularies.train(paragraphs, 200)
    vocabulary.save(tmp_path)
    assert tokenizer.load(tmp_path) == vocabulary
    assert tokenizer.load(tmp_path / 'vocab.txt') == vocabulary
    assert tokenizer.load(tmp_path / 'tokenizer.json') == vocabulary
    assert (tmp_path / 'vocab.txt').read_text().split('\n') == [*vocabulary.tokens, '']
    assert pickle.loads(pickle.dumps(vocabulary)) == vocabulary


def test_names_of_special_tokens_in_a_text_are_text():
    vocabulary = word_pieces((*SPECIAL, 'a', '[', ']', 'mask', 'MASK'), lowercase=False)
    assert vocabulary.tokenizer().encode('a [MASK]', add_special_tokens=False).tokens == [
        'a', '[', 'MASK', ']']


def test_unusable_vocabularies_are_refused():
    with pytest.raises(Refusal, match=r'lacks \[CLS\] \(cls\), \[MASK\] \(mask\)'):
        word_pieces(('[PAD]', '[UNK]', '[SEP]', 'a'))
    with pytest.raises(Refusal, match=r'lacks \[UNK\]'):
        word_pieces(('[PAD]', '[CLS]', '[MASK]', '[SEP]', 'a'))
    with pytest.raises(Refusal, match="1 of its tokens are there twice: \\['a'\\]"):
        word_pieces((*SPECIAL, 'a', 'a'))
    with pytest.raises(Refusal, match='does not read it'):
        Vocabulary('{}', SpecialTokens())

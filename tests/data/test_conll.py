"""Words and labels in columns, and what is said of those that cannot be used."""

import pytest

from pkm_jax.data.conll import read_conll
from pkm_jax.refusal import Refusal


def read(tmp_path, content, word=0, label=-1):
    (tmp_path / 'a.txt').write_text(content)
    return read_conll(str(tmp_path / 'a.txt'), word, label)


def test_sentences_of_2003(tmp_path):
    found = read(tmp_path, '-DOCSTART- -X- O O\n\nEU NNP I-NP B-ORG\nrejects VBZ I-VP O\n\n\n'
                           'Peter NNP I-NP B-PER\n')
    assert [one.words for one in found] == [['EU', 'rejects'], ['Peter']]
    assert [one.labels for one in found] == [['B-ORG', 'O'], ['B-PER']]
    assert found[0].place(1).endswith('a.txt, line 4') and found[1].place(0).endswith('line 7')


def test_columns_of_tabs_may_hold_spaces(tmp_path):
    one, = read(tmp_path, '1\tNew York\tB-LOC\n2\ta\u00a0b\tO\n', word=1)
    assert one.words == ['New York', 'a\u00a0b']


@pytest.mark.parametrize('content, word, message', [
    ('', 0, 'a.txt holds no words'), ('\n\n', 0, 'a.txt holds no words'),
    ('a O\n\nb\n', 0, 'a.txt, line 3 has 1 columns, where the first line has 2'),
    ('a O\nb O O\n', 0, 'a.txt, line 2 has 3 columns'),
    ('a\nb\n', 0, 'a.txt, line 1 has 1 columns, of which .* the label is missing'),
    ('a O\n', 2, 'data.word_column = 2 is none of them'),
])
def test_what_cannot_be_used_is_named_with_its_line(tmp_path, content, word, message):
    with pytest.raises(Refusal, match=message):
        read(tmp_path, content, word)

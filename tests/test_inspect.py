"""The page and the arrays of an inspection, from a run's folder to files."""

import json
import re

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pkm_jax import inspect
from pkm_jax.inspection.words import KINDS
from pkm_jax.prediction.trained import open_trained
from tests.prediction.conftest import folder_of  # noqa: F401

TEXTS = ['a b c .', 'A <bx> 7', 'a a a d', 'y']


@pytest.fixture(scope='module')
def looked(folder_of, tmp_path_factory):  # noqa: F811
    """The folder of an inspection, and the model."""
    folder = tmp_path_factory.mktemp('look')
    (folder / 'texts.txt').write_text('\n'.join(TEXTS))
    inspect.main([folder_of('bert'), f'--file={folder / "texts.txt"}', f'--to={folder}',
                  '--texts_shown=2', '--slots_shown=10', '--batch=3'])
    return folder, open_trained(folder_of('bert'))


def test_arrays_hold_the_reads_of_the_model(looked):
    folder, trained = looked
    arrays = np.load(folder / 'slots.npz')
    model, ids = nnx.merge(trained.graph, *trained.state), trained.vocabulary.ids
    tokens = jnp.array([[ids[word] for word in ['[CLS]', *TEXTS[0].split(), '[SEP]']]])
    _, reads = model(tokens, jnp.zeros_like(tokens), jnp.array([6]))
    shown = arrays['shown_texts'] == 0
    np.testing.assert_array_equal(arrays['shown_tokens'][shown], tokens[0])
    np.testing.assert_array_equal(arrays['shown_slots_1'][shown], reads[1].slots)
    np.testing.assert_allclose(arrays['shown_weights_1'][shown], reads[1].weights, atol=1e-5)
    tokens_of_all = 6 + 8 + 6 + 3       # 'bx' is two
    assert arrays['selected_1'].sum() == tokens_of_all * 2 * 3
    assert arrays['mass_1'].sum() == pytest.approx(tokens_of_all * 2)
    assert arrays['pair_weights_1'].sum() == pytest.approx(tokens_of_all * 2)
    words = arrays['words'].tolist()
    assert arrays['word_counts'][words.index('a')] == 4
    assert arrays['kinds'][arrays['word_kinds'][words.index('bx')]] == 'in pieces'


def test_the_page_holds_its_texts_and_slots_and_needs_no_other_file(looked):
    folder, _ = looked
    page = (folder / 'inspect.html').read_text()
    assert not re.search(r'(src|href)=|https?://(?!www\.w3\.org/2000/svg)|@import|url\(', page)
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page)[1]
    assert '<' not in found     # no text can end the script
    data = json.loads(found)
    assert data['texts'] == 4 and data['lens'] and len(data['shown']) == 2
    shown = ''.join(gap + word for gap, word, kind, _ in data['shown'][1]
                    if KINDS[kind] != 'special')
    assert shown == TEXTS[1]
    layer, = data['layers']
    assert len(layer['slots']) == 10 and layer['exact']
    for known in layer['slots'].values():
        assert len(known['lens']) == 10 and known['selected'] > 0
        assert sum(share for _, share in known['words']) <= 1.001
        assert sum(known['kinds']) == pytest.approx(1, abs=1e-3)
    weights = [weight for _, weight in data['shown'][0][1][3][0][0]]
    assert weights == sorted(weights, reverse=True) and sum(weights) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize('arguments, words', [
    (['plain', 'a'], 'has no memory to look into'),
    (['bert', '--batch=0', 'a'], '--batch=0 must be 1 or more'),
    (['bert', '--file=nowhere.txt'], 'nowhere.txt cannot be read'),
])
def test_what_cannot_be_looked_at_is_named(folder_of, arguments, words):  # noqa: F811
    with pytest.raises(SystemExit, match=f'Not inspected: .*{words}'):
        inspect.main([folder_of(arguments[0]), *arguments[1:]])


def test_no_text_is_refused(folder_of, tmp_path):  # noqa: F811
    (tmp_path / 'empty.txt').write_text('\n')
    with pytest.raises(SystemExit, match='There is no text to read'):
        inspect.main([folder_of('bert'), f'--file={tmp_path / "empty.txt"}'])

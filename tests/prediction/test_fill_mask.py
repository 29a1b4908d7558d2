"""Words for masks are those of the model's own head."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pkm_jax.prediction.fill_mask import FillMask
from pkm_jax.prediction.texts import Text
from pkm_jax.prediction.trained import open_trained
from pkm_jax.refusal import Refusal


def texts(*contents):
    return [Text((content,), f'line {number}') for number, content in enumerate(contents, 1)]


@nnx.jit
def shares_of(model, tokens, places):
    states, _ = model(tokens, jnp.zeros_like(tokens), jnp.array([tokens.shape[1]]))
    return jax.nn.softmax(model.mlm_logits(states, places))[0]


@pytest.mark.parametrize('kind', ['bert', pytest.param('plain', marks=pytest.mark.slow)])
def test_scores_are_the_probabilities_of_the_head(folder_of, kind):
    trained = open_trained(folder_of(kind))
    given = texts('a b [MASK] c', '[MASK] . [MASK]', 'a ' * 30 + '[MASK]')
    found = list(FillMask(trained, top_k=3)(given, rows=2))
    assert [len(result['masks']) for result in found] == [1, 2, 1]
    model, ids = nnx.merge(trained.graph, *trained.state), trained.vocabulary.ids
    for text, result in zip(given, found):
        tokens = jnp.array([[ids[word] for word in ['[CLS]', *text.content.split(), '[SEP]']]])
        places = np.flatnonzero(tokens[0] == ids['[MASK]'])
        shares = shares_of(model, tokens, jnp.asarray(places[None]))
        for own, mask in zip(np.asarray(shares), result['masks']):
            best = np.argsort(-own)[:3]
            assert [entry['word'] for entry in mask] == [
                trained.vocabulary.tokens[word] for word in best]
            np.testing.assert_allclose([entry['score'] for entry in mask], own[best], rtol=2e-5)


@pytest.mark.parametrize('kind, content, words', [
    ('plain', 'a b', r'line 1 has no \[MASK\] to fill'),
    ('plain', 'a ' * 50 + '[MASK]', r'line 1 has a \[MASK\] beyond the 48 tokens'),
    ('encoder', '[MASK]', 'has no MLM head'),
    ('causal', '[MASK]', 'has no MLM head'),
])
def test_what_cannot_be_filled_is_refused(folder_of, kind, content, words):
    with pytest.raises(Refusal, match=words):
        list(FillMask(open_trained(folder_of(kind)), top_k=2)(texts(content), rows=1))


def test_texts_that_are_cut_off_are_counted(folder_of):
    fill = FillMask(open_trained(folder_of('plain')), top_k=1)
    list(fill(texts('[MASK] ' + 'a ' * 60, '[MASK]'), rows=2))
    assert fill.tally.truncated == 1 and fill.tally.tokens == 48 + 3

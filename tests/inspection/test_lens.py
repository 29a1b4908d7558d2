"""The words that a value row points to are those of the last norm and the head, by hand."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pkm_jax.inspection.lens import has_lens, words_of_rows
from pkm_jax.models.interface import at
from pkm_jax.prediction.trained import open_trained


@pytest.mark.parametrize('kind', ['bert', 'causal'])
def test_rows_go_through_the_last_norm_and_the_head(folder_of, kind):
    trained = open_trained(folder_of(kind))
    slots = np.array([3, 0, 15])
    found = words_of_rows(trained, 1, slots, 5)
    model = nnx.merge(trained.graph, *trained.state)
    rows = np.asarray(at(trained.state[0], trained.config.memories[1].table))[slots]
    norm = model.layers[-1].output_norm if kind == 'bert' else model.norm
    centred = rows - rows.mean(1, keepdims=True)
    normed = centred / np.sqrt(rows.var(1, keepdims=True) + 1e-12)
    states = jnp.asarray(normed * np.asarray(norm.scale[...]) + np.asarray(norm.bias[...]))[None]
    logits = (model.mlm(states, model.embeddings.word) if kind == 'bert'
              else model.logits(states))[0]
    np.testing.assert_array_equal(found, np.argsort(-np.asarray(logits), axis=1)[:, :5])


def test_a_model_without_a_head_over_words_has_none(folder_of):
    assert not has_lens(open_trained(folder_of('encoder')))
    assert has_lens(open_trained(folder_of('causal')))

"""A cache of keys and values changes nothing of what a decoder computes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pkm_jax.models.causal import Causal
from tests.models.test_causal import ADD, LENGTHS, tokens

BATCH_NORM = dataclasses.replace(ADD.memory, query_norm='batch')


@pytest.mark.parametrize('config', [
    dataclasses.replace(ADD, memory=BATCH_NORM),
    dataclasses.replace(ADD, placement='replace', positions='learned', zero_start=True),
])
def test_states_of_every_position_are_those_without_a_cache(config):
    """A prompt of 4 tokens in one row and 2 in the other, then a token at a time."""
    model = Causal(config, nnx.Rngs(0))
    for block in model.layers:
        if block.memory is not None:
            block.memory.update_batch_stats(jax.tree.map(
                lambda a: a + .3, nnx.to_pure_dict(nnx.state(block.memory, nnx.BatchStat)).get(
                    'query_norm', {})))
            if block.memory_scale is not None:
                block.memory_scale[...] = jnp.float32(.7)
    whole, _ = nnx.jit(lambda model, tokens: model(tokens, LENGTHS))(model, tokens())
    prompts = jnp.array([4, 2])
    extend = nnx.jit(lambda model, *given: model.extend(*given))
    states, past = extend(model, tokens()[:, :4], jnp.tile(jnp.arange(4), (2, 1)),
                          model.empty_past(2))
    found = [np.asarray(states)[0], np.asarray(states)[1, :2]]
    for place in range(4):
        positions = prompts[:, None] + place
        one, past = extend(model, jnp.take_along_axis(tokens(), positions, 1), positions, past)
        found = [np.concatenate([row, new]) for row, new in zip(found, np.asarray(one))]
    for row, states, length in zip(found, np.asarray(whole), [8, 6]):
        np.testing.assert_allclose(row, states[:length], atol=2e-6)
        np.testing.assert_allclose(
            model.logits(jnp.asarray(row[None])), model.logits(jnp.asarray(states[None, :length])),
            atol=2e-6)

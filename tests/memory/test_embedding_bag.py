"""The read and its gradients against NumPy in float64, and its memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pkm_jax.memory import embedding_bag as bag
from pkm_jax.memory.embedding_bag import compact_gradients, embedding_bag


def draw(seed, n_slots=11, width=5, tokens=7, reads=6, same_slot=False):
    rng = np.random.default_rng(seed)
    slots = np.full((tokens, reads), 3) if same_slot else rng.integers(0, n_slots, (tokens, reads))
    return (jnp.asarray(rng.normal(size=(n_slots, width)), jnp.float32),
            jnp.asarray(slots, jnp.int32),
            jnp.asarray(rng.normal(size=(tokens, reads)), jnp.float32),
            jnp.asarray(rng.normal(size=(tokens, width)), jnp.float32))


def expected(values, slots, weights, gradient):
    """Result, gradient of the values and gradient of the weights, in float64."""
    values, weights, gradient = (np.asarray(a, np.float64) for a in (values, weights, gradient))
    rows = values[slots]
    d_values = np.zeros_like(values)
    np.add.at(d_values, np.asarray(slots), weights[..., None] * gradient[:, None])
    return (np.einsum('trv,tr->tv', rows, weights), d_values,
            np.einsum('trv,tv->tr', rows, gradient))


@pytest.mark.parametrize('seed', range(3))
@pytest.mark.parametrize('same_slot', [False, True])
@pytest.mark.parametrize('dtype, tolerance', [(jnp.float32, 1e-5), (jnp.bfloat16, 1e-2)])
def test_values_and_gradients(seed, same_slot, dtype, tolerance):
    values, slots, weights, gradient = draw(seed, same_slot=same_slot)
    values, gradient = values.astype(dtype), gradient.astype(dtype)
    result, pull = jax.vjp(lambda v, w: embedding_bag(v, slots, w), values, weights)
    for ours, theirs in zip((result, *pull(gradient)), expected(values, slots, weights, gradient)):
        np.testing.assert_allclose(np.asarray(ours, np.float64), theirs, atol=tolerance * 10,
                                   rtol=tolerance)


def test_zero_weights_contribute_nothing():
    values, slots, weights, gradient = draw(4)
    weights = weights.at[3:].set(0)
    result, pull = jax.vjp(lambda v: embedding_bag(v, slots, weights), values)
    np.testing.assert_array_equal(result[3:], 0)
    np.testing.assert_array_equal(pull(gradient)[0], pull(gradient.at[3:].set(100.))[0])


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_temporaries_stay_under_an_eighth_of_the_gathered_rows(dtype):
    """T = 4,096, H·K = 128, V = 768: forward and backward, as compiled."""
    tokens, reads, width, n_slots = 4096, 128, 768, 256
    arguments = (jax.ShapeDtypeStruct((n_slots, width), dtype),
                 jax.ShapeDtypeStruct((tokens, reads), jnp.int32),
                 jax.ShapeDtypeStruct((tokens, reads), jnp.float32))

    def loss(values, slots, weights):
        return jnp.sum(embedding_bag(values, slots, weights).astype(jnp.float32) ** 2)

    compiled = jax.jit(jax.value_and_grad(loss, (0, 2))).lower(*arguments).compile()
    gathered = tokens * reads * width * jnp.dtype(dtype).itemsize
    assert compiled.memory_analysis().temp_size_in_bytes < gathered / 8


def test_tokens_in_blocks_give_what_they_give_together(monkeypatch):
    """Seven tokens in blocks of three, two and two: result and gradients, dense and compact."""
    values, slots, weights, gradient = draw(5)

    def results():
        result, pull = jax.vjp(lambda v, w: embedding_bag(v, slots, w, implementation='xla'), values, weights)
        rows, by_read = compact_gradients(values, slots, weights, gradient,
                                          implementation='xla')
        return result, *pull(gradient), *rows, by_read

    together = results()
    monkeypatch.setattr(bag, 'BLOCK', 3)
    for ours, theirs in zip(results(), together, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6)

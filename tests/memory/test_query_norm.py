"""Batch norm of queries: the derivative written by hand against that of the formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pkm_jax.memory.query_norm import batch_normed

EPSILON = 1e-5


def formula(query, real, scale, bias):
    """Normed with the statistics of the real tokens, all derivatives left to jax."""
    weight = real.astype(jnp.float32)[:, None, None, None]
    weight = weight / jnp.maximum(jnp.sum(weight), 1)
    mean = jnp.sum(query * weight, axis=0)
    var = jnp.sum(jnp.square(query - mean[None]) * weight, axis=0)
    return (query - mean[None]) / jnp.sqrt(var + EPSILON)[None] * scale[None] + bias[None]


@pytest.mark.parametrize('real', [[1] * 6, [1, 1, 0, 1, 0, 1], [0, 0, 1, 0, 0, 0], [0] * 6])
def test_values_and_gradients_of_the_formula(real):
    """Tokens that are not real change no statistic; where none is real, nor does any other."""
    rng = np.random.default_rng(0)
    query, gradient = (jnp.asarray(rng.normal(3, 2, (6, 2, 2, 4)), jnp.float32) for _ in range(2))
    scale, bias = (jnp.asarray(rng.normal(size=(2, 2, 4)), jnp.float32) for _ in range(2))
    real = jnp.asarray(real, bool)
    want, want_pull = jax.vjp(lambda *a: formula(a[0], real, *a[1:]), query, scale, bias)
    (got, mean, var), got_pull = jax.vjp(
        lambda *a: batch_normed(a[0], real, *a[1:], EPSILON), query, scale, bias)
    size = np.abs(want).max()
    np.testing.assert_allclose(got, want, atol=2e-6 * size)
    for one, other in zip(got_pull((gradient, jnp.zeros_like(mean), jnp.zeros_like(var))),
                          want_pull(gradient)):
        np.testing.assert_allclose(one, other, atol=2e-5 * np.abs(other).max())
    if real.any():
        chosen = np.asarray(query)[np.asarray(real)]
        np.testing.assert_allclose(mean, chosen.mean(0), rtol=1e-5)
        np.testing.assert_allclose(var, chosen.var(0), rtol=1e-4, atol=1e-6)


def test_bfloat16_queries_are_normed_in_float32():
    rng = np.random.default_rng(0)
    query = jnp.asarray(rng.normal(30, .1, (64, 1, 2, 4)), jnp.bfloat16)
    ones, zeros = jnp.ones((1, 2, 4)), jnp.zeros((1, 2, 4))
    got, mean, _ = batch_normed(query, jnp.ones(64, bool), ones, zeros, EPSILON)
    want = formula(query.astype(jnp.float32), jnp.ones(64, bool), ones, zeros)
    assert got.dtype == jnp.bfloat16 and mean.dtype == jnp.float32
    np.testing.assert_allclose(got.astype(jnp.float32), want, rtol=1e-2, atol=1e-2)

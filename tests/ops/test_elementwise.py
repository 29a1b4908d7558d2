"""Operations with derivatives written by hand, against those of plain formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pkm_jax.ops.elementwise import gelu, logits, split_qkv


def close(got, want, dtype):
    got, want = (np.asarray(x, np.float64) for x in (got, want))
    np.testing.assert_allclose(got, want, **dict(
        float32=dict(rtol=2e-6, atol=1e-6), bfloat16=dict(rtol=1e-2, atol=1e-2))[dtype])


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_gelu_and_its_slope(dtype):
    x = jnp.asarray(np.linspace(-12, 12, 481), dtype)
    wide = np.asarray(x, np.float32)
    cdf = np.asarray(jax.scipy.stats.norm.cdf(wide))
    close(gelu(x), wide * cdf, dtype)
    slope = jax.vmap(jax.grad(gelu))(x)
    assert slope.dtype == x.dtype
    close(slope, cdf + wide * np.asarray(jax.scipy.stats.norm.pdf(wide)), dtype)


@pytest.mark.parametrize('vocab', [50, 128, 130])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_logits_and_their_gradients(vocab, dtype):
    rng = np.random.default_rng(vocab)
    states = jnp.asarray(rng.normal(size=(2, 3, 16)), dtype)
    decoder = jnp.asarray(rng.normal(size=(vocab, 16)), dtype)
    bias = jnp.asarray(rng.normal(size=vocab), jnp.float32)
    gradient = jnp.asarray(rng.normal(size=(2, 3, vocab)), jnp.float32)
    out, pull = jax.vjp(logits, states, decoder, bias)
    assert out.dtype == jnp.float32 and out.shape == (2, 3, vocab)
    s, d, b, g = (np.asarray(x, np.float64) for x in (states, decoder, bias, gradient))
    np.testing.assert_allclose(out, s @ d.T + b, rtol=1e-5, atol=1e-5)
    wanted = g @ d, np.einsum('bpv,bpd->vd', g, s), g.sum((0, 1))
    for got, want in zip(pull(gradient), wanted):
        error = np.linalg.norm(np.asarray(got, np.float64) - want) / np.linalg.norm(want)
        assert got.shape == want.shape
        assert error < dict(float32=1e-6, bfloat16=5e-3)[dtype]


def test_parts_of_qkv_are_put_together_again():
    x = jnp.arange(24.).reshape(1, 2, 12)
    first, second, third = split_qkv(x)
    np.testing.assert_array_equal(jnp.concatenate([first, second, third], axis=-1), x)
    by_x, = jax.vjp(split_qkv, x)[1]([first * 2, second * 3, third * 5])
    np.testing.assert_array_equal(by_x, x * np.repeat(np.float32([2, 3, 5]), 4)[None, None])

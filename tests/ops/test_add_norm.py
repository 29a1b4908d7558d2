"""The end of a block: reference and kernel (interpreted) against float64, and each other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pkm_jax.mesh import Shards, make_mesh
from pkm_jax.ops.add_norm import add_norm, add_norm_of_part
from pkm_jax.ops.dropout import keep_mask
from pkm_jax.ops.gpu import add_norm as kernel

WORDS, EPSILON = jnp.array([5, 2 ** 31 + 9], jnp.uint32), 1e-12
LIMIT = {'float32': 2e-6, 'bfloat16': 5e-3}


def make(tokens, width, dtype, residual_dtype=None, seed=0):
    """Residual, branch, its bias, scale, bias, gradient of the result."""
    rng = np.random.default_rng(seed)
    residual, branch, gradient = (rng.normal(1, 2, (tokens, width)) for _ in range(3))
    return (jnp.asarray(residual, residual_dtype or dtype), jnp.asarray(branch, dtype),
            *(jnp.asarray(rng.normal(size=width), jnp.float32) for _ in range(3)),
            jnp.asarray(gradient, dtype))


def expected(residual, branch, branch_bias, scale, bias, gradient, keep, rate):
    """Result and gradients in float64, the derivative written out."""
    residual, branch, branch_bias, scale, bias, gradient = (
        np.asarray(x, np.float64) for x in (residual, branch, branch_bias, scale, bias, gradient))
    factor = np.where(keep, 1 / (1 - rate), 0)
    total = residual + factor * (branch + branch_bias)
    deviation = np.sqrt(total.var(-1, keepdims=True) + EPSILON)
    normed = (total - total.mean(-1, keepdims=True)) / deviation
    scaled = gradient * scale
    by_total = (scaled - scaled.mean(-1, keepdims=True)
                - normed * (scaled * normed).mean(-1, keepdims=True)) / deviation
    by_branch = factor * by_total
    return (normed * scale + bias, by_total, by_branch, by_branch.sum(0),
            (gradient * normed).sum(0), gradient.sum(0))


def run(implementation, arguments, part, rate):
    out, pull = jax.vjp(lambda *a: add_norm_of_part(*a, WORDS, jnp.int32(part), rate, EPSILON,
                                                    implementation), *arguments[:5])
    return out, *pull(arguments[5])


def error(got, want):
    got = np.asarray(got, np.float64)
    return np.linalg.norm(got - want) / np.linalg.norm(want)


@pytest.mark.parametrize('implementation', ['xla', 'gpu'])
@pytest.mark.parametrize('tokens, width, dtype, rate, part', [
    (40, 384, 'float32', 0.5, 2), (8, 128, 'float32', 0., 0), (20, 1024, 'bfloat16', 0.3, 1),
    pytest.param(12, 256, 'float32', 0.1, 0, marks=pytest.mark.slow),
    pytest.param(12, 768, 'bfloat16', 0.1, 3, marks=pytest.mark.slow)])
def test_agrees_with_float64(implementation, tokens, width, dtype, rate, part):
    arguments = make(tokens, width, dtype)
    keep = keep_mask(WORDS, part, tokens, width, rate) if rate else True
    got = run(implementation, arguments, part, rate)
    for name, one, want in zip(('out', 'residual', 'branch', 'branch bias', 'scale', 'bias'),
                               got, expected(*arguments, keep, rate)):
        assert error(one, want) < LIMIT[dtype], name
    assert [x.dtype for x in got[1:]] == [x.dtype for x in arguments[:5]]


def test_kernel_takes_a_float32_residual_beside_a_bfloat16_branch():
    arguments = make(8, 128, 'bfloat16', residual_dtype='float32')
    want = run('xla', arguments, 0, 0.1)
    for one, other in zip(run('gpu', arguments, 0, 0.1), want):
        assert one.dtype == other.dtype
        assert error(one, np.asarray(other, np.float64)) < LIMIT['bfloat16']


def test_rows_far_from_zero_keep_their_norm():
    """A mean of 1e3 beside a deviation of 1: the variance is that of centred numbers."""
    arguments = make(4, 256, 'float32')
    arguments = arguments[0] + 1e3, *arguments[1:]
    want = expected(*arguments, True, 0.)[0]
    assert error(run('gpu', arguments, 0, 0.)[0], want) < 1e-4


@pytest.mark.parametrize('shape, message', [
    ((8, 192), 'a width of 192'), ((8, 1152), 'a width of 1152'), ((6, 128), '6 tokens')])
def test_shapes_without_a_kernel_say_why(shape, message):
    def unsupported(shape):
        return kernel.unsupported(*[jax.ShapeDtypeStruct(shape, jnp.float32)] * 2, rate=0.,
                                  epsilon=EPSILON)

    assert message in unsupported(shape)
    assert unsupported((8, 768)) is None


@pytest.mark.parametrize('shards', [(8, 1, 1), (2, 2, 2)])
@pytest.mark.parametrize('implementation, length', [(None, 8), (None, 9), ('gpu', 8)])
def test_same_over_a_mesh_as_on_one_device(shards, implementation, length):
    """Values, masks and gradients of eight devices; those of the parameters are summed."""
    rng = np.random.default_rng(0)
    inputs, residual = (jnp.asarray(rng.normal(size=(8, length, n)), jnp.float32)
                        for n in (16, 128))
    norm, projection = nnx.LayerNorm(128, rngs=nnx.Rngs(0)), nnx.Linear(16, 128, rngs=nnx.Rngs(1))
    graph, params = nnx.split((norm, projection), nnx.Param)
    params = jax.tree.map(lambda x: x + .1, params)

    def loss(params, residual, inputs):
        norm, projection = nnx.merge(graph, params)
        out = add_norm(norm, residual, projection, inputs, 0.5, jax.random.key(1),
                       implementation=implementation)
        return jnp.sum(jnp.sin(out))

    differentiate = functools.partial(jax.jit(jax.value_and_grad(loss, (0, 1, 2))), params,
                                      residual, inputs)
    want = differentiate()
    with jax.set_mesh(make_mesh(Shards(*shards))):
        got = differentiate()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5), got, want)

"""Bfloat16 numbers carried two to a word."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pkm_jax.memory.kernels.gpu.pairs import join, multiply_add, pack, parts_of, unpack


@pytest.mark.parametrize('dtype', ['bfloat16', 'float32'])
def test_come_back_as_they_were(dtype):
    bits = {'bfloat16': jnp.uint16, 'float32': jnp.uint32}[dtype]
    special = jnp.asarray([0., -0., np.inf, -np.inf, np.nan, 1e-40, -1e-40, 3.3895e38], dtype)
    tile = jnp.concatenate([special, jax.random.normal(jax.random.key(0), 8, dtype)]).reshape(2, 8)
    parts = unpack(pack(tile))
    assert len(parts) == parts_of(dtype)
    assert {part.dtype for part in parts} == {jnp.dtype('float32')}
    back = join([part.astype(dtype) for part in parts])
    np.testing.assert_array_equal(*(jax.lax.bitcast_convert_type(x, bits) for x in (back, tile)))


def test_parts_are_the_neighbours():
    first, second = unpack(pack(jnp.arange(6, dtype=jnp.bfloat16)))
    np.testing.assert_array_equal(first, [0, 2, 4])
    np.testing.assert_array_equal(second, [1, 3, 5])


def test_multiply_add_broadcasts():
    a, b, c = jnp.asarray([[2.], [3.]]), jnp.asarray([5., 7.]), jnp.ones((2, 2))
    np.testing.assert_array_equal(multiply_add(a, b, c, interpret=True), [[11, 15], [16, 22]])

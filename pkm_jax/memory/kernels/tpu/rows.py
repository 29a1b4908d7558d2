"""How the kernels for TPUs see arrays: a table's rows as pieces of 128, tokens in whole tiles."""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int32, Shaped

LANES = 128
Interpret = bool | pltpu.InterpretParams    # the latter: copies at other times than they start


def as_rows(table: Float[Array, 'S V']) -> Float[Array, 'S pieces 128']:
    """The table with rows that a copy can fetch alone, V filled up with zeros to pieces of 128.

    A copy of the whole table in another layout, unless it is kept in this one.
    """
    table = whole_pieces(table)
    return table.reshape(len(table), -1, LANES)


def whole_pieces(array: Float[Array, '... n']) -> Float[Array, '... m']:
    """The array with zeros at the end of its last axis, up to a multiple of LANES."""
    return jnp.pad(array, (*((0, 0),) * (array.ndim - 1), (0, -array.shape[-1] % LANES)))


def padded_tokens(array: Shaped[Array, 'T ...'], tile: int, fill: int = 0) -> Array:
    """The array with a multiple of `tile` tokens."""
    padding = ((0, -len(array) % tile), *((0, 0) for _ in array.shape[1:]))
    return jnp.pad(array, padding, constant_values=fill)


def sum_lanes(
    products: Float[Array, 'reads pieces'], size: Int32[Array, ''] | int, lanes: int,
) -> Float[Array, 'rows {lanes}']:
    """The sum of each of the first `size` rows, zeros of the others, `lanes` of them to a row."""
    blocks = products.reshape(-1, lanes, products.shape[1])
    sums = jnp.concatenate([jnp.sum(block.T, axis=0, keepdims=True) for block in blocks])
    at = (jax.lax.broadcasted_iota(jnp.int32, sums.shape, 0) * lanes
          + jax.lax.broadcasted_iota(jnp.int32, sums.shape, 1))
    return jnp.where(at < size, sums, 0)

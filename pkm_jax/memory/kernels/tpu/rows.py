"""How the kernels for TPUs see rows: [S, V] as [S, V / 128, 128], one row to a copy."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

LANES = 128


def as_rows(table: Float[Array, 'S V']) -> Float[Array, 'S pieces 128']:
    """The table with rows that a copy can fetch alone, V filled up with zeros to pieces of 128.

    A copy of the whole table in another layout, unless it is kept in this one.
    """
    size, width = table.shape
    table = jnp.pad(table, ((0, 0), (0, -width % LANES)))
    return table.reshape(size, -1, LANES)


def padded_tokens(array: Shaped[Array, 'T ...'], tile: int, fill: int = 0) -> Array:
    """The array with a multiple of `tile` tokens."""
    padding = ((0, -len(array) % tile), *((0, 0) for _ in array.shape[1:]))
    return jnp.pad(array, padding, constant_values=fill)

"""Dropout whose mask depends on the key and on where an element is, not on device or layout."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.random import threefry2x32_p
from jaxtyping import Array, Bool, Float, Int32, Key, UInt32

LEVELS = 2 ** 16        # of the rate: 16 random bits decide on an element
HIGHEST_RATE = 1 - 1 / LEVELS   # above it a rate rounds to 1, and nothing would stay
DRAWS = 4               # rows, one below the other, that share the 64 bits of a Threefry block


def dropout(x: Array, rate: float, key: Key[Array, ''] | None) -> Array:
    """Inverted dropout; the identity without a key or with rate 0."""
    if key is None or not rate:
        return x
    wide = x.astype(jnp.float32).reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return drop(wide, words_of(key), 0, rate).reshape(x.shape).astype(x.dtype)


def split_key(key: Key[Array, ''] | None, count: int) -> Any:
    """`count` keys; as many Nones where `key` is None, so that nothing is dropped."""
    return [None] * count if key is None else jax.random.split(key, count)


def drop(
    x: Float[Array, 'rows columns'], words: UInt32[Array, '2'], part: Int32[Array, ''] | int,
    rate: float,
) -> Float[Array, 'rows columns']:
    """What `keep_mask` keeps of a part of a matrix, scaled to keep its mean."""
    rows, columns = x.shape
    return jnp.where(keep_mask(words, part, rows, columns, rate), x / (1 - rate), 0)


def words_of(key: Key[Array, '']) -> UInt32[Array, '2']:
    """What a mask takes of a key."""
    return jax.random.key_data(key)[:2]


def keep_mask(
    words: UInt32[Array, '2'], part: Int32[Array, ''] | int, rows: int, columns: int, rate: float,
) -> Bool[Array, '{rows} {columns}']:
    """Which elements stay of part number `part` of a matrix that is cut into parts of `rows` rows.

    Of the whole matrix, row i, column j stays if the 16 bits number i % DRAWS of Threefry-2x32
    (Salmon et al. 2011) of (i // DRAWS, j) are not below the rate. `jax.random` would spend a block
    on each element.
    """
    first = part * rows
    aligned = rows % DRAWS == 0     # and so is the first row, whichever part it is
    shape = (rows // DRAWS + (0 if aligned else 2), columns)
    group, column = (jax.lax.broadcasted_iota(jnp.uint32, shape, axis) for axis in range(2))
    group += jnp.uint32(first // DRAWS)
    keep = jnp.stack(stays(threefry2x32_p.bind(words[0], words[1], group, column), rate), axis=1)
    keep = keep.reshape(-1, columns)
    return keep if aligned else jax.lax.dynamic_slice_in_dim(keep, first % DRAWS, rows)


def stays(block: Sequence[Array], rate: float) -> list[Array]:
    """For each of DRAWS rows, whether its bits in the two words of a block say that it stays."""
    least = jnp.uint32(round(rate * LEVELS))
    return [part >= least for word in block for part in (word & 0xffff, word >> 16)]

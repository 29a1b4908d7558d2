"""Stochastic rounding of float32 numbers to bfloat16, the same on every layout of devices."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float, Int32, Key, UInt32


def round_stochastically(
    rows: Float[Array, 'rows V'], ids: Int32[Array, 'rows'], key: Key[Array, ''],
) -> BFloat16[Array, 'rows V']:
    """Float32 rows as bfloat16: up or down, so that the mean is the number that was rounded."""
    return round_rows(rows, ids, jax.random.bits(key, (2,)))


def round_rows(
    rows: Float[Array, 'rows V'], ids: Int32[Array, 'rows'], seed: UInt32[Array, '2'],
    first_column: Int32[Array, ''] | int = 0,
) -> BFloat16[Array, 'rows V']:
    """`round_stochastically` by what it takes of a key, of rows that begin with a column."""
    columns = jnp.arange(rows.shape[1], dtype=jnp.int32) + first_column
    return rounded(rows, noise(seed, ids[:, None], columns[None])).astype(jnp.bfloat16)


def noise(
    seed: Any, rows: Int32[Array, '...'], columns: Int32[Array, '...'],
) -> UInt32[Array, '...']:
    """16 random bits for each number, by two words of seed, its row and its column alone."""
    return hashed(seed, rows, columns) >> 16


def hashed(
    seed: Any, rows: Int32[Array, '...'], columns: Int32[Array, '...'],
) -> UInt32[Array, '...']:
    """`noise` of 32 bits."""
    rows, columns = rows.astype(jnp.uint32), columns.astype(jnp.uint32)
    return _mix(_mix(rows ^ seed[0]) ^ _mix(columns ^ seed[1]))


def rounded(numbers: Float[Array, '...'], bits: UInt32[Array, '...']) -> Float[Array, '...']:
    """Numbers that bfloat16 has, in float32: rounded up where those of 16 bits carry."""
    carried = jax.lax.bitcast_convert_type(numbers, jnp.uint32) + bits & jnp.uint32(0xFFFF0000)
    return jnp.where(jnp.isfinite(numbers), jax.lax.bitcast_convert_type(carried, jnp.float32),
                     numbers)


def _mix(x: UInt32[Array, '...']) -> UInt32[Array, '...']:
    """Scrambles 32 bits: the finaliser of MurmurHash3 (Appleby, public domain)."""
    x = (x ^ x >> 16) * jnp.uint32(0x85EBCA6B)
    x = (x ^ x >> 13) * jnp.uint32(0xC2B2AE35)
    return x ^ x >> 16

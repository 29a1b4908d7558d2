"""Float32 arithmetic on rows of bfloat16 that a loop of a Triton kernel carries.

Fetched bfloat16 numbers are carried two to a uint32, which is how they arrive in registers: carried
one by one they would be split and joined again in each step. Widening a pair takes two operations.
"""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, UInt32

from pkm_jax.ops.gpu import triton as plt


def pack(tile: Float[Array, '... n']) -> Array:
    """Bfloat16: neighbours as [..., n / 2] uint32, the first one low; float32: as it is."""
    if tile.dtype == jnp.float32:
        return tile
    bits = jax.lax.bitcast_convert_type(tile, jnp.uint16).reshape(*tile.shape[:-1], -1, 2)
    low, high = (half.astype(jnp.uint32) for half in jnp.unstack(bits, axis=-1))
    return low | high << 16


def unpack(packed: Float[Array, '... n'] | UInt32[Array, '... n']) -> list[Float[Array, '... n']]:
    """Float32 parts of what `pack` made: first and second neighbours, or all."""
    if packed.dtype == jnp.float32:
        return [packed]
    return [jax.lax.bitcast_convert_type(bits, jnp.float32)
            for bits in (packed << 16, packed & jnp.uint32(0xffff0000))]


def parts_of(dtype: DTypeLike) -> int:
    """How many parts `unpack` makes of a tile of `dtype`."""
    return 4 // jnp.dtype(dtype).itemsize


def join(parts: list[Array]) -> Array:
    """The tile whose first and second neighbours, or all numbers, are `parts`."""
    if len(parts) == 1:
        return parts[0]
    return jnp.stack(parts, axis=-1).reshape(*parts[0].shape[:-1], -1)


def multiply_add(
    a: Array, b: Array, c: Float[Array, '...'], *, interpret: bool,
) -> Float[Array, '...']:
    """a · b + c, a and b broadcast to c, float32; in one instruction (XLA would emit two)."""
    a, b = jnp.broadcast_to(a, c.shape), jnp.broadcast_to(b, c.shape)
    if interpret:
        return a * b + c
    result, = plt.elementwise_inline_asm(
        'fma.rn.f32 $0, $1, $2, $3;', args=[a, b, c], constraints='=f,f,f,f', pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(c.shape, jnp.float32)])
    return result

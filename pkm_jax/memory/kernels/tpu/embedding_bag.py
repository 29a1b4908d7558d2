"""Weighted sum of value rows on a TPU, in the place of the reference."""

import jax
import jax.numpy as jnp
from jax import ShapeDtypeStruct
from jaxtyping import Array, Float, Int32

from pkm_jax.memory.kernels.tpu.embedding_bag_backward import compact_gradients, dense_gradients
from pkm_jax.memory.kernels.tpu.embedding_bag_forward import sum_rows
from pkm_jax.memory.kernels.tpu.rows import Interpret
from pkm_jax.memory.sparse_rows import SparseRows

DTYPES = (jnp.float32, jnp.bfloat16)
MOST_TOKENS = 2 ** 28   # a number in scalar memory has three bits beside the token's
MOST_READS = 1024       # of a token: a tile of eight tokens is what scalar memory holds twice


def unsupported(
    values: ShapeDtypeStruct, slots: ShapeDtypeStruct, *_: ShapeDtypeStruct,
    elsewhere: bool = False,
) -> str | None:
    """Why the kernels cannot read this table with these slots; None if they can."""
    if values.dtype not in DTYPES:
        return f'values of {values.dtype} (float32 or bfloat16)'
    if slots.shape[1] > MOST_READS:
        return f'{slots.shape[1]} reads a token (at most {MOST_READS})'
    if slots.shape[0] > MOST_TOKENS or slots.size >= 2 ** 31:
        return f'{slots.size} reads of {slots.shape[0]} tokens (fewer than 2^31; at most 2^28)'
    return None


def forward(
    values: Float[Array, 'S V'], slots: Int32[Array, 'T R'], weights: Float[Array, 'T R'], *,
    elsewhere: bool = False, interpret: Interpret,
) -> Float[Array, 'T V']:
    """The sum, in the dtype of `values`; of reads that are mostly elsewhere a token's own alone."""
    if slots.shape[1] == 1 and not elsewhere:       # a gather
        rows = values[slots[:, 0]].astype(jnp.float32)
        return (rows * weights.astype(jnp.float32)).astype(values.dtype)
    if elsewhere:
        slots, weights, counts = _own_first(slots, weights, len(values))
    else:
        counts = jnp.full(len(slots), slots.shape[1], jnp.int32)
    return sum_rows(values, slots, weights, counts, interpret=interpret)


def backward(
    values: Float[Array, 'S V'], slots: Int32[Array, 'T R'], weights: Float[Array, 'T R'],
    gradient: Float[Array, 'T V'], *, elsewhere: bool = False, interpret: Interpret,
) -> tuple[Float[Array, 'S V'], Float[Array, 'T R']]:
    """Dense gradients of values, in their dtype, and of weights; deterministic."""
    return dense_gradients(values, slots, weights, gradient, interpret=interpret)


def compact_backward(
    values: Float[Array, 'S V'], slots: Int32[Array, 'T R'], weights: Float[Array, 'T R'],
    gradient: Float[Array, 'T V'], *, elsewhere: bool = False, interpret: Interpret,
) -> tuple[SparseRows, Float[Array, 'T R']]:
    """The rows of the values' gradient that were read, and the weights' gradient; deterministic."""
    return compact_gradients(values, slots, weights, gradient, interpret=interpret)


def _own_first(slots, weights, n_slots):
    """Slots and weights, each token's own first in their order, and how many there are; a token
    without any reads slot 0 with weight 0."""
    others, slots, weights = jax.lax.sort((slots == n_slots, slots, weights), num_keys=1)
    counts = jnp.sum(~others, axis=1, dtype=jnp.int32)
    return jnp.where(others, 0, slots), jnp.where(others, 0, weights), jnp.maximum(counts, 1)

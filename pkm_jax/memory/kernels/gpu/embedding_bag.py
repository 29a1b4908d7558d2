"""Weighted sum of value rows and its derivative on an NVIDIA GPU, in the place of the reference."""

import jax
import jax.numpy as jnp
from jax import ShapeDtypeStruct
from jaxtyping import Array, Float, Int32

from pkm_jax.memory.kernels import GPU_COLUMNS
from pkm_jax.memory.kernels.gpu.backend import reads_lack, uses_mosaic
from pkm_jax.memory.kernels.gpu.embedding_bag_backward import (
    cleared,
    dense_gradients,
    rows_that_were_read,
)
from pkm_jax.memory.kernels.gpu.embedding_bag_forward import sum_rows
from pkm_jax.memory.sparse_rows import SparseRows

DTYPES = (jnp.float32, jnp.bfloat16)


def unsupported(
    values: ShapeDtypeStruct, slots: ShapeDtypeStruct, *_: ShapeDtypeStruct,
    owners: int = 1, tokens: int = 0,
) -> str | None:
    """Why the kernels cannot read this table with these slots; None if they can."""
    if values.dtype not in DTYPES:
        return f'values of {values.dtype} (float32 or bfloat16)'
    if values.shape[1] % GPU_COLUMNS:
        return f'a value width of {values.shape[1]} (a multiple of {GPU_COLUMNS})'
    if slots.size >= 2**31:
        return f'{slots.size} reads (fewer than 2^31)'
    return reads_lack(values, slots)


def forward(
    values: Float[Array, 'S V'], slots: Int32[Array, 'T R'], weights: Float[Array, 'T R'], *,
    owners: int = 1, interpret: bool,
) -> Float[Array, 'T V']:
    """The sum, in the dtype of `values`."""
    slots, weights = _everywhere(values, slots, weights, owners)
    if slots.shape[1] == 1:     # a gather
        return (values[slots[:, 0]] * weights.astype(jnp.float32)).astype(values.dtype)
    if uses_mosaic(values, slots, interpret=interpret):
        from pkm_jax.memory.kernels.gpu import mosaic_forward
        return mosaic_forward.sum_rows(values, slots, weights, interpret=interpret)
    return sum_rows(values, slots, weights, interpret=interpret)


def backward(
    values: Float[Array, 'S V'], slots: Int32[Array, 'T R'], weights: Float[Array, 'T R'],
    gradient: Float[Array, 'T V'], *, owners: int = 1, interpret: bool,
) -> tuple[Float[Array, 'S V'], Float[Array, 'T R']]:
    """Dense gradients of values, in their dtype, and of weights; deterministic. With several owners
    slots of S are reads of others: they add nothing, and the gradients of their weights are 0."""
    table, by_read = dense_gradients(values, slots, weights, gradient,
                                     mosaic=uses_mosaic(values, slots, interpret=interpret),
                                     interpret=interpret)
    return table, jnp.where(slots < len(values), by_read, 0) if owners > 1 else by_read


def compact_backward(
    values: Float[Array, 'S V'], slots: Int32[Array, 'T R'], weights: Float[Array, 'T R'],
    gradient: Float[Array, 'T V'], first: Int32[Array, ''], *, owners: int = 1, tokens: int,
    interpret: bool,
) -> tuple[SparseRows, Float[Array, '{tokens} R']]:
    """The rows of the values' gradient that were read, rounded to the values' dtype; and the
    weights' gradient; deterministic."""
    n_slots, mosaic = len(values), uses_mosaic(values, slots, interpret=interpret)
    ids, rows, by_read = rows_that_were_read(
        values, slots, weights, gradient, mosaic=mosaic, interpret=interpret)
    # In their place: what reads rows may be a kernel, for which XLA would copy all.
    rows = cleared(rows, ids, n_slots, mosaic=mosaic, interpret=interpret)
    count = jnp.sum(ids < n_slots, dtype=jnp.int32)[None]
    return (SparseRows(ids, rows.astype(jnp.float32), count),
            jax.lax.dynamic_slice_in_dim(jnp.where(slots < n_slots, by_read, 0), first, tokens))


def _everywhere(values, slots, weights, owners):
    """Reads of slots that exist: the kernel makes those of other owners too, with weight 0."""
    if owners == 1:
        return slots, weights
    mine = slots < len(values)
    return jnp.where(mine, slots, 0), jnp.where(mine, weights, 0)

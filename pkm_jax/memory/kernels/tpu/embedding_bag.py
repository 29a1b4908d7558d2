"""Weighted sum of value rows on a TPU, in the place of the reference."""

import jax
import jax.numpy as jnp
from jax import ShapeDtypeStruct
from jaxtyping import Array, Float, Int32

from pkm_jax.accelerators import LANES
from pkm_jax.console import warn_once
from pkm_jax.memory.embedding_bag import marked, reference_backward
from pkm_jax.memory.kernels.tpu import (
    own_reads,
    sparsecore,
    sparsecore_backward,
    sparsecore_forward,
)
from pkm_jax.memory.kernels.tpu.embedding_bag_backward import (
    compact_gradients,
    dense_gradients,
    own_row_gradients,
)
from pkm_jax.memory.kernels.tpu.embedding_bag_forward import sum_rows, weight_gradients
from pkm_jax.memory.kernels.tpu.rows import Interpret
from pkm_jax.memory.sparse_rows import SparseRows, in_place

DTYPES = (jnp.float32, jnp.bfloat16)
MOST_TOKENS = 2 ** 28   # a number in scalar memory has three bits beside the token's
WIDEST = 16_384         # columns of a row; what has more the compiler works on for minutes, as it
WIDEST_TURNED = 4_096   # does on rows of no whole pieces, which are turned, above this (v4)
MOST_READS = 1024       # of a token: a tile of eight tokens is what scalar memory holds twice


def unsupported(
    values: ShapeDtypeStruct, slots: ShapeDtypeStruct, *_: ShapeDtypeStruct,
    owners: int = 1, tokens: int = 0,
) -> str | None:
    """Why the kernels cannot read this table with these slots; None if they can."""
    if values.dtype not in DTYPES:
        return f'values of {values.dtype} (float32 or bfloat16)'
    width = values.shape[1]
    if width > (WIDEST_TURNED if width % LANES else WIDEST):
        return (f'{width} columns (at most {WIDEST}, or {WIDEST_TURNED} that are no multiple of '
                f'{LANES})')
    if slots.shape[1] > MOST_READS:
        return f'{slots.shape[1]} reads a token (at most {MOST_READS})'
    if slots.shape[0] > MOST_TOKENS or slots.size >= 2 ** 31:
        return f'{slots.size} reads of {slots.shape[0]} tokens (fewer than 2^31; at most 2^28)'
    return None


def forward(
    values: Float[Array, 'S V'], slots: Int32[Array, 'T R'], weights: Float[Array, 'T R'], *,
    owners: int = 1, interpret: Interpret,
) -> Float[Array, 'T V']:
    """The sum, in the dtype of `values`; of several owners' reads a token's own alone."""
    if slots.shape[1] == 1 and owners == 1:       # a gather
        rows = values[slots[:, 0]].astype(jnp.float32)
        return (rows * weights.astype(jnp.float32)).astype(values.dtype)
    if owners > 1:
        slots, weights, _, counts = _own_first(slots, weights, len(values))
    else:
        counts = jnp.full(len(slots), slots.shape[1], jnp.int32)
    chip = _sparsecores('read', interpret, lambda chip: sparsecore_forward.unsupported(
        values, slots.shape[1], chip))
    if chip is not None:
        return sparsecore_forward.sum_rows(values, slots, weights, counts, chip=chip, owners=owners,
                                           interpret=interpret)
    return sum_rows(values, slots, weights, counts, owners=owners, interpret=interpret)


def _sparsecores(act, interpret, unsupported):
    """Those that are to do it, if any; see `sparsecore.SETTING`."""
    chip = sparsecore.chosen(interpret)
    if chip is None:
        return None
    reason = unsupported(chip)
    warn_once(__name__, '%s=1: %s.', sparsecore.SETTING,
              f'{reason}; the TensorCore does' if reason else f'the SparseCores {act}')
    return None if reason else chip


def backward(
    values: Float[Array, 'S V'], slots: Int32[Array, 'T R'], weights: Float[Array, 'T R'],
    gradient: Float[Array, 'T V'], *, owners: int = 1, interpret: Interpret,
) -> tuple[Float[Array, 'S V'], Float[Array, 'T R']]:
    """Dense gradients of values, in their dtype, and of weights; deterministic."""
    if slots.shape[1] == 1 and owners == 1:       # a scatter
        return reference_backward(values, slots, weights, gradient)
    return dense_gradients(values, slots, weights, gradient, interpret=interpret)


def compact_backward(
    values: Float[Array, 'S V'], slots: Int32[Array, 'T R'], weights: Float[Array, 'T R'],
    gradient: Float[Array, 'T V'], first: Int32[Array, ''], *, owners: int = 1, tokens: int,
    interpret: Interpret,
) -> tuple[SparseRows, Float[Array, '{tokens} R']]:
    """The rows of the values' gradient that were read, and the weights' gradient; deterministic."""
    n_slots = len(values)
    at_once = owners == 1 or slots.size < max(n_slots, own_reads.BLOCK * own_reads.LANES)
    n_rows = min(n_slots, slots.size) if at_once else n_slots
    chip = _sparsecores('add up compact gradients', interpret, lambda chip:
                        sparsecore_backward.unsupported(values, gradient, n_rows, chip))
    if at_once:
        rows, by_read = compact_gradients(values, slots, weights, gradient, interpret=interpret,
                                          chip=chip)
        return rows, jax.lax.dynamic_slice_in_dim(by_read, first, tokens)
    ids, count = in_place(marked(slots, n_slots, owners=owners))
    sums = own_row_gradients(slots, weights, gradient, n_slots, owners=owners, interpret=interpret,
                             chip=chip)
    slots, weights, gradient = (jax.lax.dynamic_slice_in_dim(array, first, tokens)
                                for array in (slots, weights, gradient))
    own, _, place, counts = _own_first(slots, weights, n_slots)
    by_own = weight_gradients(values, own, counts, gradient, owners=owners, interpret=interpret)
    by_read = jax.lax.sort((place, by_own.astype(weights.dtype)), dimension=1, num_keys=1)[1]
    return SparseRows(ids, sums, count), jnp.where(slots < n_slots, by_read, 0)


def _own_first(slots, weights, n_slots):
    """Slots, weights and places among the token's reads, own ones first in their order, and how
    many there are; a token without any reads slot 0 with weight 0."""
    place = jnp.broadcast_to(jnp.arange(slots.shape[1], dtype=jnp.int32), slots.shape)
    others, slots, weights, place = jax.lax.sort((slots == n_slots, slots, weights, place),
                                                 num_keys=1)
    counts = jnp.sum(~others, axis=1, dtype=jnp.int32)
    return (jnp.where(others, 0, slots), jnp.where(others, 0, weights), place,
            jnp.maximum(counts, 1))

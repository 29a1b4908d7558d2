"""Weighted sum of value rows, and its derivative (METHOD.md section 1, step 5)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pkm_jax.memory import kernels
from pkm_jax.memory.kernels import read
from pkm_jax.memory.sparse_rows import SparseRows, distinct, take_rows

# Tokens that plain jnp reads for at a time: their sums stay in the on-chip memory of a TPU, and a
# CPU's caches, through all R reads.
BLOCK = 16_384


def value_bag(
    values: Float[Array, 'S V'],
    slots: Int32[Array, 'T R'],
    weights: Float[Array, 'T R'],
) -> Float[Array, 'T V']:
    """Σ_r weights[t, r] · values[slots[t, r]], summed in float32, returned in the dtype of `values`.

    No [T, R, V] array exists, forward or backward. Slots must lie in [0, S). The gradient of
    `values` is dense and in their dtype; it is deterministic, except in plain jnp on a GPU.
    """
    if kernels.chosen('read', read.unsupported(values, slots)):
        return read.value_bag(values, slots, weights)
    return reference(values, slots, weights)


@jax.custom_vjp
def reference(
    values: Float[Array, 'S V'],
    slots: Int32[Array, 'T R'],
    weights: Float[Array, 'T R'],
) -> Float[Array, 'T V']:
    """`value_bag` in plain jnp, for any device: one read of every token at a time.

    The gradient of `values` is deterministic where the device's scatter-add is (CPU and TPU).
    """
    def read_block(block):
        def add_read(total, read):
            slot, weight = read
            rows = values[slot].astype(jnp.float32)
            return total + weight[:, None].astype(jnp.float32) * rows, None

        slots, weights = block
        start = jnp.zeros((len(slots), values.shape[1]), jnp.float32)
        return jax.lax.scan(add_read, start, (slots.T, weights.T))[0].astype(values.dtype)

    return _joined(jax.lax.map(read_block, _blocks(slots, weights)), len(slots))


def _forward(values, slots, weights):
    return reference(values, slots, weights), (values, slots, weights)


def _backward(residuals, gradient):
    values, slots, weights = residuals

    def add_block(table, block):
        def add_read(table, read):
            slot, weight = read
            table = table.at[slot].add(weight[:, None].astype(jnp.float32) * gradient)
            return table, jnp.sum(values[slot].astype(jnp.float32) * gradient, axis=-1)

        slots, weights, gradient = block
        gradient = gradient.astype(jnp.float32)
        table, by_read = jax.lax.scan(add_read, table, (slots.T, weights.T))
        return table, by_read.T.astype(weights.dtype)

    start = jnp.zeros(values.shape, jnp.float32)
    table, by_read = jax.lax.scan(add_block, start, _blocks(slots, weights, gradient))
    return table.astype(values.dtype), None, _joined(by_read, len(slots))


reference.defvjp(_forward, _backward)


def compact_gradients(
    values: Float[Array, 'S V'],
    slots: Int32[Array, 'T R'],
    weights: Float[Array, 'T R'],
    gradient: Float[Array, 'T V'],
) -> tuple[SparseRows, Float[Array, 'T R']]:
    """The gradient of `values` as the rows that were read, and the gradient of the weights.

    Slots may be S too: nothing is read there, with a weight of 0, whose gradient is 0. No array
    has S rows, and none is [T, R, V].
    """
    if not kernels.chosen('read', read.unsupported(values, slots)):
        return compact_reference(values, slots, weights, gradient)
    # The kernel reads everywhere. Its last row is that of slot S - 1: beyond the count, and zero,
    # where that stands for nothing.
    size = len(values)
    _, rows, _, by_read = read.compact_gradients(values, jnp.minimum(slots, size - 1), weights,
                                                 gradient)
    ids, count = distinct(slots, size, len(rows))
    return (SparseRows(ids, rows.astype(jnp.float32), count),
            jnp.where(slots < size, by_read, 0))


def compact_reference(
    values: Float[Array, 'S V'],
    slots: Int32[Array, 'T R'],
    weights: Float[Array, 'T R'],
    gradient: Float[Array, 'T V'],
) -> tuple[SparseRows, Float[Array, 'T R']]:
    """`compact_gradients` in plain jnp, for any device: one read of every token at a time."""
    capacity = min(len(values), slots.size)
    ids, count = distinct(slots, len(values), capacity)

    def add_block(rows, block):
        def add_read(rows, read):
            slot, weight = read
            place = jnp.where(slot < len(values), jnp.searchsorted(ids, slot), capacity)
            change = weight[:, None].astype(jnp.float32) * gradient
            read_rows = take_rows(values, slot).astype(jnp.float32)
            return rows.at[place].add(change, mode='drop'), jnp.sum(read_rows * gradient, axis=-1)

        slots, weights, gradient = block
        gradient = gradient.astype(jnp.float32)
        rows, by_read = jax.lax.scan(add_read, rows, (slots.T, weights.T))
        return rows, by_read.T.astype(weights.dtype)

    start = jnp.zeros((capacity, values.shape[1]), jnp.float32)
    rows, by_read = jax.lax.scan(add_block, start, _blocks(slots, weights, gradient))
    return SparseRows(ids, rows, count), _joined(by_read, len(slots))


def _blocks(*arrays):
    """Arrays of T tokens in blocks of BLOCK or a little less; what fills the last one weighs 0."""
    tokens = len(arrays[0])
    number = -(-tokens // BLOCK)
    size = -(-tokens // number)
    return tuple(jnp.pad(array, ((0, number * size - tokens), (0, 0))).reshape(number, size, -1)
                 for array in arrays)


def _joined(blocks, tokens):
    return blocks.reshape(-1, blocks.shape[-1])[:tokens]

"""Weighted sum of value rows, and its derivative (docs/method.md, section 1, step 5)."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pkm_jax.dispatch import Choice, Implementation, Kernel
from pkm_jax.memory.sparse_rows import SparseRows, distinct, take_rows

# Tokens that plain jnp reads for at a time: their sums stay in the on-chip memory of a TPU, and a
# CPU's caches, through all R reads.
BLOCK = 16_384


def embedding_bag(
    values: Float[Array, 'S V'],
    slots: Int32[Array, 'T R'],
    weights: Float[Array, 'T R'],
    *,
    implementation: Implementation | None = None,
) -> Float[Array, 'T V']:
    """Σ_r weights[t, r] · values[slots[t, r]], summed in float32, in the dtype of `values`.

    No [T, R, V] array exists, forward or backward. Slots must lie in [0, S). The gradient of
    `values` is dense and in their dtype; it is deterministic, except in plain jnp on a GPU. For
    `implementation` see `pkm_jax.dispatch.Choice`.

    Raises:
      Refusal: the implementation cannot take these arrays.
    """
    return _bag(values, slots, weights, implementation)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _bag(values, slots, weights, implementation):
    return _forward_choice(implementation, values, slots, weights)


def reference(
    values: Float[Array, 'S V'],
    slots: Int32[Array, 'T R'],
    weights: Float[Array, 'T R'],
) -> Float[Array, 'T V']:
    """`embedding_bag` in plain jnp, for any device: one read of every token at a time."""
    def read_block(block):
        def add_read(total, read):
            slot, weight = read
            rows = values[slot].astype(jnp.float32)
            return total + weight[:, None].astype(jnp.float32) * rows, None

        slots, weights = block
        start = jnp.zeros((len(slots), values.shape[1]), jnp.float32)
        return jax.lax.scan(add_read, start, (slots.T, weights.T))[0].astype(values.dtype)

    return _joined(jax.lax.map(read_block, _blocks(slots, weights)), len(slots))


def reference_backward(
    values: Float[Array, 'S V'],
    slots: Int32[Array, 'T R'],
    weights: Float[Array, 'T R'],
    gradient: Float[Array, 'T V'],
) -> tuple[Float[Array, 'S V'], Float[Array, 'T R']]:
    """Gradients of values and weights; deterministic where a scatter-add is (CPU and TPU)."""
    def add(table, slot, changes):
        return table.at[slot].add(changes), values[slot]

    table, by_read = _add_reads(add, jnp.zeros(values.shape, jnp.float32), slots, weights, gradient)
    return table.astype(values.dtype), by_read


def compact_gradients(
    values: Float[Array, 'S V'],
    slots: Int32[Array, 'T R'],
    weights: Float[Array, 'T R'],
    gradient: Float[Array, 'T V'],
    *,
    implementation: Implementation | None = None,
) -> tuple[SparseRows, Float[Array, 'T R']]:
    """The gradient of `values` as the rows that were read, and the gradient of the weights.

    Slots may be S too: nothing is read there, with a weight of 0, whose gradient is 0. No array
    has S rows, and none is [T, R, V].
    """
    return _compact_choice(implementation, values, slots, weights, gradient)


def compact_reference(
    values: Float[Array, 'S V'],
    slots: Int32[Array, 'T R'],
    weights: Float[Array, 'T R'],
    gradient: Float[Array, 'T V'],
) -> tuple[SparseRows, Float[Array, 'T R']]:
    """`compact_gradients` in plain jnp, for any device: one read of every token at a time."""
    capacity = min(len(values), slots.size)
    ids, count = distinct(slots, len(values), capacity)

    def add(rows, slot, changes):
        place = jnp.where(slot < len(values), jnp.searchsorted(ids, slot), capacity)
        return rows.at[place].add(changes, mode='drop'), take_rows(values, slot)

    start = jnp.zeros((capacity, values.shape[1]), jnp.float32)
    rows, by_read = _add_reads(add, start, slots, weights, gradient)
    return SparseRows(ids, rows, count), by_read


def _add_reads(add, start, slots, weights, gradient):
    """`start` after `add(total, slot, changes)` for every read, and the gradient of the weights.

    `add` takes the slots of one read of each token of a block and what to add there, and returns
    the new total and the values of these slots.
    """
    def add_block(total, block):
        def add_read(total, read):
            slot, weight = read
            total, rows = add(total, slot, weight[:, None].astype(jnp.float32) * gradient)
            return total, jnp.sum(rows.astype(jnp.float32) * gradient, axis=-1)

        slots, weights, gradient = block
        gradient = gradient.astype(jnp.float32)
        total, by_read = jax.lax.scan(add_read, total, (slots.T, weights.T))
        return total, by_read.T.astype(weights.dtype)

    total, by_read = jax.lax.scan(add_block, start, _blocks(slots, weights, gradient))
    return total, _joined(by_read, len(slots))


def _blocks(*arrays):
    """Arrays of T tokens in blocks of BLOCK or a little less; what fills the last one weighs 0."""
    tokens = len(arrays[0])
    number = -(-tokens // BLOCK)
    size = -(-tokens // number)
    return tuple(jnp.pad(array, ((0, number * size - tokens), (0, 0))).reshape(number, size, -1)
                 for array in arrays)


def _joined(blocks, tokens):
    return blocks.reshape(-1, blocks.shape[-1])[:tokens]


def _load_forward():
    from pkm_jax.memory.kernels.gpu import embedding_bag as kernel
    return Kernel(kernel.forward, kernel.unsupported)


def _load_backward():
    from pkm_jax.memory.kernels.gpu import embedding_bag as kernel
    return Kernel(kernel.backward, kernel.unsupported)


def _load_compact_backward():
    from pkm_jax.memory.kernels.gpu import embedding_bag as kernel
    return Kernel(kernel.compact_backward, kernel.unsupported)


_forward_choice = Choice('embedding bag', reference, _load_forward)
_backward_choice = Choice('embedding bag', reference_backward, _load_backward)
_compact_choice = Choice('embedding bag', compact_reference, _load_compact_backward)


def _forward(values, slots, weights, implementation):
    return _forward_choice(implementation, values, slots, weights), (values, slots, weights)


def _backward(implementation, residuals, gradient):
    by_values, by_weights = _backward_choice(implementation, *residuals, gradient)
    return by_values, None, by_weights


_bag.defvjp(_forward, _backward)

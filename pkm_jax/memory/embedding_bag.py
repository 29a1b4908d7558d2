"""Weighted sum of value rows, and its derivative (docs/method.md, section 1, step 5)."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32

from pkm_jax.dispatch import Choice, Implementation, Kernel
from pkm_jax.memory.sparse_rows import SparseRows, distinct, in_place, sorted_like_reads

# Tokens that plain jnp reads for at a time: their sums stay in the on-chip memory of a TPU, and a
# CPU's caches, through all R reads.
BLOCK = 16_384
OWN_READS = 'own_reads'     # names loops of as many passes as tokens have reads of their own,
SKEWED_READS = 'skewed_reads'   # and those of what only skewed reads make necessary


def embedding_bag(
    values: Float[Array, 'S V'],
    slots: Int32[Array, 'T R'],
    weights: Float[Array, 'T R'],
    *,
    owners: int = 1,
    implementation: Implementation | None = None,
) -> Float[Array, 'T V']:
    """Σ_r weights[t, r] · values[slots[t, r]]: a weighted sum of R rows for each of T tokens.

    Summed in float32 and returned in the dtype of `values`. No array [T, R, V] exists, forward or
    backward. Slots must lie in [0, S). The gradient of `values` is dense and in their dtype. It is
    deterministic, except in plain JAX on a GPU. `owners`: into how many parts the rows of a table
    are split of which `values` is one; a read of another part has slot S, and adds nothing.
    `implementation`: see `pkm_jax.dispatch.Choice`.

    Raises:
      Refusal: the implementation cannot take these arrays.
    """
    return _bag(values, slots, weights, owners, implementation)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _bag(values, slots, weights, owners, implementation):
    return _forward_choice(implementation, values, slots, weights, owners=owners)


def reference(
    values: Float[Array, 'S V'],
    slots: Int32[Array, 'T R'],
    weights: Float[Array, 'T R'],
    *, owners: int = 1,
) -> Float[Array, 'T V']:
    """`embedding_bag` in plain jnp, for any device: one read of every token at a time."""
    def read_block(carry, passes, slots, weights):
        def add_read(r, total):
            rows = _rows(values, slots[r], owners).astype(jnp.float32)
            return total + weights[r][:, None].astype(jnp.float32) * rows

        start = jnp.zeros((slots.shape[1], values.shape[1]), jnp.float32)
        return carry, jax.lax.fori_loop(0, passes, add_read, start).astype(values.dtype)

    return _over_blocks(read_block, None, slots, weights, n_slots=len(values),
                        owners=owners)[1]


def reference_backward(
    values: Float[Array, 'S V'],
    slots: Int32[Array, 'T R'],
    weights: Float[Array, 'T R'],
    gradient: Float[Array, 'T V'],
    *, owners: int = 1,
) -> tuple[Float[Array, 'S V'], Float[Array, 'T R']]:
    """Gradients of values and weights; deterministic where a scatter-add is (CPU and TPU)."""
    def add(table, slot, changes):
        return table.at[slot].add(changes, mode='drop'), _rows(values, slot, owners)

    table, by_read = _add_reads(add, jnp.zeros(values.shape, jnp.float32), slots, weights, gradient,
                                n_slots=len(values), owners=owners)
    return table.astype(values.dtype), by_read


def compact_gradients(
    values: Float[Array, 'S V'],
    slots: Int32[Array, 'T R'],
    weights: Float[Array, 'T R'],
    gradient: Float[Array, 'T V'],
    first: Int32[Array, ''] | int = 0,
    *,
    tokens: int | None = None,
    owners: int = 1,
    implementation: Implementation | None = None,
) -> tuple[SparseRows, Float[Array, 'part R']]:
    """The gradient of `values` as the rows that were read, and the gradient of the weights.

    The latter is of so many `tokens`, beginning with number `first`; None: of all.

    Slots may be S: nothing is read there, with a weight of 0, whose gradient is 0. No array has S
    rows unless there are S reads, and none is [T, R, V]. `owners`: see `embedding_bag`.
    """
    return _compact_choice(implementation, values, slots, weights, gradient, jnp.int32(first),
                           owners=owners, tokens=len(slots) if tokens is None else tokens)


def rounds_on_gpus(
    values: jax.ShapeDtypeStruct, slots: jax.ShapeDtypeStruct, *, owners: int = 1,
    implementation: Implementation | None = None,
) -> bool:
    """Whether a program for NVIDIA GPUs has `compact_gradients` whose float32 rows are numbers of
    the dtype of `values`: the kernel rounds them to it, plain jnp and those for TPUs do not."""
    return _compact_choice.runs_kernel('gpu', implementation, values, slots, owners=owners)


def compact_reference(
    values: Float[Array, 'S V'],
    slots: Int32[Array, 'T R'],
    weights: Float[Array, 'T R'],
    gradient: Float[Array, 'T V'],
    first: Int32[Array, ''],
    *, owners: int = 1, tokens: int,
) -> tuple[SparseRows, Float[Array, '{tokens} R']]:
    """`compact_gradients` in plain jnp, for any device: one read of every token at a time."""
    ids, count = touched(slots, len(values), owners=owners)
    capacity = len(ids)

    def add(rows, slot, changes):
        place = slot if capacity == len(values) else jnp.where(
            slot < len(values), jnp.searchsorted(ids, slot), capacity)
        return rows.at[place].add(changes, mode='drop'), _rows(values, slot, owners=2)

    start = jnp.zeros((capacity, values.shape[1]), jnp.float32)
    rows, by_read = _add_reads(add, start, slots, weights, gradient, n_slots=len(values),
                               owners=owners)
    return SparseRows(ids, rows, count), jax.lax.dynamic_slice_in_dim(by_read, first, tokens)


def touched(
    slots: Int32[Array, 'T R'], n_slots: int, *, owners: int = 1,
) -> tuple[Int32[Array, 'rows'], Int32[Array, '1']]:
    """`ids` and `count` of SparseRows of the slots that are not `n_slots`, with a place for as many
    as there can be: where all of them can, each has its own, and nothing is sorted."""
    if slots.size < n_slots:
        return distinct(sorted_like_reads(slots), n_slots, slots.size)
    return in_place(marked(slots, n_slots, owners=owners))


def marked(
    slots: Int32[Array, 'T R'], n_slots: int, *, owners: int = 1,
) -> Bool[Array, '{n_slots}']:
    """Which rows are read; slots of `n_slots` are no reads."""
    none = jnp.zeros(n_slots, bool)
    if owners == 1:
        return none.at[slots].set(True, mode='drop')

    def mark_block(marks, passes, slots, _):
        def mark(r, marks):
            return marks.at[slots[r]].set(True, mode='drop')

        return jax.lax.fori_loop(0, passes, mark, marks), jnp.zeros((slots.shape[1], 0))

    return _over_blocks(mark_block, none, slots, jnp.zeros(slots.shape, bool), n_slots=n_slots,
                        owners=owners)[0]


def _rows(values, slots, owners):
    """Rows of the table; zeros where slots can be S, of another of several owners."""
    if owners == 1:
        return values[slots]
    return values.at[slots].get(mode='fill', fill_value=0, wrap_negative_indices=False)


def _add_reads(add, start, slots, weights, gradient, *, n_slots, owners):
    """`start` after `add(total, slot, changes)` for every read, and the gradient of the weights.

    `add` takes the slots of one read of each token of a block and what to add there, and returns
    the new total and the values of these slots.
    """
    def add_block(total, passes, slots, weights, gradient):
        gradient = gradient.astype(jnp.float32)

        def add_read(r, carry):
            total, by_read = carry
            total, rows = add(total, slots[r], weights[r][:, None].astype(jnp.float32) * gradient)
            return total, by_read.at[r].set(jnp.sum(rows.astype(jnp.float32) * gradient, axis=-1))

        by_read = jnp.zeros(slots.shape, jnp.float32)
        total, by_read = jax.lax.fori_loop(0, passes, add_read, (total, by_read))
        return total, by_read.T.astype(weights.dtype)

    return _over_blocks(add_block, start, slots, weights, gradient, n_slots=n_slots,
                        owners=owners, by_read=True)


def _over_blocks(function, carry, slots, weights, *rest, n_slots, owners, by_read=False):
    """`carry, result = function(carry, passes, slots, weights, *rest)` of each block of tokens.

    A block has at most BLOCK tokens; its slots and weights come as [R, tokens], of which the first
    `passes` are to be read. Returns the last carry, and the results of all tokens.

    Where reads have several `owners` a token's own come first, in their order, and a block has
    tokens with about as many of them: so it takes few more passes than its tokens have own reads,
    and however these are spread none is left out. `by_read`: results are [tokens, R].
    """
    arrays, (tokens, reads) = (slots, weights, *rest), slots.shape
    fills = n_slots, *(0 for _ in arrays[1:])       # of tokens that are not there
    number = max(-(-tokens // BLOCK), 1)
    size = max(-(-tokens // number), 1)

    def on_block(carry, block):
        slots, weights, *rest = block
        return function(carry, reads, slots.T, weights.T, *rest)

    def on_own(carry, block):
        slots, weights, *rest = (array.at[block].get(mode='fill', fill_value=fill)
                                 for array, fill in zip(arrays, fills))
        place = jnp.broadcast_to(jnp.arange(reads, dtype=jnp.int32), slots.shape)
        others, slots, weights, place = jax.lax.sort((slots == n_slots, slots, weights, place),
                                                     num_keys=1)
        passes = reads - jnp.min(jnp.sum(others, axis=1, dtype=jnp.int32))
        with jax.named_scope(OWN_READS):
            carry, result = function(carry, passes, slots.T, weights.T, *rest)
        return carry, jax.lax.sort((place, result), num_keys=1)[1] if by_read else result

    if owners > 1:
        order = jnp.argsort(jnp.sum(slots == n_slots, axis=1, dtype=jnp.int32))
        blocks = jnp.pad(order, (0, number * size - tokens), constant_values=tokens)
        carry, results = jax.lax.scan(on_own, carry, blocks.reshape(number, size))
        return carry, results.reshape(number * size, -1)[jnp.argsort(order)]
    blocked = tuple(jnp.pad(array, ((0, number * size - tokens), (0, 0))).reshape(number, size, -1)
                    for array in arrays)
    carry, results = jax.lax.scan(on_block, carry, blocked)
    return carry, results.reshape(number * size, -1)[:tokens]


def even_passes(tokens: int, reads: int, owners: int) -> int:
    """Passes that a block takes on average, rounded up, if every read is as likely to be any
    owner's: what `owners` are worth. Skewed reads cost the owner of the hot rows more."""
    own = np.sort(np.random.default_rng(0).binomial(reads, 1 / owners, tokens))
    blocks = np.array_split(own, -(-tokens // BLOCK))
    return math.ceil(np.mean([block[-1] for block in blocks]))


def _load_forward():
    from pkm_jax.memory.kernels.gpu import embedding_bag as kernel
    return Kernel(kernel.forward, kernel.unsupported)


def _load_backward():
    from pkm_jax.memory.kernels.gpu import embedding_bag as kernel
    return Kernel(kernel.backward, kernel.unsupported)


def _load_compact_backward():
    from pkm_jax.memory.kernels.gpu import embedding_bag as kernel
    return Kernel(kernel.compact_backward, kernel.unsupported)


def _load_forward_for_tpus():
    from pkm_jax.memory.kernels.tpu import embedding_bag as kernel
    return Kernel(kernel.forward, kernel.unsupported)


def _load_backward_for_tpus():
    from pkm_jax.memory.kernels.tpu import embedding_bag as kernel
    return Kernel(kernel.backward, kernel.unsupported)


def _load_compact_backward_for_tpus():
    from pkm_jax.memory.kernels.tpu import embedding_bag as kernel
    return Kernel(kernel.compact_backward, kernel.unsupported)


_forward_choice = Choice('embedding bag', reference, _load_forward, _load_forward_for_tpus)
_backward_choice = Choice('embedding bag', reference_backward, _load_backward,
                          _load_backward_for_tpus)
_compact_choice = Choice('embedding bag', compact_reference, _load_compact_backward,
                         _load_compact_backward_for_tpus)


def _forward(values, slots, weights, owners, implementation):
    return _bag(values, slots, weights, owners, implementation), (values, slots, weights)


def _backward(owners, implementation, residuals, gradient):
    by_values, by_weights = _backward_choice(implementation, *residuals, gradient,
                                             owners=owners)
    return by_values, None, by_weights


_bag.defvjp(_forward, _backward)

"""Weighted sum of value rows, and its derivative (docs/method.md, section 1, step 5)."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from pkm_jax.dispatch import Choice, Implementation, Kernel
from pkm_jax.memory.sparse_rows import SparseRows, distinct, in_place

# Tokens that plain jnp reads for at a time: their sums stay in the on-chip memory of a TPU, and a
# CPU's caches, through all R reads.
BLOCK = 16_384
OWN_READS = 'own_reads'     # names loops of as many passes as tokens have reads of their own


def embedding_bag(
    values: Float[Array, 'S V'],
    slots: Int32[Array, 'T R'],
    weights: Float[Array, 'T R'],
    *,
    elsewhere: bool = False,
    implementation: Implementation | None = None,
) -> Float[Array, 'T V']:
    """Σ_r weights[t, r] · values[slots[t, r]]: a weighted sum of R rows for each of T tokens.

    Summed in float32 and returned in the dtype of `values`. No array [T, R, V] exists, forward or
    backward. Slots must lie in [0, S). The gradient of `values` is dense and in their dtype. It is
    deterministic, except in plain JAX on a GPU. `elsewhere`: most slots are S, which stands for
    reads that other devices make; they add nothing. `implementation`: see
    `pkm_jax.dispatch.Choice`.

    Raises:
      Refusal: the implementation cannot take these arrays.
    """
    return _bag(values, slots, weights, elsewhere, implementation)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _bag(values, slots, weights, elsewhere, implementation):
    return _forward_choice(implementation, values, slots, weights, elsewhere=elsewhere)


def reference(
    values: Float[Array, 'S V'],
    slots: Int32[Array, 'T R'],
    weights: Float[Array, 'T R'],
    *, elsewhere: bool = False,
) -> Float[Array, 'T V']:
    """`embedding_bag` in plain jnp, for any device: one read of every token at a time."""
    def read_block(carry, passes, slots, weights):
        def add_read(r, total):
            rows = _rows(values, slots[r], elsewhere).astype(jnp.float32)
            return total + weights[r][:, None].astype(jnp.float32) * rows

        start = jnp.zeros((slots.shape[1], values.shape[1]), jnp.float32)
        return carry, jax.lax.fori_loop(0, passes, add_read, start).astype(values.dtype)

    return _over_blocks(read_block, None, slots, weights, n_slots=len(values),
                        elsewhere=elsewhere)[1]


def reference_backward(
    values: Float[Array, 'S V'],
    slots: Int32[Array, 'T R'],
    weights: Float[Array, 'T R'],
    gradient: Float[Array, 'T V'],
    *, elsewhere: bool = False,
) -> tuple[Float[Array, 'S V'], Float[Array, 'T R']]:
    """Gradients of values and weights; deterministic where a scatter-add is (CPU and TPU)."""
    def add(table, slot, changes):
        return table.at[slot].add(changes, mode='drop'), _rows(values, slot, elsewhere)

    table, by_read = _add_reads(add, jnp.zeros(values.shape, jnp.float32), slots, weights, gradient,
                                n_slots=len(values), elsewhere=elsewhere)
    return table.astype(values.dtype), by_read


def compact_gradients(
    values: Float[Array, 'S V'],
    slots: Int32[Array, 'T R'],
    weights: Float[Array, 'T R'],
    gradient: Float[Array, 'T V'],
    *,
    elsewhere: bool = False,
    implementation: Implementation | None = None,
) -> tuple[SparseRows, Float[Array, 'T R']]:
    """The gradient of `values` as the rows that were read, and the gradient of the weights.

    Slots may be S: nothing is read there, with a weight of 0, whose gradient is 0. No array has S
    rows unless there are S reads, and none is [T, R, V]. `elsewhere`: most slots are S.
    """
    return _compact_choice(implementation, values, slots, weights, gradient, elsewhere=elsewhere)


def compact_reference(
    values: Float[Array, 'S V'],
    slots: Int32[Array, 'T R'],
    weights: Float[Array, 'T R'],
    gradient: Float[Array, 'T V'],
    *, elsewhere: bool = False,
) -> tuple[SparseRows, Float[Array, 'T R']]:
    """`compact_gradients` in plain jnp, for any device: one read of every token at a time."""
    ids, count = touched(slots, len(values), elsewhere=elsewhere)
    capacity = len(ids)

    def add(rows, slot, changes):
        place = slot if capacity == len(values) else jnp.where(
            slot < len(values), jnp.searchsorted(ids, slot), capacity)
        return rows.at[place].add(changes, mode='drop'), _rows(values, slot, elsewhere=True)

    start = jnp.zeros((capacity, values.shape[1]), jnp.float32)
    rows, by_read = _add_reads(add, start, slots, weights, gradient, n_slots=len(values),
                               elsewhere=elsewhere)
    return SparseRows(ids, rows, count), by_read


def touched(
    slots: Int32[Array, 'T R'], n_slots: int, *, elsewhere: bool = False,
) -> tuple[Int32[Array, 'rows'], Int32[Array, '1']]:
    """`ids` and `count` of SparseRows of the slots that are not `n_slots`, with a place for as many
    as there can be: where all of them can, each has its own, and nothing is sorted."""
    if slots.size < n_slots:
        return distinct(slots, n_slots, slots.size)
    if not elsewhere:
        return in_place(jnp.zeros(n_slots, bool).at[slots].set(True, mode='drop'))

    def mark_block(marked, passes, slots, _):
        def mark(r, marked):
            return marked.at[slots[r]].set(True, mode='drop')

        return jax.lax.fori_loop(0, passes, mark, marked), jnp.zeros((slots.shape[1], 0))

    marked, _ = _over_blocks(mark_block, jnp.zeros(n_slots, bool), slots,
                             jnp.zeros(slots.shape, bool), n_slots=n_slots, elsewhere=True)
    return in_place(marked)


def _rows(values, slots, elsewhere):
    """Rows of the table; zeros where slots can be `elsewhere`, S."""
    if not elsewhere:
        return values[slots]
    return values.at[slots].get(mode='fill', fill_value=0, wrap_negative_indices=False)


def _add_reads(add, start, slots, weights, gradient, *, n_slots, elsewhere):
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
                        elsewhere=elsewhere, by_read=True)


def _over_blocks(function, carry, slots, weights, *rest, n_slots, elsewhere, by_read=False):
    """`carry, result = function(carry, passes, slots, weights, *rest)` of each block of tokens.

    A block has at most BLOCK tokens; its slots and weights come as [R, tokens], of which the first
    `passes` are to be read. Returns the last carry, and the results of all tokens.

    Of reads that are mostly `elsewhere` a token's own come first, in their order, and a block has
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

    if elsewhere:
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
    owner's: what `elsewhere` is worth. Skewed reads cost the owner of the hot rows more."""
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


def _forward(values, slots, weights, elsewhere, implementation):
    return _bag(values, slots, weights, elsewhere, implementation), (values, slots, weights)


def _backward(elsewhere, implementation, residuals, gradient):
    by_values, by_weights = _backward_choice(implementation, *residuals, gradient,
                                             elsewhere=elsewhere)
    return by_values, None, by_weights


_bag.defvjp(_forward, _backward)

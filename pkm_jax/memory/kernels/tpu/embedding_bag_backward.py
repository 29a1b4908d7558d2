"""Gradients of the weighted sum of value rows on a TPU (Pallas, Mosaic, TensorCore).

A stable sort of the reads by slot brings those of a slot together, as a *segment*; reads made
elsewhere come last and are left out. Programs go over a chunk of sorted reads each, one after the
other: of every read the output gradient of its token comes from HBM, of every segment its value row
as well, both into rings of IN_FLIGHT places. Their product is the gradient of the read's weight;
weight · gradient is added to a float32 sum, which a segment carries from one chunk to the next, and
which leaves for its row where the segment ends. No sum depends on when a copy arrives: results are
the same bit for bit each time.

Bytes: an output gradient for each read, a value row and a gradient row for each slot that was read,
zeros for the other rows, and the sorts. Operations: for each read and 1,024 numbers of a row four
vector instructions in float32, and those that widen bfloat16. Floor: the rows over the memory
bandwidth.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int32

from pkm_jax.memory.kernels.tpu.rows import LANES, Interpret, as_rows, padded_tokens
from pkm_jax.memory.sparse_rows import SparseRows, in_place

IN_FLIGHT = 64      # output gradients, and as many value rows: a power of two, as is
LEAVING = 8         # sums on their way to their rows
CHUNK = 1_024       # sorted reads of a program, a multiple of LANES
FETCHES, BEGINS, ENDS = 1, 2, 4     # flags of a sorted read: it needs the value row, is a segment's
FLAGS = 3                           # first or last; bits of a number that holds them and the token


def dense_gradients(
    values: Float[Array, 'S V'], slots: Int32[Array, 'T R'], weights: Float[Array, 'T R'],
    gradient: Float[Array, 'T V'], *, interpret: Interpret,
) -> tuple[Float[Array, 'S V'], Float[Array, 'T R']]:
    """Gradients of `values`, in their dtype, and of `weights`; slots of S are no reads."""
    reads = _sort(slots, weights, len(values))
    return _gradients(values, reads, reads[0], gradient, len(values), slots.shape, weights.dtype,
                      values.dtype, interpret)


def compact_gradients(
    values: Float[Array, 'S V'], slots: Int32[Array, 'T R'], weights: Float[Array, 'T R'],
    gradient: Float[Array, 'T V'], *, interpret: Interpret,
) -> tuple[SparseRows, Float[Array, 'T R']]:
    """The rows of the gradient of `values`, and that of `weights`; slots of S are no reads."""
    n_slots = len(values)
    capacity = min(n_slots, slots.size)
    reads = slot, _, _, flags = _sort(slots, weights, n_slots)
    if capacity == n_slots:
        place = slot
        ids, count = in_place(jnp.zeros(n_slots, bool).at[slot].set(True, mode='drop'))
    else:
        begins = (flags & BEGINS != 0) & (slot < n_slots)
        place = jnp.cumsum(begins, dtype=jnp.int32) - 1
        ids = jnp.full(capacity, n_slots, jnp.int32).at[
            jnp.where(begins, place, capacity)].set(slot, mode='drop')
        count = jnp.sum(begins, dtype=jnp.int32)[None]
    rows, by_read = _gradients(values, reads, place, gradient, capacity, slots.shape, weights.dtype,
                               jnp.float32, interpret)
    return SparseRows(ids, rows, count), by_read


def _sort(slots, weights, n_slots):
    """Of the reads in the order of their slots: slot, place among all reads, weight, flags."""
    size = slots.size
    slot, order, weight = jax.lax.sort(
        (slots.reshape(-1), jnp.arange(size, dtype=jnp.int32), weights.reshape(-1)), num_keys=1,
        is_stable=True)
    differs = slot[1:] != slot[:-1]
    begins, ends = (jnp.concatenate(parts) for parts in (
        (jnp.ones(1, bool), differs), (differs, jnp.ones(1, bool))))
    fetches = begins | (jnp.arange(size) % CHUNK == 0)
    flags = sum(jnp.where(where, flag, 0) for where, flag in (
        (fetches, FETCHES), (begins, BEGINS), (ends, ENDS)))
    return slot, order, weight, flags


def _gradients(values, reads, place, gradient, n_rows, shape, weights_dtype, dtype, interpret):
    """Rows [n_rows, V] in `dtype` and the gradient of the weights, in their shape and dtype."""
    slot, order, weight, flags = reads
    table, by_token = as_rows(values), as_rows(gradient)
    pieces, lanes = table.shape[1:]
    own = jnp.sum(slot < len(values), dtype=jnp.int32)[None]
    code = (order // shape[1] << FLAGS) + flags
    scalars = [padded_tokens(array, CHUNK).reshape(-1, 1, CHUNK)
               for array in (slot, place, code, weight.astype(jnp.float32))]
    chunks, row, any_memory = len(scalars[0]), (pieces, lanes), pl.BlockSpec(memory_space=pl.ANY)
    rows, by_sorted = pl.pallas_call(
        _add_chunk, name='read_backward', interpret=interpret,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1, grid=(chunks,),
            in_specs=[pl.BlockSpec((1, 1, CHUNK), lambda n, _: (n, 0, 0), memory_space=pltpu.SMEM)
                      for _ in scalars] + [any_memory] * 3,
            out_specs=[any_memory,
                       pl.BlockSpec((1, CHUNK // LANES, LANES), lambda n, _: (n, 0, 0))],
            scratch_shapes=[
                *_ring(IN_FLIGHT, row, gradient.dtype), *_ring(IN_FLIGHT, row, values.dtype),
                *_ring(LEAVING, row, dtype),
                pltpu.VMEM(row, jnp.float32), pltpu.VMEM((CHUNK, lanes), jnp.float32)]),
        out_shape=[jax.ShapeDtypeStruct((n_rows, *row), dtype),
                   jax.ShapeDtypeStruct((chunks, CHUNK // LANES, LANES), jnp.float32)],
        input_output_aliases={7: 0},
        compiler_params=pltpu.CompilerParams(dimension_semantics=('arbitrary',)),
    )(own, *scalars, by_token, table, jnp.zeros((n_rows, *row), dtype))
    _, by_read = jax.lax.sort((order, by_sorted.reshape(-1)[:len(order)]), num_keys=1)
    return (rows.reshape(n_rows, -1)[:, :values.shape[1]],
            by_read.reshape(shape).astype(weights_dtype))


def _ring(places, row, dtype):
    """Places for rows on their way, and the semaphores that say when they are there."""
    return pltpu.VMEM((places, *row), dtype), pltpu.SemaphoreType.DMA((places,))


def _add_chunk(own, slot, place, code, weight, gradient, table, _zeros, rows, by_read,
               gradients, gradients_in, values, values_in, leaving, leaving_out, total, products):
    """One program: see the module."""
    first = pl.program_id(0) * CHUNK
    size = jnp.clip(own[0] - first, 0, CHUNK)

    def has(read, flag):
        return code[0, 0, read] & flag != 0

    def gradient_in(token, at):
        return pltpu.make_async_copy(gradient.at[token], gradients.at[at], gradients_in.at[at])

    def value_in(of_slot, at):
        return pltpu.make_async_copy(table.at[of_slot], values.at[at], values_in.at[at])

    def sum_out(to, at):
        return pltpu.make_async_copy(leaving.at[at], rows.at[to], leaving_out.at[at])

    def start(read, segment):
        """Starts the copies for a read, if there is one; its segment, from the last one's."""
        known = jnp.minimum(read, CHUNK - 1)
        fetches = has(known, FETCHES) & (read < size)
        segment += fetches.astype(jnp.int32)

        @pl.when(read < size)
        def _():
            gradient_in(code[0, 0, read] >> FLAGS, read & IN_FLIGHT - 1).start()

        @pl.when(fetches)
        def _():
            value_in(slot[0, 0, read], segment & IN_FLIGHT - 1).start()

        return segment

    def add(read, carry):
        sums, segment, ahead, left = carry
        at, fetches, ends = read & IN_FLIGHT - 1, has(read, FETCHES), has(read, ENDS)
        segment += fetches.astype(jnp.int32)
        gradient_in(0, at).wait()

        @pl.when(fetches)
        def _():
            value_in(0, segment & IN_FLIGHT - 1).wait()

        by_token = gradients[at].astype(jnp.float32)
        product = by_token * values[segment & IN_FLIGHT - 1].astype(jnp.float32)
        products[pl.ds(read, 1)] = jnp.sum(product, axis=0, keepdims=True)
        sums = jnp.where(has(read, BEGINS), 0, sums) + weight[0, 0, read] * by_token

        @pl.when(ends)
        def _():
            @pl.when(left >= LEAVING)
            def _():
                sum_out(0, left & LEAVING - 1).wait()

            leaving[left & LEAVING - 1] = sums.astype(leaving.dtype)
            sum_out(place[0, 0, read], left & LEAVING - 1).start()

        return sums, segment, start(read + IN_FLIGHT, ahead), left + ends.astype(jnp.int32)

    none = jnp.int32(-1)
    ahead = jax.lax.fori_loop(0, IN_FLIGHT, start, none)
    sums, _, _, left = jax.lax.fori_loop(0, size, add, (total[...], none, ahead, jnp.int32(0)))
    total[...] = sums
    jax.lax.fori_loop(0, jnp.minimum(left, LEAVING), functools.partial(_wait, sum_out), None)
    by_read[0] = _summed(products[...], size)


def _wait(copy, at, _):
    copy(0, at).wait()


def _summed(products: Float[Array, 'reads lanes'], size: Int32[Array, '']) -> Array:
    """The sum of each of the first `size` rows, zeros of the others, LANES of them to a row."""
    blocks = products.reshape(-1, LANES, products.shape[1])
    sums = jnp.concatenate([jnp.sum(block.T, axis=0, keepdims=True) for block in blocks])
    at = (jax.lax.broadcasted_iota(jnp.int32, sums.shape, 0) * LANES
          + jax.lax.broadcasted_iota(jnp.int32, sums.shape, 1))
    return jnp.where(at < size, sums, 0)

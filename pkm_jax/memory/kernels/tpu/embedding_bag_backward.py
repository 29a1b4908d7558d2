"""Gradients of the weighted sum of value rows on a TPU (Pallas, Mosaic, TensorCore).

A stable sort of the reads by slot brings those of a slot together, as a *segment*; reads made
elsewhere come last and are left out, or are packed away before (`own_reads`). Programs go over a
chunk of sorted reads each, one after the other: of every read the output gradient of its token
comes from HBM into a ring of IN_FLIGHT places. weight · gradient is added to a float32 sum, which a
segment carries from one chunk to the next, and which leaves for its row where the segment ends;
rows between those of two segments get zeros, so that none has to be there before. Of a whole table
the value row of every segment comes as well: its product with the gradient is that of the read's
weight. Of own reads the weights' gradients are `embedding_bag_forward.weight_gradients`. No sum
depends on when a copy arrives: results are the same bit for bit each time.

Bytes: an output gradient for each read, a value row for each slot that was read, every gradient row
once, and the sorts. Operations: for each read and 1,024 numbers of a row four vector instructions
in float32, two without value rows, and those that widen bfloat16. Floor: the rows over the memory
bandwidth.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int32

from pkm_jax.memory.embedding_bag import SKEWED_READS
from pkm_jax.memory.kernels.tpu import own_reads, sparsecore, sparsecore_backward
from pkm_jax.memory.kernels.tpu.rows import (
    LANES,
    Interpret,
    as_rows,
    as_table,
    padded_tokens,
    sum_lanes,
)
from pkm_jax.memory.sparse_rows import SparseRows, in_place

IN_FLIGHT = 64      # output gradients, and as many value rows: a power of two, as is
LEAVING = 8         # sums on their way to their rows
CLEARED = 8         # rows without a sum that get their zeros by one copy: a power of two
CHUNK = 1_024       # sorted reads of a program, a multiple of LANES
FETCHES, BEGINS, ENDS = 1, 2, 4     # flags of a sorted read: it needs the value row, is a segment's
FLAGS = 3                           # first or last; bits of a number that holds them and the token


def dense_gradients(
    values: Float[Array, 'S V'], slots: Int32[Array, 'T R'], weights: Float[Array, 'T R'],
    gradient: Float[Array, 'T V'], *, interpret: Interpret,
) -> tuple[Float[Array, 'S V'], Float[Array, 'T R']]:
    """Gradients of `values`, in their dtype, and of `weights`; slots of S are no reads."""
    reads = _all_by_slot(slots, weights)
    by_token, table = as_rows(gradient, interpret), as_rows(values, interpret)
    rows, by_sorted = _sums(reads, reads.slots, by_token, len(table), len(table), values.dtype,
                            slots.shape[1], interpret, table)
    return as_table(rows, values.shape[1], interpret), _in_order(reads, by_sorted, weights)


def compact_gradients(
    values: Float[Array, 'S V'], slots: Int32[Array, 'T R'], weights: Float[Array, 'T R'],
    gradient: Float[Array, 'T V'], *, interpret: Interpret, chip: sparsecore.Chip | None = None,
) -> tuple[SparseRows, Float[Array, 'T R']]:
    """The rows of the gradient of `values`, and that of `weights`; slots of S are no reads. By the
    SparseCores of `chip`, if that is given."""
    n_slots = len(values)
    capacity = min(n_slots, slots.size)
    reads = _all_by_slot(slots, weights)
    if capacity == n_slots:
        place = reads.slots
        ids, count = in_place(jnp.zeros(n_slots, bool).at[place].set(True, mode='drop'))
    else:
        begins = _begins(reads.slots) & (reads.slots < n_slots)
        place = jnp.cumsum(begins, dtype=jnp.int32) - 1
        ids = jnp.full(capacity, n_slots, jnp.int32).at[
            jnp.where(begins, place, capacity)].set(reads.slots, mode='drop')
        count = jnp.sum(begins, dtype=jnp.int32)[None]
    if chip is not None:
        rows, by_sorted = sparsecore_backward.sum_by_slot(
            reads, place, ids < n_slots, n_slots, gradient, slots.shape[1], values, chip=chip,
            interpret=interpret)
    else:
        rows, by_sorted = _sums(reads, place, as_rows(gradient, interpret), n_slots, capacity,
                                jnp.float32, slots.shape[1], interpret, as_rows(values, interpret))
        rows = as_table(rows, values.shape[1], interpret)
    return SparseRows(ids, rows, count), _in_order(reads, by_sorted, weights)


def own_row_gradients(
    slots: Int32[Array, 'T R'], weights: Float[Array, 'T R'], gradient: Float[Array, 'T V'],
    n_slots: int, *, owners: int, interpret: Interpret, chip: sparsecore.Chip | None = None,
) -> Float[Array, '{n_slots} V']:
    """The gradient of every row, float32, of reads of which about one in `owners` is made here; the
    slots of the others are `n_slots`. Each window of blocks is summed by itself. By the SparseCores
    of `chip`, if that is given."""
    blocks, size = own_reads.in_blocks(slots, weights, n_slots), own_reads.window_size(owners)
    by_token = gradient if chip else as_rows(gradient, interpret)

    def rows_of(number):
        reads = own_reads.window(blocks, number, n_slots, size)
        if chip is not None:
            used = jnp.zeros(n_slots, bool).at[reads.slots].set(True, mode='drop')
            return sparsecore_backward.sum_by_slot(
                reads, reads.slots, used, n_slots, by_token, slots.shape[1], chip=chip,
                interpret=interpret)[0]
        return _sums(reads, reads.slots, by_token, n_slots, n_slots, jnp.float32, slots.shape[1],
                     interpret, expected=slots.size // owners)[0]

    def add_window(carry):
        number, rows = carry
        return number + 1, rows + rows_of(number)

    windows, start = own_reads.windows(blocks, n_slots, size), (jnp.int32(1), rows_of(0))
    with jax.named_scope(SKEWED_READS):
        rows = jax.lax.while_loop(lambda carry: carry[0] < windows, add_window, start)[1]
    return rows if chip else as_table(rows, gradient.shape[1], interpret)


def _all_by_slot(slots, weights):
    order = jnp.arange(slots.size, dtype=jnp.int32)
    return own_reads.by_slot(own_reads.Reads(slots.reshape(-1), order, weights.reshape(-1)))


def _in_order(reads, by_sorted, weights):
    """Numbers of sorted reads in the shape and dtype of their weights."""
    _, by_read = jax.lax.sort((reads.order, by_sorted), num_keys=1)
    return by_read.reshape(weights.shape).astype(weights.dtype)


def _begins(slot):
    """Which sorted reads are the first of their slot."""
    return jnp.concatenate([jnp.ones(1, bool), slot[1:] != slot[:-1]])


def _sums(reads, place, by_token, n_slots, n_rows, dtype, per_token, interpret, table=None,
          expected=None):
    """Rows [n_rows, pieces, LANES] in `dtype`, the sums of each slot at its place, which ascend;
    with a `table` also the gradient of each sorted read's weight. `expected` reads are likely."""
    begins = _begins(reads.slots)
    ends = jnp.concatenate([begins[1:], jnp.ones(1, bool)])
    fetches = begins | (jnp.arange(len(begins)) % CHUNK == 0)
    flags = sum(jnp.where(where, flag, 0) for where, flag in (
        (fetches, FETCHES), (begins, BEGINS), (ends, ENDS)))
    code = (reads.order // per_token << FLAGS) + flags
    own = jnp.sum(reads.slots < n_slots, dtype=jnp.int32)[None]
    tables = [] if table is None else [table]
    scalars = [padded_tokens(array, CHUNK).reshape(-1, 1, CHUNK) for array in (
        place, code, reads.weights.astype(jnp.float32), *(reads.slots for _ in tables))]
    chunks, row, any_memory = len(scalars[0]), by_token.shape[1:], pl.BlockSpec(memory_space=pl.ANY)
    of_reads = pl.BlockSpec((1, CHUNK // LANES, LANES), lambda n, _: (n, 0, 0))
    found = pl.pallas_call(
        functools.partial(_add_chunk, with_values=table is not None), name='read_backward',
        interpret=interpret,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1, grid=(chunks,),
            in_specs=[pl.BlockSpec((1, 1, CHUNK), lambda n, _: (n, 0, 0), memory_space=pltpu.SMEM)
                      for _ in scalars] + [any_memory] * (1 + len(tables)),
            out_specs=[any_memory, *(of_reads for _ in tables)],
            scratch_shapes=[
                *_ring(IN_FLIGHT, row, by_token.dtype), *_ring(LEAVING, row, dtype),
                pltpu.VMEM(row, jnp.float32), pltpu.VMEM((CLEARED, *row), dtype),
                pltpu.SMEM((1,), jnp.int32), pltpu.SemaphoreType.DMA((2,)),
                *(one for table in tables for one in (
                    *_ring(IN_FLIGHT, row, table.dtype),
                    pltpu.VMEM((CHUNK, row[1]), jnp.float32)))]),
        out_shape=[jax.ShapeDtypeStruct((n_rows, *row), dtype),
                   *(jax.ShapeDtypeStruct((chunks, CHUNK // LANES, LANES), jnp.float32)
                     for _ in tables)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=('arbitrary',)),
        cost_estimate=_cost(expected or len(place), n_rows, row, scalars, by_token, dtype, tables),
    )(own, *scalars, by_token, *tables)
    return found[0], found[1].reshape(-1)[:len(place)] if tables else None


def _cost(reads, n_rows, row, scalars, by_token, dtype, tables):
    """Of so many reads, which touch every row if they can."""
    size, touched = math.prod(row), min(reads, n_rows)
    written = touched * size * jnp.dtype(dtype).itemsize
    values = sum(touched * size * table.dtype.itemsize + scalars[0].size * 4 for table in tables)
    return pl.CostEstimate(
        flops=(2 + 2 * len(tables)) * reads * size, transcendentals=0,
        bytes_accessed=reads * size * by_token.dtype.itemsize + written + values
        + sum(array.size * 4 for array in scalars))


def _ring(places, row, dtype):
    """Places for rows on their way, and the semaphores that say when they are there."""
    return pltpu.VMEM((places, *row), dtype), pltpu.SemaphoreType.DMA((places,))


def _add_chunk(own, place, code, weight, *refs, with_values):
    """One program: see the module."""
    if with_values:
        (slot, gradient, table, rows, by_read, gradients, gradients_in, leaving, leaving_out,
         total, zeros, done, cleared, values, values_in, products) = refs
    else:
        (gradient, rows, gradients, gradients_in, leaving, leaving_out, total, zeros, done,
         cleared) = refs
    first = pl.program_id(0) * CHUNK
    size = jnp.clip(own[0] - first, 0, CHUNK)
    block = min(CLEARED, 1 << rows.shape[0].bit_length() - 1)   # of a table of few rows fewer

    @pl.when(first == 0)
    def _():
        zeros[...] = jnp.zeros_like(zeros)
        done[0] = 0     # rows that are written, or on their way

    def has(read, flag):
        return code[0, 0, read] & flag != 0

    def gradient_in(token, at):
        return pltpu.make_async_copy(gradient.at[token], gradients.at[at], gradients_in.at[at])

    def value_in(of_slot, at):
        return pltpu.make_async_copy(table.at[of_slot], values.at[at], values_in.at[at])

    def sum_out(to, at):
        return pltpu.make_async_copy(leaving.at[at], rows.at[to], leaving_out.at[at])

    def clear(stop, started):
        """Starts to write zeros to the rows up to `stop` that have no sum; the copies started, of
        `block` rows and of one."""
        at = done[0]
        many = jnp.maximum(stop - at, 0) >> block.bit_length() - 1
        jax.lax.fori_loop(0, many, lambda i, _: zeros_out(at + i * block, block).start(), None)
        at += many * block
        few = jnp.maximum(stop - at, 0)
        jax.lax.fori_loop(0, few, lambda i, _: zeros_out(at + i, 1).start(), None)
        done[0] = at + few
        return started[0] + many, started[1] + few

    def zeros_out(to, number):
        return pltpu.make_async_copy(zeros.at[pl.ds(0, number)], rows.at[pl.ds(to, number)],
                                     cleared.at[int(number == 1)])

    def start(read, segment):
        """Starts the copies for a read, if there is one; its segment, from the last one's."""
        @pl.when(read < size)
        def _():
            gradient_in(code[0, 0, read] >> FLAGS, read & IN_FLIGHT - 1).start()

        if not with_values:
            return segment
        fetches = has(jnp.minimum(read, CHUNK - 1), FETCHES) & (read < size)
        segment += fetches.astype(jnp.int32)

        @pl.when(fetches)
        def _():
            value_in(slot[0, 0, read], segment & IN_FLIGHT - 1).start()

        return segment

    def multiply(read, by_token, segment):
        """The gradient of the read's weight; its segment."""
        fetches = has(read, FETCHES)
        segment += fetches.astype(jnp.int32)

        @pl.when(fetches)
        def _():
            value_in(0, segment & IN_FLIGHT - 1).wait()

        product = by_token * values[segment & IN_FLIGHT - 1].astype(jnp.float32)
        products[pl.ds(read, 1)] = jnp.sum(product, axis=0, keepdims=True)
        return segment

    def add(read, carry):
        sums, segment, ahead, left, zeroed = carry
        at, ends = read & IN_FLIGHT - 1, has(read, ENDS)
        gradient_in(0, at).wait()
        by_token = gradients[at].astype(jnp.float32)
        if with_values:
            segment = multiply(read, by_token, segment)
        sums = jnp.where(has(read, BEGINS), 0, sums) + weight[0, 0, read] * by_token

        zeroed = clear(jnp.where(ends, place[0, 0, read], 0), zeroed)

        @pl.when(ends)
        def _():
            done[0] += 1

            @pl.when(left >= LEAVING)
            def _():
                sum_out(0, left & LEAVING - 1).wait()

            leaving[left & LEAVING - 1] = sums.astype(leaving.dtype)
            sum_out(place[0, 0, read], left & LEAVING - 1).start()

        left += ends.astype(jnp.int32)
        return sums, segment, start(read + IN_FLIGHT, ahead), left, zeroed

    none, nothing = jnp.int32(-1), jnp.int32(0)
    ahead = jax.lax.fori_loop(0, IN_FLIGHT, start, none)
    sums, _, _, left, zeroed = jax.lax.fori_loop(
        0, size, add, (total[...], none, ahead, nothing, (nothing, nothing)))
    total[...] = sums
    is_last = pl.program_id(0) == pl.num_programs(0) - 1
    many, few = clear(jnp.where(is_last, rows.shape[0], 0), zeroed)
    jax.lax.fori_loop(0, many, lambda _, __: zeros_out(0, block).wait(), None)
    jax.lax.fori_loop(0, few, lambda _, __: zeros_out(0, 1).wait(), None)
    jax.lax.fori_loop(0, jnp.minimum(left, LEAVING), functools.partial(_wait, sum_out), None)
    if with_values:
        by_read[0] = sum_lanes(products[...], size, LANES)


def _wait(copy, at, _):
    copy(0, at).wait()

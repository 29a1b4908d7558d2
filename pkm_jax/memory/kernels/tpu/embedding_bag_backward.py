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

import dataclasses
import functools
import math
from typing import Any

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
from pkm_jax.memory.sparse_rows import SparseRows, distinct, in_place, ranks, starts

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
        ids, count = distinct(reads.slots, n_slots, capacity)
        place = jnp.minimum(ranks(reads.slots), count) - 1
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


def _sums(reads, place, by_token, n_slots, n_rows, dtype, per_token, interpret, table=None,
          expected=None):
    """Rows [n_rows, pieces, LANES] in `dtype`, the sums of each slot at its place, which ascend;
    with a `table` also the gradient of each sorted read's weight. `expected` reads are likely."""
    begins = starts(reads.slots)
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


@dataclasses.dataclass(frozen=True)
class _Zeros:
    """Zeros on their way to the rows that have no sum, which ascend like those that have one."""
    rows: Any
    zeros: Any
    done: Any       # how many rows are written, or on their way
    cleared: Any    # semaphores, of copies of a block and of a row

    @property
    def block(self) -> int:
        """Rows that a copy takes: of a table of few rows fewer."""
        return min(CLEARED, 1 << self.rows.shape[0].bit_length() - 1)

    def start(self, stop, started):
        """For the rows up to `stop`; the copies started, of a block and of a row."""
        at, block = self.done[0], self.block
        many = jnp.maximum(stop - at, 0) >> block.bit_length() - 1
        jax.lax.fori_loop(0, many, lambda i, _: self._copy(at + i * block, block).start(), None)
        at += many * block
        few = jnp.maximum(stop - at, 0)
        jax.lax.fori_loop(0, few, lambda i, _: self._copy(at + i, 1).start(), None)
        self.done[0] = at + few
        return started[0] + many, started[1] + few

    def wait(self, started):
        """For so many copies of a block and of a row."""
        for copies, number in zip(started, (self.block, 1)):
            jax.lax.fori_loop(0, copies, lambda _, __, n=number: self._copy(0, n).wait(), None)

    def _copy(self, to, number):
        return pltpu.make_async_copy(
            self.zeros.at[pl.ds(0, number)], self.rows.at[pl.ds(to, number)],
            self.cleared.at[int(number == 1)])


@dataclasses.dataclass(frozen=True)
class _Values:
    """Rows of the table on their way, one for each segment, and what comes of them."""
    slot: Any
    table: Any
    values: Any
    values_in: Any
    products: Any

    def start(self, read, segment, wanted):
        """Starts the copy for a read that needs one; its segment, from the last one's."""
        segment += wanted.astype(jnp.int32)

        @pl.when(wanted)
        def _():
            self._copy(self.slot[0, 0, read], segment).start()

        return segment

    def multiply(self, read, by_token, segment, wanted):
        """The gradient of the read's weight; its segment, from the last one's."""
        segment += wanted.astype(jnp.int32)

        @pl.when(wanted)
        def _():
            self._copy(0, segment).wait()

        product = by_token * self.values[segment & IN_FLIGHT - 1].astype(jnp.float32)
        self.products[pl.ds(read, 1)] = jnp.sum(product, axis=0, keepdims=True)
        return segment

    def _copy(self, slot, segment):
        at = segment & IN_FLIGHT - 1
        return pltpu.make_async_copy(self.table.at[slot], self.values.at[at], self.values_in.at[at])


def _add_chunk(own, place, code, weight, *refs, with_values):
    """One program: see the module."""
    if with_values:
        slot, gradient, table, rows, by_read, *held, values, values_in, products = refs
        of_table = _Values(slot, table, values, values_in, products)
    else:
        gradient, rows, *held = refs
    gradients, gradients_in, leaving, leaving_out, total, zeros, done, cleared = held
    without_sum = _Zeros(rows, zeros, done, cleared)
    first = pl.program_id(0) * CHUNK
    size = jnp.clip(own[0] - first, 0, CHUNK)

    @pl.when(first == 0)
    def _():
        zeros[...] = jnp.zeros_like(zeros)
        done[0] = 0

    def has(read, flag):
        return code[0, 0, read] & flag != 0

    def gradient_in(token, at):
        return pltpu.make_async_copy(gradient.at[token], gradients.at[at], gradients_in.at[at])

    def sum_out(to, at):
        return pltpu.make_async_copy(leaving.at[at], rows.at[to], leaving_out.at[at])

    def start(read, segment):
        """Starts the copies for a read, if there is one; its segment, from the last one's."""
        @pl.when(read < size)
        def _():
            gradient_in(code[0, 0, read] >> FLAGS, read & IN_FLIGHT - 1).start()

        if with_values:
            fetches = has(jnp.minimum(read, CHUNK - 1), FETCHES) & (read < size)
            segment = of_table.start(read, segment, fetches)
        return segment

    def add(read, carry):
        sums, segment, ahead, left, zeroed = carry
        at, ends = read & IN_FLIGHT - 1, has(read, ENDS)
        gradient_in(0, at).wait()
        by_token = gradients[at].astype(jnp.float32)
        if with_values:
            segment = of_table.multiply(read, by_token, segment, has(read, FETCHES))
        sums = jnp.where(has(read, BEGINS), 0, sums) + weight[0, 0, read] * by_token

        zeroed = without_sum.start(jnp.where(ends, place[0, 0, read], 0), zeroed)

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
    without_sum.wait(without_sum.start(jnp.where(is_last, rows.shape[0], 0), zeroed))
    jax.lax.fori_loop(0, jnp.minimum(left, LEAVING), lambda at, _: sum_out(0, at).wait(), None)
    if with_values:
        by_read[0] = sum_lanes(products[...], size, LANES)

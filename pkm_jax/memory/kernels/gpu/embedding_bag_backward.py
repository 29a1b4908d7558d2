"""Gradients of the weighted sum of value rows on an NVIDIA GPU (Pallas, Triton backend).

One stable sort of the T·R slot ids brings the reads of a slot together, as a *segment* of the
sorted reads. Each program streams over one *chunk* of them: it fetches the value row and the
output gradient of the next read, takes the inner product of those it has (the gradient of that
read's weight), adds weight · gradient to a float32 sum, and writes the sum where a segment ends.
Chunks end where segments do, except that segments longer than a chunk ("hot" slots) are cut, and
their partial sums added in order afterwards. Every sum has one fixed order and there is no atomic
operation: results are equal bit for bit from run to run.
Reads of slot S, which is none, come last and are in no chunk.

Bytes: each read fetches its output gradient, T·R·V·itemsize, from L2 as far as the T·V gradients
fit (an H200 keeps about 25 MB of them, and is asked to keep them rather than rows written); value
rows touched are read once, and gradient rows written once: dense S of them, compact min(S, T·R)
whatever S is. Operations: 2·T·R·V multiply-adds, and 2·T·R·V to widen bfloat16. Floor: touched and
written rows over the memory bandwidth, or the reads over the L2 bandwidth, whichever takes longer.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int32

from pkm_jax.memory.kernels.gpu.pairs import join, multiply_add, pack, parts_of, unpack
from pkm_jax.memory.sparse_rows import in_order, ranks
from pkm_jax.ops.gpu import call, column_blocks
from pkm_jax.ops.gpu import triton as plt

PROGRAMS = 8192             # over which the sorted reads are spread in chunks,
SHORTEST_CHUNK = 32         # which are no shorter than this
LONGEST_CHUNK = 256         # and no longer than this
PAIRED_ROW_BYTES = 1536     # of the longest row of which a step takes two: registers
TILE = 32                   # chunks or rows that the small kernels handle at a time
PIECES = 64                 # partial sums added at a time,
PIECE_COLUMNS = 64          # in so many columns


def dense_gradients(
    values: Float[Array, 'S V'], slots: Int32[Array, 'T R'], weights: Float[Array, 'T R'],
    gradient: Float[Array, 'T V'], *, mosaic: bool = False, interpret: bool,
) -> tuple[Float[Array, 'S V'], Float[Array, 'T R']]:
    """Gradients of `values` and `weights`; rows without a read are zero.

    Slots of S are no reads: the gradients of their weights are not set. `mosaic`: by Mosaic GPU,
    see `mosaic_backward` and `mosaic_rows`.
    """
    n_slots = len(values)
    row_slots, rows, by_read = _gradients(values, in_order(slots), weights, gradient, n_slots, None,
                                          mosaic, interpret)
    return cleared(rows, row_slots, n_slots, mosaic=mosaic, interpret=interpret), by_read


def cleared(
    rows: Float[Array, 'rows V'], slots: Int32[Array, 'rows'], n_slots: int, *,
    mosaic: bool, interpret: bool,
) -> Float[Array, 'rows V']:
    """The rows in their place, with zeros in those whose slot is `n_slots`, which is none."""
    if mosaic:
        from pkm_jax.memory.kernels.gpu import mosaic_rows
        return mosaic_rows.clear(rows, slots, n_slots, interpret=interpret)
    return call(functools.partial(_clear, n_slots=n_slots, blocks=column_blocks(rows.shape[1])),
                'read_backward_clear', (pl.cdiv(len(rows), TILE),), [rows], rows, slots,
                aliases={0: 0}, interpret=interpret)[0]


def rows_that_were_read(
    values: Float[Array, 'S V'], slots: Int32[Array, 'T R'], weights: Float[Array, 'T R'],
    gradient: Float[Array, 'T V'], *, mosaic: bool = False, interpret: bool,
) -> tuple[Int32[Array, 'rows'], Float[Array, 'rows V'], Float[Array, 'T R']]:
    """Slots read, their gradient rows, and the weights' gradient.

    rows = min(S, T·R): with S of them row i is slot i's, else the slots ascend; where there is no
    slot it is S, and the row is not set. For slots of S and `mosaic` see `dense_gradients`.
    """
    reads, before = in_order(slots), None
    if slots.size < len(values):
        chunk, upto = _chunk_size(slots, mosaic), ranks(reads[1])
        before = jnp.concatenate([jnp.zeros(1, jnp.int32), upto[chunk - 1:-1:chunk], upto[-1:]])
    return _gradients(values, reads, weights, gradient, min(len(values), slots.size), before,
                      mosaic, interpret)


def _chunk_size(slot, mosaic=False):
    """Sorted reads of one chunk, and the longest segment that is not cut."""
    if mosaic:
        from pkm_jax.memory.kernels.gpu.mosaic_backward import CHUNK
        return CHUNK
    return min(max(SHORTEST_CHUNK, slot.size // PROGRAMS), LONGEST_CHUNK)


def _gradients(values, reads, weights, gradient, n_rows, rows_before, mosaic, interpret):
    """Slot of each gradient row (S: none, and the row not set), the rows, the weights' gradients.

    `rows_before` counts the distinct slots before each chunk; None: a slot is its own row.
    """
    order, slot = reads
    width, chunk_size = values.shape[1], _chunk_size(slot, mosaic)
    if mosaic:
        from pkm_jax.memory.kernels.gpu import mosaic_backward, mosaic_rows
        cut, segment_end = mosaic_rows.cuts(slot, len(values), chunk_size)
        row_slots, rows, by_read, pieces = mosaic_backward.stream(
            values, gradient, weights, order, slot, cut, rows_before, n_rows, chunk=chunk_size,
            interpret=interpret)
        rows = mosaic_rows.add_pieces(rows, pieces, slot, cut, segment_end, rows_before,
                                      chunk_size=chunk_size, interpret=interpret)
    else:
        cut, segment_end = _cuts(slot, len(values), chunk_size, interpret)
        chunks, compact = len(cut) - 1, [] if rows_before is None else [rows_before]
        row_slots, rows, by_read, pieces = _stream_by_triton(
            values, gradient, weights, order, slot, cut, compact, n_rows, interpret)
        rows, = call(
            functools.partial(_add_pieces, chunk_size=chunk_size, chunks=chunks,
                              compact=bool(compact)),
            'read_backward_add', (pl.cdiv(chunks, PIECES), width // PIECE_COLUMNS), [rows],
            rows, pieces, slot, cut, segment_end, *compact, aliases={0: 0}, warps=4,
            interpret=interpret)
    return row_slots, rows, by_read.reshape(weights.shape).astype(weights.dtype)


def _stream_by_triton(values, gradient, weights, order, slot, cut, compact, n_rows, interpret):
    """Slots of rows, rows, the weights' gradients, partial sums of segments that are cut."""
    (n_slots, width), chunks = values.shape, len(cut) - 1
    no_slot = jnp.full((n_rows,), n_slots, jnp.int32)
    like = jax.ShapeDtypeStruct
    return call(
        functools.partial(_stream, blocks=column_blocks(width), compact=bool(compact),
                          interpret=interpret,
                          reads_a_step=1 + (values.nbytes // n_slots <= PAIRED_ROW_BYTES)),
        'read_backward', (chunks,),
        [no_slot, like((n_rows, width), values.dtype), like((slot.size,), jnp.float32),
         like((chunks, 2, parts_of(values.dtype), width // parts_of(values.dtype)), jnp.float32)],
        no_slot, values, gradient, weights.reshape(-1), order, slot, cut, *compact, aliases={0: 0},
        interpret=interpret)


def _cuts(slot, n_slots, chunk_size, interpret):
    """First sorted read of each chunk (and the end), and where the segment at n·chunk size ends.

    A chunk starts at n·chunk size if a segment starts there or a hot one is to be cut, and
    otherwise where the segment that spans it ends. Reads of S are in no chunk: the last one that
    has reads ends where they begin, and later ones are empty. Two binary searches a chunk, side by
    side.
    """
    size = slot.size
    chunks = pl.cdiv(size, chunk_size)

    def kernel(slot, cut, segment_end):
        at = pl.program_id(0) * TILE + jnp.arange(TILE, dtype=jnp.int32)
        position = jnp.minimum(at * chunk_size, size)
        here = slot[jnp.minimum(position, size - 1)]

        def narrowed(is_before, low, high):
            middle = (low + high) // 2
            before = is_before(slot[jnp.minimum(middle, size - 1)]) & (low < high)
            return jnp.where(before, middle + 1, low), jnp.where(before, high, middle)

        def halve(_, bounds):
            starts, ends = bounds
            return (narrowed(lambda s: s < here, *starts), narrowed(lambda s: s <= here, *ends))

        (start, _), (end, _) = jax.lax.fori_loop(
            0, size.bit_length(), halve,
            ((jnp.zeros_like(position), position), (position, jnp.full_like(position, size))))
        keep = (start == position) | (end - start > chunk_size) | (position == size)
        cut[at] = jnp.where(here < n_slots, jnp.where(keep, position, end), start)
        segment_end[at] = end

    padded = jax.ShapeDtypeStruct((pl.cdiv(chunks + 1, TILE) * TILE,), jnp.int32)
    cut, segment_end = call(kernel, 'read_backward_cuts', (padded.shape[0] // TILE,),
                            [padded, padded], slot, interpret=interpret)
    return cut[:chunks + 1], segment_end


def _stream(_no_slot, values, gradient, weights, order, slot, cut, *rest,
            blocks, compact, reads_a_step, interpret):
    """One chunk: see the module. `blocks` are the column ranges that a row is held in."""
    rows_before, (row_slots, rows, by_read, pieces) = rest[0], rest[-4:]
    chunk, size = pl.program_id(0), slot.shape[0]
    first, last = cut[chunk], cut[chunk + 1]
    head_cut, tail_cut = is_cut(slot, first), is_cut(slot, last)
    reads_per_token = size // gradient.shape[0]
    add_product = functools.partial(multiply_add, interpret=interpret)

    def index(at):
        at = jnp.minimum(at, last - 1)
        return order[at], slot[at]

    def fetch(read, slot_here):
        """What a read needs, on its way while the read before is summed."""
        token = (read.astype(jnp.uint32) // jnp.uint32(reads_per_token)).astype(jnp.int32)
        return (weights[read].astype(jnp.float32),
                [pack(plt.load(gradient.at[token, block], eviction_policy='evict_last'))
                 for block in blocks],
                [pack(values[slot_here, block]) for block in blocks])

    def steps(i, carry):
        """Several reads, so that what is on its way stays in the registers that it arrives in."""
        for n in range(reads_a_step):
            carry = step(i * reads_a_step + n, carry)
        return carry

    def step(n, carry):
        (read, here), following, (weight, g, value), held, sums, row, in_head = carry
        upcoming, after_next = fetch(*following), index(first + n + 2)
        # The branch keeps the compiler from moving the loads above below what follows.
        held, sums, row, in_head = jax.lax.cond(
            here != held, functools.partial(start_segment, here), lambda *carry: carry,
            held, sums, row, in_head)
        g, value = ([unpack(block) for block in row] for row in (g, value))
        inner = jnp.zeros_like(g[0][0])
        for part, other in zip(sum(g, []), sum(value, [])):
            inner = add_product(part, other, inner)
        by_read[read] = jnp.sum(inner)
        weight = jnp.where(first + n < last, weight, 0)     # the last one may come twice
        sums = jax.tree.map(functools.partial(add_product, weight), g, sums)
        return following, after_next, upcoming, held, sums, row, in_head

    def start_segment(here, held, sums, row, in_head):
        """Writes the sum of the segment before, and starts anew."""
        write(held, sums, row, in_head, in_head == 1)
        return here, jax.tree.map(jnp.zeros_like, sums), row + 1, in_head * 0

    def write(held, sums, row, in_head, is_piece):
        """A whole segment into its row, or the part of a hot one into this chunk's pieces."""
        row = row if compact else held

        @pl.when(is_piece)
        def _():
            for block, totals in zip(blocks, sums):
                for part, total in enumerate(totals):
                    pieces[chunk, 1 - in_head, part,
                           pl.ds(block.start // len(totals), total.size)] = total

        @pl.when(~is_piece)
        def _():
            for block, totals in zip(blocks, sums):
                total = join([total.astype(rows.dtype) for total in totals])
                plt.store(rows.at[row, block], total, eviction_policy='evict_first')

        row_slots[row] = held

    @pl.when(first < last)
    def _():
        head_row = rows_before[chunk] - head_cut.astype(jnp.int32) if compact else jnp.int32(0)
        now = index(first)
        parts = parts_of(rows.dtype)
        zeros = [[jnp.zeros(block.size // parts, jnp.float32)] * parts for block in blocks]
        *_, held, sums, row, in_head = jax.lax.fori_loop(
            0, pl.cdiv(last - first, reads_a_step), steps,
            (now, index(first + 1), fetch(*now), now[1], zeros, head_row,
             head_cut.astype(jnp.int32)))
        write(held, sums, row, in_head, (in_head == 1) | tail_cut)


def _add_pieces(_rows, pieces, slot, cut, segment_end, *rest, chunk_size, chunks, compact):
    """Adds the partial sums of each hot segment that starts in one of PIECES chunks."""
    rows_before, rows = rest[0], rest[-1]
    parts = range(pieces.shape[2])
    columns, in_part = (pl.ds(pl.program_id(1) * size, size)
                        for size in (PIECE_COLUMNS, PIECE_COLUMNS // len(parts)))
    tile = jnp.arange(PIECES, dtype=jnp.int32)
    base = pl.program_id(0) * PIECES
    at = jnp.minimum(base + tile, chunks - 1)
    first, last = cut[at], cut[at + 1]
    here = slot[jnp.maximum(last - 1, 0)]
    goes_on = is_cut(slot, first) & (slot[jnp.minimum(first, slot.shape[0] - 1)] == here)
    starts = is_cut(slot, last) & (first < last) & ~goes_on & (base + tile < chunks)

    def next_start(after):
        return jnp.min(jnp.where(starts & (tile > after), tile, PIECES))

    def add_segment(n):
        chunk = base + n
        row = rows_before[chunk + 1] - 1 if compact else slot[cut[chunk + 1] - 1]
        stop = (segment_end[chunk + 1] - 1) // chunk_size + 1

        def add_tile(i, totals):
            at = chunk + 1 + i * PIECES + tile
            return [total + jnp.where((at < stop)[:, None],
                                      pieces[jnp.minimum(at, stop - 1), 0, part, in_part], 0)
                    for part, total in zip(parts, totals)]

        totals = jax.lax.fori_loop(0, pl.cdiv(stop - chunk - 1, PIECES), add_tile,
                                   [jnp.zeros((PIECES, PIECE_COLUMNS // len(parts)), jnp.float32)
                                    ] * len(parts))
        totals = [pieces[chunk, 1, part, in_part] + jnp.sum(total, axis=0)
                  for part, total in zip(parts, totals)]
        rows[row, columns] = join([total.astype(rows.dtype) for total in totals])
        return next_start(n)

    jax.lax.while_loop(lambda n: n < PIECES, add_segment, next_start(-1))


def _clear(_rows, slots, rows, *, n_slots, blocks):
    """Zeroes the rows whose slot is none."""
    at = pl.program_id(0) * TILE + jnp.arange(TILE, dtype=jnp.int32)
    unread = plt.load(slots.at[at], mask=at < rows.shape[0], other=0) == n_slots

    @pl.when(jnp.max(unread.astype(jnp.int32)) == 1)
    def _():
        for block in blocks:
            shape = (TILE, block.size)
            column = block.start + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
            plt.store(rows.at[jnp.broadcast_to(at[:, None], shape), column],
                      jnp.zeros(shape, rows.dtype), mask=jnp.broadcast_to(unread[:, None], shape))


def is_cut(slot: Any, position: Int32[Array, '...']) -> Array:
    """Whether the sorted reads, an array or a kernel's, before and at a place are of one slot."""
    size = slot.shape[0]
    inside = (position > 0) & (position < size)
    return inside & (slot[jnp.maximum(position - 1, 0)] == slot[jnp.minimum(position, size - 1)])

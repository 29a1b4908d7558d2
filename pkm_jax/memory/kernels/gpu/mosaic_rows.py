"""What is left of the gradients' rows after the streaming pass, on an NVIDIA GPU since Hopper
(Pallas, Mosaic GPU): where chunks begin, sums of segments that were cut, rows without a read.

What `_cuts`, `_add_pieces` and `_clear` in `embedding_bag_backward` do. Bytes: each partial sum is
read once, each row without a read is written once.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int32

from pkm_jax.memory.kernels.gpu import mosaic_lanes as lanes
from pkm_jax.memory.kernels.gpu.embedding_bag_backward import is_cut
from pkm_jax.memory.kernels.gpu.mosaic import NUMBER, REF, WARPS, inline
from pkm_jax.memory.kernels.gpu.mosaic_lanes import COLUMNS

CHUNKS = 32         # of one program that looks for segments to add
ROWS_A_WARP = 16    # that are cleared, or not


def cuts(
    slot: Int32[Array, 'reads'], n_slots: int, chunk_size: int,
) -> tuple[Int32[Array, 'chunks_1'], Int32[Array, 'chunks_1']]:
    """First sorted read of each chunk (and the end), and where the segment at n·chunk size ends.
    Reads of S are in no chunk."""
    size = slot.size
    position = jnp.minimum(jnp.arange(pl.cdiv(size, chunk_size) + 1) * chunk_size, size)
    here = slot[jnp.minimum(position, size - 1)]
    start, end = (jnp.searchsorted(slot, here, side, method='scan_unrolled').astype(jnp.int32)
                  for side in ('left', 'right'))
    keep = (start == position) | (end - start > chunk_size) | (position == size)
    cut = jnp.where(here < n_slots, jnp.where(keep, position, end), start)
    return cut.astype(jnp.int32), end


def add_pieces(
    rows: Float[Array, 'rows V'], pieces: Float[Array, 'chunks 2 V'], slot: Int32[Array, 'reads'],
    cut: Int32[Array, 'chunks_1'], segment_end: Int32[Array, 'chunks_1'],
    rows_before: Int32[Array, 'chunks_1'] | None, *, chunk_size: int, interpret: bool,
) -> Float[Array, 'rows V']:
    """The rows with the sums of all segments that were cut, each in one fixed order."""
    chunks, _, width = pieces.shape
    first, last = cut[:-1], cut[1:]
    here = slot[jnp.maximum(last - 1, 0)]
    goes_on = is_cut(slot, first) & (slot[jnp.minimum(first, slot.size - 1)] == here)
    starts = is_cut(slot, last) & (first < last) & ~goes_on
    more = -chunks % CHUNKS
    stop = jnp.where(starts, (segment_end[1:] - 1) // chunk_size + 1, 0)    # 0: none starts
    stops = jnp.pad(stop, (0, more))
    into = jnp.pad(here if rows_before is None else rows_before[1:] - 1, (0, more))
    busy = jnp.max(stops.reshape(-1, CHUNKS), axis=1)
    table = jax.new_ref(rows)

    def read_backward_add(pieces, stops, into, busy, totals):
        tile = jax.lax.axis_index('tile')
        column = jax.lax.axis_index('columns') * COLUMNS

        @pl.when(busy[tile] != 0)
        def _():
            @pl.loop(0, CHUNKS)
            def _(number):
                chunk = tile * CHUNKS + number
                stop = stops[chunk]

                @pl.when(stop != 0)
                def _():
                    _add_segment(table, pieces, totals, chunk, stop, into[chunk], column, interpret)

    plgpu.kernel(
        read_backward_add, out_type=(), grid=(width // COLUMNS, len(busy)),
        grid_names=('columns', 'tile'),
        scratch_types=[plgpu.SMEM((WARPS, COLUMNS), jnp.float32)],
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )(pieces, stops, into, busy)
    return table[...]


def _add_segment(rows, pieces, totals, chunk, stop, row, column, interpret):
    """The tail of a chunk and the heads of those before `stop`, in COLUMNS columns, to a row."""
    if not interpret:
        inline(lanes.add_segment, (REF, REF, REF, *(NUMBER,) * 4), rows, pieces, totals, chunk,
               stop, row, column)
        return
    at = pl.ds(column, COLUMNS)
    total = jax.lax.fori_loop(chunk + 1, stop, lambda n, total: total + pieces[n, 0, at],
                              jnp.zeros(COLUMNS, jnp.float32))
    rows[row, at] = (pieces[chunk, 1, at] + total).astype(rows.dtype)


def clear(
    rows: Float[Array, 'rows V'], slots: Int32[Array, 'rows'], n_slots: int, *, interpret: bool,
) -> Float[Array, 'rows V']:
    """The rows with zeros in those whose slot is `n_slots`."""
    n_rows, table = len(rows), jax.new_ref(rows)
    tile = WARPS * ROWS_A_WARP

    def read_backward_clear(slots):
        first = jax.lax.axis_index('tile') * tile
        if not interpret:
            inline(functools.partial(lanes.clear, ROWS_A_WARP, n_slots), (REF, REF, NUMBER),
                   table, slots, first)
            return

        @pl.loop(0, tile)
        def _(number):
            row = jnp.minimum(first + number, n_rows - 1)

            @pl.when(slots[row] == n_slots)
            def _():
                table[row, :] = jnp.zeros(rows.shape[1], rows.dtype)

    plgpu.kernel(
        read_backward_clear, out_type=(), grid=(pl.cdiv(n_rows, tile),), grid_names=('tile',),
        interpret=plgpu.InterpretGPUParams() if interpret else None)(slots)
    return table[...]

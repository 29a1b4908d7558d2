"""Rows that every warp of a warpgroup copies, holds and writes for itself (Pallas, Mosaic GPU).

Mosaic GPU programs a warpgroup as one thread. A read of a value table is work for one warp: a row
of a tile [4, width] is that of one warp, and of numbers [4] (`BY_WARP`) each warp holds its own.
What follows is what a warp does without the other three: it starts bulk copies of rows
(`cp.async.bulk`), each of which counts its bytes on the warp's own barrier; waits for them; takes
them into registers; writes a row. Where a program is interpreted the same is done by operations of
Pallas, for one warp after another.

A row of bfloat16 numbers is held as two float32 parts, the numbers at even and at odd places, which
one operation each makes of a word; a row of float32 numbers is one part.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from pkm_jax.memory.kernels.gpu import mosaic_lanes as lanes
from pkm_jax.memory.kernels.gpu.mosaic_lanes import LANES, WARPS

BY_WARP = plgpu.Layout.TILED(plgpu.Tiling(((WARPS,), (1,))), warp_dims=(-2,),
                             lane_dims=(plgpu.Replicated(LANES),), vector_dim=-1)
NUMBER = plgpu.Layout.WG_SPLAT(())      # the same in all warps
REF = plgpu.RefType()

Parts = list[Float[Array, '4 columns']]


def part_layout(columns: int) -> Any:
    """Layout of [4, columns] float32: a row a warp, in pieces of up to 16 bytes a lane."""
    piece = lanes.piece_of(columns)
    return plgpu.Layout.TILED(plgpu.Tiling(((WARPS, LANES * piece), (piece,))),
                              warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)


def parts_of(dtype: DTypeLike) -> int:
    """Float32 parts that a row is held in."""
    return 4 // jnp.dtype(dtype).itemsize


def no_parts(width: int, dtype: DTypeLike) -> Parts:
    """Zeros for rows [4, width]."""
    columns = width // parts_of(dtype)
    return [plgpu.layout_cast(jnp.zeros((WARPS, columns), jnp.float32), part_layout(columns))
            for _ in range(parts_of(dtype))]


def as_columns(by_warp: Float[Array, '4'], part: Float[Array, '4 columns']) -> Array:
    """[4] as wide as a part."""
    return plgpu.layout_cast(jax.lax.broadcast_in_dim(by_warp, part.shape, (0,)),
                             part_layout(part.shape[1]))


def inline(function: Callable, kinds: tuple, *arguments: Any, returns: Any = None) -> Any:
    """What lanes do with arguments of these kinds."""
    return plgpu.inline_mgpu(arg_types=kinds, return_type=returns)(function)(*arguments)


def own(numbers: Any, at: Int32[Array, ''], *, interpret: bool) -> Array:
    """[4]: of [4, n] in shared memory each warp the number at a place of its own row."""
    if interpret:
        return numbers[:, at]
    like = plgpu.ShapeDtypeStruct((WARPS,), numbers.dtype, layout=BY_WARP)
    return inline(lanes.own_of_warp, (REF, NUMBER), numbers, at, returns=like)


def load(rows: Any, *, interpret: bool) -> Parts:
    """Rows [4, width] in shared memory, of which each warp takes its own."""
    number = parts_of(rows.dtype)
    if interpret:
        return [rows[...][:, part::number].astype(jnp.float32) for part in range(number)]
    return list(inline(lanes.load_of_warp, (REF,), rows, returns=_like(rows, number)))


def renew(
    totals: Parts, held: Parts, rows: Any, want: Int32[Array, '4'], *, interpret: bool,
) -> tuple[Parts, Parts]:
    """Where it is wanted: zeros for the totals, and rows [4, width] in shared memory as `held`."""
    number = len(totals)
    if interpret:
        new = (want != 0)[:, None]
        return ([jnp.where(new, 0, total) for total in totals],
                [jnp.where(new, *both) for both in zip(load(rows, interpret=True), held)])
    like = _like(rows, 2 * number)
    result = inline(lanes.renew_of_warp, (REF, BY_WARP, *(part.layout for part in like)),
                     rows, want, *totals, *held, returns=like)
    return list(result[:number]), list(result[number:])


def _like(rows, number):
    columns = rows.shape[1] // parts_of(rows.dtype)
    return (plgpu.ShapeDtypeStruct((WARPS, columns), jnp.float32,
                                   layout=part_layout(columns)),) * number


def store(
    table: Any, parts: Parts, row: Int32[Array, '4'], want: Int32[Array, '4'], *, interpret: bool,
) -> None:
    """Writes the rows that are wanted, in the table's dtype, to rows of the table."""
    if interpret:
        tile = jnp.stack(parts, axis=-1).reshape(WARPS, -1).astype(table.dtype)
        for warp in range(WARPS):
            @pl.when(want[warp] != 0)
            def _(warp=warp):
                table[row[warp], :] = tile[warp]
    else:
        layout = part_layout(parts[0].shape[1])
        inline(lanes.store_of_warp, (REF, BY_WARP, BY_WARP, *(layout for _ in parts)),
                table, row, want, *parts)


def finish(
    rows: Any, pieces: Any, numbers: Any, parts: Parts, *, number: Int32[Array, '4'],
    row: Int32[Array, '4'], piece: Int32[Array, '4'], is_piece: Int32[Array, '4'],
    want: Int32[Array, '4'], interpret: bool,
) -> None:
    """Where it is wanted: writes a row to its place among the rows, or among the pieces if it is
    one, and its number to its place among the numbers."""
    if interpret:
        store(rows, parts, row, want * (1 - is_piece), interpret=True)
        store(pieces, parts, piece, want * is_piece, interpret=True)
        store_numbers(numbers, number, row, want, interpret=True)
    else:
        layout = part_layout(parts[0].shape[1])
        inline(lanes.finish_of_warp, (REF,) * 3 + (BY_WARP,) * 5 + (layout,) * len(parts),
                rows, pieces, numbers, number, row, piece, is_piece, want, *parts)


def store_numbers(
    out: Any, number: Array, at: Int32[Array, '4'], want: Int32[Array, '4'], *, interpret: bool,
) -> None:
    """Writes the numbers that are wanted to places of a vector."""
    if interpret:
        for warp in range(WARPS):
            @pl.when(want[warp] != 0)
            def _(warp=warp):
                out[at[warp]] = number[warp]
    else:
        inline(lanes.store_numbers_of_warp, (REF, *(BY_WARP,) * 3), out, number, at, want)


@dataclasses.dataclass(frozen=True)
class RowCopies:
    """Stages of rows in shared memory, of which each warp fills and reads its own.

    There is a power of two of them, and a stage has `copies` rows of `width` columns for each warp.
    Use the scratch that `scratch` says, `begin` once, and for step 0, 1, 2, … `start` (up to
    `stages` steps ahead), then `wait`.
    """
    stages: int
    copies: int
    width: int
    dtype: DTypeLike
    interpret: bool

    @property
    def scratch(self) -> list:
        """Types of the rows, [stages, copies, 4, width], and of the barriers."""
        rows = plgpu.SMEM((self.stages, self.copies, WARPS, self.width), self.dtype)
        if self.interpret:
            return [rows, plgpu.Barrier(num_arrivals=self.copies * WARPS, num_barriers=self.stages)]
        return [rows, plgpu.SMEM((self.stages, WARPS, 2), jnp.uint32)]  # of 8 bytes each

    def begin(self, barriers: Any) -> None:
        """Makes the barriers; all warps wait for it."""
        if not self.interpret:
            inline(functools.partial(lanes.make_barriers, self.stages * WARPS), (REF,), barriers)

    def start(
        self, step: Int32[Array, ''], rows: Any, barriers: Any, wanted: Sequence[tuple],
    ) -> None:
        """Starts the copies of a step: for each a table, its rows [4], which [4] to copy, and the
        share of them that L2 is asked to keep.

        A warp has read what it copied `stages` steps before.
        """
        stage = step & (self.stages - 1)
        if self.interpret:
            for copy, (table, row, *_) in enumerate(wanted):     # all: it knows no predicates
                for warp in range(WARPS):
                    plgpu.copy_gmem_to_smem(
                        table.at[row[warp]], rows.at[stage, copy, warp], barriers.at[stage])
            return
        flat = [part for copy in wanted for part in copy[:3]]
        kept = tuple(copy[3] for copy in wanted)
        inline(functools.partial(lanes.start_copies_of_warp, self.width, kept),
                (REF, REF, *(REF, BY_WARP, BY_WARP) * len(wanted)),
                rows.at[stage], barriers.at[stage], *flat)

    def wait(self, step: Int32[Array, ''], barriers: Any) -> Int32[Array, '']:
        """Waits for the copies of a step, and returns its stage."""
        stage = step & (self.stages - 1)
        if self.interpret:
            plgpu.barrier_wait(barriers.at[stage])
        else:
            phase = step >> (self.stages.bit_length() - 1) & 1
            inline(lanes.wait_of_warp, (REF, NUMBER), barriers.at[stage], phase)
        return stage

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
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils
from jax.experimental.mosaic.gpu.fragmented_array import FragmentedArray
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, nvvm, scf, vector
from jaxtyping import Array, Float, Int32

WARPS = 4       # of a warpgroup
LANES = 32      # of a warp
PATIENCE = 10_000_000       # ns that a wait sleeps at most before it looks again
BY_WARP = plgpu.Layout.TILED(plgpu.Tiling(((WARPS,), (1,))), warp_dims=(-2,),
                             lane_dims=(plgpu.Replicated(LANES),), vector_dim=-1)
NUMBER = plgpu.Layout.WG_SPLAT(())      # the same in all warps
REF = plgpu.RefType()

Parts = list[Float[Array, '4 columns']]


def part_layout(columns: int) -> Any:
    """Layout of [4, columns] float32: a row a warp, in pieces of up to 16 bytes a lane."""
    piece = _piece(columns)
    return plgpu.Layout.TILED(plgpu.Tiling(((WARPS, LANES * piece), (piece,))),
                              warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)


def _piece(columns):
    return math.gcd(columns // LANES, 4)


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


def own(numbers: Any, at: Int32[Array, ''], *, interpret: bool) -> Array:
    """[4]: of [4, n] in shared memory each warp the number at a place of its own row."""
    if interpret:
        return numbers[:, at]
    like = plgpu.ShapeDtypeStruct((WARPS,), numbers.dtype, layout=BY_WARP)
    return plgpu.inline_mgpu(arg_types=(REF, NUMBER), return_type=like)(_own)(numbers, at)


def load(rows: Any, *, interpret: bool) -> Parts:
    """Rows [4, width] in shared memory, of which each warp takes its own."""
    number = parts_of(rows.dtype)
    if interpret:
        return [rows[...][:, part::number].astype(jnp.float32) for part in range(number)]
    return list(plgpu.inline_mgpu(arg_types=(REF,), return_type=_like(rows, number))(_load)(rows))


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
    result = plgpu.inline_mgpu(
        arg_types=(REF, BY_WARP, *(part.layout for part in like)), return_type=like)(_renew)(
            rows, want, *totals, *held)
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
        plgpu.inline_mgpu(arg_types=(REF, BY_WARP, BY_WARP, *(layout for _ in parts)))(_store)(
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
        plgpu.inline_mgpu(arg_types=(REF,) * 3 + (BY_WARP,) * 5 + (layout,) * len(parts))(_finish)(
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
        plgpu.inline_mgpu(arg_types=(REF, BY_WARP, BY_WARP, BY_WARP))(_store_numbers)(
            out, number, at, want)


@dataclasses.dataclass(frozen=True)
class RowCopies:
    """Stages of rows in shared memory, of which each warp fills and reads its own.

    A stage has `copies` rows of `width` columns for each warp; there are a power of two of them. Use the scratch that `scratch` says,
    `begin` once, and for step 0, 1, 2, … `start` (up to `stages` steps ahead), then `wait`.
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
            plgpu.inline_mgpu(arg_types=(REF,))(
                functools.partial(_make_barriers, self.stages * WARPS))(barriers)

    def start(
        self, step: Int32[Array, ''], rows: Any, barriers: Any, wanted: Sequence[tuple],
    ) -> None:
        """Starts the copies of a step: for each a table, its rows [4] and which [4] to copy.

        A warp has read what it copied `stages` steps before.
        """
        stage = step & (self.stages - 1)
        if self.interpret:
            for copy, (table, row, _) in enumerate(wanted):     # all: it knows no predicates
                for warp in range(WARPS):
                    plgpu.copy_gmem_to_smem(
                        table.at[row[warp]], rows.at[stage, copy, warp], barriers.at[stage])
            return
        flat = [part for copy in wanted for part in copy]
        plgpu.inline_mgpu(arg_types=(REF, REF, *(REF, BY_WARP, BY_WARP) * len(wanted)))(
            functools.partial(_start_copies, self.width))(
                rows.at[stage], barriers.at[stage], *flat)

    def wait(self, step: Int32[Array, ''], barriers: Any) -> Int32[Array, '']:
        """Waits for the copies of a step, and returns its stage."""
        stage = step & (self.stages - 1)
        if self.interpret:
            plgpu.barrier_wait(barriers.at[stage])
        else:
            phase = step >> (self.stages.bit_length() - 1) & 1
            plgpu.inline_mgpu(arg_types=(REF, NUMBER))(_wait)(barriers.at[stage], phase)
        return stage


# What follows is built for one lane of one warp; pointers count elements.

def constant(value, bits=32):
    return arith.constant(ir.IntegerType.get_signless(bits), value)


def number_of(array):
    register = array.registers.item()
    if isinstance(register.type, ir.VectorType):
        return llvm.extractelement(register, constant(0))
    return register


def _is(want):
    return arith.cmpi(arith.CmpIPredicate.ne, number_of(want), constant(0))


def element(ref, index):
    """Pointer to an element of a contiguous array, by an index of 32 bits."""
    wide = arith.extsi(ir.IntegerType.get_signless(64), index)
    return utils.getelementptr(utils.memref_ptr(ref), [wide], ir.MemRefType(ref.type).element_type)


def _row(ref, row):
    """Pointer to a row of a matrix whose rows are contiguous."""
    kind = ir.MemRefType(ref.type)
    stride = kind.get_strides_and_offset()[0][0]
    wide = arith.muli(arith.extsi(ir.IntegerType.get_signless(64), row), constant(stride, 64))
    return utils.getelementptr(utils.memref_ptr(ref), [wide], kind.element_type)


def lane_index():
    return arith.remui(utils.thread_idx(), constant(LANES))


def _barrier(barriers):
    """This warp's of four barriers."""
    return utils.getelementptr(utils.memref_ptr(barriers), [utils.warp_idx(sync=True)],
                               ir.IntegerType.get_signless(64))


def _make_barriers(number, _, barriers):
    base, word = utils.memref_ptr(barriers), ir.IntegerType.get_signless(64)
    first = utils.single_thread_predicate(utils.ThreadSubset.WARPGROUP)
    for at in range(number):
        nvvm.mbarrier_init(utils.getelementptr(base, [at], word), constant(1), predicate=first)
    nvvm.fence_mbarrier_init()
    utils.warpgroup_barrier()


def _start_copies(width, _, rows, barriers, *wanted):
    utils.warp_barrier()        # all lanes have read what was there
    lane = utils.single_thread_predicate(utils.ThreadSubset.WARP)
    warp, barrier = utils.warp_idx(sync=True), _barrier(barriers)
    size = constant(width * utils.bitwidth(ir.MemRefType(rows.type).element_type) // 8)
    copies = list(zip(wanted[::3], wanted[1::3], map(_is, wanted[2::3])))
    sizes = [arith.select(want, size, constant(0)) for *_, want in copies]
    nvvm.mbarrier_arrive_expect_tx(barrier, functools.reduce(arith.addi, sizes), predicate=lane)
    for copy, (table, row, want) in enumerate(copies):
        to = arith.muli(arith.addi(warp, constant(copy * WARPS)), constant(width))
        llvm.inline_asm(
            ir.Type.parse('!llvm.void'),
            [arith.andi(lane, want), element(rows, to), _row(table, number_of(row)), size, barrier],
            '@$0 cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes [$1], [$2], $3, [$4];',
            'b,l,l,r,l', has_side_effects=True)


def _wait(_, barriers, phase):
    nvvm.mbarrier_try_wait_parity(_barrier(barriers), number_of(phase), constant(PATIENCE))


def _loaded(rows):
    """Registers of each part of this warp's row."""
    kind = ir.MemRefType(rows.type)
    width, is_float32 = kind.shape[1], isinstance(kind.element_type, ir.F32Type)
    number = 1 if is_float32 else 2
    piece = _piece(width // number)
    first = arith.addi(arith.muli(utils.warp_idx(sync=False), constant(width)),
                       arith.muli(lane_index(), constant(piece * number)))
    words = ir.VectorType.get((piece,), ir.IntegerType.get_signless(32))
    floats = ir.VectorType.get((piece,), ir.F32Type.get())

    def all_of(value):
        return arith.constant(words, ir.DenseElementsAttr.get_splat(
            words, ir.IntegerAttr.get(words.element_type, value)))

    parts = [[] for _ in range(number)]
    pointer = element(rows, first)
    for block in range(width // (LANES * piece * number)):
        here = llvm.load(floats if is_float32 else words, utils.getelementptr(
            pointer, [block * LANES * piece * number], kind.element_type))
        if is_float32:
            parts[0].append(here)
        else:
            parts[0].append(vector.bitcast(floats, arith.shli(here, all_of(16))))
            parts[1].append(vector.bitcast(floats, arith.andi(here, all_of(-1 << 16))))
    return parts


def _array(registers, columns):
    layout = part_layout(columns).to_mgpu()
    return FragmentedArray(
        _registers=np.array(registers, dtype=object).reshape(layout.registers_shape((WARPS, columns))),
        _layout=layout, _is_signed=None)


def _own(_, numbers, at):
    kind = ir.MemRefType(numbers.type)
    place = arith.addi(arith.muli(utils.warp_idx(sync=False), constant(kind.shape[1])), number_of(at))
    register = llvm.load(ir.VectorType.get((1,), kind.element_type), element(numbers, place))
    return FragmentedArray(
        _registers=np.array([register], dtype=object).reshape(
            BY_WARP.to_mgpu().registers_shape((WARPS,))), _layout=BY_WARP.to_mgpu(),
        _is_signed=None if isinstance(kind.element_type, ir.FloatType) else True)


def _load(_, rows):
    columns = ir.MemRefType(rows.type).shape[1]
    parts = _loaded(rows)
    return tuple(_array(part, columns // len(parts)) for part in parts)


def _renew(_, rows, want, *old):
    registers = [list(part.registers.flat) for part in old]
    kind = registers[0][0].type
    branch = scf.IfOp(_is(want), [kind] * sum(map(len, registers)), has_else=True)
    with ir.InsertionPoint(branch.then_block):
        # In assembly, so that zeros stay in the branch; else each sum is selected at every step.
        zeros = [_zero(kind) for part in registers[:len(old) // 2] for _ in part]
        scf.yield_(zeros + sum(_loaded(rows), []))
    with ir.InsertionPoint(branch.else_block):
        scf.yield_(sum(registers, []))
    return tuple(_array(part, like.shape[1])
                 for part, like in zip(np.split(np.array(list(branch.results), dtype=object),
                                                len(old)), old))


def _zero(kind):
    numbers = llvm.mlir_undef(kind)
    for at in range(kind.shape[0]):
        zero = llvm.inline_asm(ir.F32Type.get(), [], 'mov.f32 $0, 0f00000000;', '=f',
                               has_side_effects=True)
        numbers = llvm.insertelement(numbers, zero, constant(at))
    return numbers


def _store(_, table, row, want, *parts):
    with utils.when(_is(want)):
        _store_parts(table, number_of(row), parts)


def _finish(_, rows, pieces, numbers, number, row, piece, is_piece, want, *parts):
    with utils.when(_is(want)):
        branch = scf.IfOp(_is(is_piece), has_else=True)
        for block, table, at in ((branch.then_block, pieces, piece),
                                 (branch.else_block, rows, row)):
            with ir.InsertionPoint(block):
                _store_parts(table, number_of(at), parts)
                scf.yield_([])
        with utils.when(arith.cmpi(arith.CmpIPredicate.eq, lane_index(), constant(0))):
            llvm.store(number_of(number), element(numbers, number_of(row)))


def _store_parts(table, row, parts):
    """Writes this warp's row: numbers of the parts by turns, in the table's dtype."""
    kind = ir.MemRefType(table.type).element_type
    piece = _piece(parts[0].shape[1])
    turns = piece * len(parts)
    first = utils.getelementptr(_row(table, row), [arith.muli(lane_index(), constant(turns))], kind)
    for block, registers in enumerate(zip(*(part.registers.flat for part in parts))):
        joined = llvm.mlir_undef(ir.VectorType.get((turns,), ir.F32Type.get()))
        for at in range(turns):
            number = llvm.extractelement(registers[at % len(parts)], constant(at // len(parts)))
            joined = llvm.insertelement(joined, number, constant(at))
        if not isinstance(kind, ir.F32Type):
            joined = arith.truncf(ir.VectorType.get((turns,), kind), joined)
        llvm.store(joined, utils.getelementptr(first, [block * LANES * turns], kind))


def _store_numbers(_, out, number, at, want):
    lane = utils.single_thread_predicate(utils.ThreadSubset.WARP)
    with utils.when(arith.andi(lane, _is(want))):
        llvm.store(number_of(number), element(out, number_of(at)))

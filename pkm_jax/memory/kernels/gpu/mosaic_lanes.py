"""What one warp does in a kernel for Mosaic GPU, as code of its lanes; see `mosaic`.

Functions build MLIR where they are called, for the one of four warps that a lane is in. Pointers
count elements. The first argument of those that `mosaic` inlines is the launch, which none needs.
"""

import functools
import math
from typing import Any

import numpy as np
from jax.experimental.mosaic.gpu import fragmented_array, utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, nvvm, scf, vector

WARPS = 4       # of a warpgroup
LANES = 32      # of a warp
WIDE = 4        # numbers of 4 bytes, or words, that a lane loads or stores together
COLUMNS = WIDE * LANES      # of partial sums that a warp adds: WIDE for a lane, one for a thread
IN_FLIGHT = 16      # partial sums that a lane has asked for before it adds the first of them
PATIENCE = 10_000_000       # ns that a wait sleeps at most before it looks again
COPY = '@$0 cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes'


def piece_of(columns: int) -> int:
    """Float32 numbers of a row that a lane holds together: up to 16 bytes."""
    return math.gcd(columns // LANES, 4)


def constant(value: int, bits: int = 32) -> ir.Value:
    """A whole number."""
    return arith.constant(ir.IntegerType.get_signless(bits), value)


def splat(kind: ir.VectorType, value: int | float) -> ir.Value:
    """A vector of one number."""
    element = kind.element_type
    attribute = ir.FloatAttr if isinstance(element, ir.F32Type) else ir.IntegerAttr
    return arith.constant(kind, ir.DenseElementsAttr.get_splat(
        kind, attribute.get(element, value)))


def wide(number: ir.Value) -> ir.Value:
    """A whole number in 64 bits."""
    return arith.extsi(ir.IntegerType.get_signless(64), number)


def number_of(array: Any) -> ir.Value:
    """What this warp holds of [4], this thread of an array as long as there are threads, or the one
    number of an array."""
    register = array.registers.item()
    if isinstance(register.type, ir.VectorType):
        return llvm.extractelement(register, constant(0))
    return register


def _is(want):
    return arith.cmpi(arith.CmpIPredicate.ne, number_of(want), constant(0))


def element(ref: ir.Value, index: ir.Value) -> ir.Value:
    """Pointer to an element of a contiguous array, by an index of 32 bits."""
    return utils.getelementptr(utils.memref_ptr(ref), [wide(index)],
                               ir.MemRefType(ref.type).element_type)


def loaded(ref: ir.Value, index: ir.Value) -> ir.Value:
    """An element of a contiguous array."""
    return llvm.load(ir.MemRefType(ref.type).element_type, element(ref, index))


def row_of(ref: ir.Value, row: ir.Value) -> ir.Value:
    """Pointer to a row of a matrix whose rows are contiguous."""
    kind = ir.MemRefType(ref.type)
    stride = constant(kind.get_strides_and_offset()[0][0], 64)
    return utils.getelementptr(utils.memref_ptr(ref), [arith.muli(wide(row), stride)],
                               kind.element_type)


def lane_index() -> ir.Value:
    """Of this thread in its warp."""
    return arith.remui(utils.thread_idx(), constant(LANES))


def _barrier(barriers):
    """This warp's of four barriers."""
    return utils.getelementptr(utils.memref_ptr(barriers), [utils.warp_idx(sync=True)],
                               ir.IntegerType.get_signless(64))


def make_barriers(number: int, _: Any, barriers: Any) -> None:
    """Barriers that wait for one arrival each; all warps wait for them."""
    base, word = utils.memref_ptr(barriers), ir.IntegerType.get_signless(64)
    first = utils.single_thread_predicate(utils.ThreadSubset.WARPGROUP)
    for at in range(number):
        nvvm.mbarrier_init(utils.getelementptr(base, [at], word), constant(1), predicate=first)
    nvvm.fence_mbarrier_init()
    utils.warpgroup_barrier()


def start_copies_of_warp(
    width: int, kept: tuple, _: Any, rows: Any, barriers: Any, *wanted: Any
) -> None:
    """See `mosaic.RowCopies.start`."""
    utils.warp_barrier()        # all lanes have read what was there
    lane = utils.single_thread_predicate(utils.ThreadSubset.WARP)
    warp, barrier = utils.warp_idx(sync=True), _barrier(barriers)
    size = constant(width * utils.bitwidth(ir.MemRefType(rows.type).element_type) // 8)
    copies = list(zip(wanted[::3], wanted[1::3], map(_is, wanted[2::3])))
    sizes = [arith.select(want, size, constant(0)) for *_, want in copies]
    nvvm.mbarrier_arrive_expect_tx(barrier, functools.reduce(arith.addi, sizes), predicate=lane)
    for copy, (table, row, want) in enumerate(copies):
        to = arith.muli(arith.addi(warp, constant(copy * WARPS)), constant(width))
        operands = [arith.andi(lane, want), element(rows, to), row_of(table, number_of(row)), size,
                    barrier]
        if kept[copy]:
            policy = llvm.inline_asm(
                ir.IntegerType.get_signless(64), [],
                f'createpolicy.fractional.L2::evict_last.b64 $0, {kept[copy]:.2f};', '=l')
            llvm.inline_asm(ir.Type.parse('!llvm.void'), [*operands, policy],
                            COPY + '.L2::cache_hint [$1], [$2], $3, [$4], $5;', 'b,l,l,r,l,l',
                            has_side_effects=True)
        else:
            llvm.inline_asm(ir.Type.parse('!llvm.void'), operands,
                            COPY + ' [$1], [$2], $3, [$4];', 'b,l,l,r,l', has_side_effects=True)


def wait_of_warp(_: Any, barriers: Any, phase: Any) -> None:
    """See `mosaic.RowCopies.wait`."""
    nvvm.mbarrier_try_wait_parity(_barrier(barriers), number_of(phase), constant(PATIENCE))


def _loaded(rows):
    """Registers of each part of this warp's row."""
    kind = ir.MemRefType(rows.type)
    width, is_float32 = kind.shape[1], isinstance(kind.element_type, ir.F32Type)
    number = 1 if is_float32 else 2
    piece = piece_of(width // number)
    first = arith.addi(arith.muli(utils.warp_idx(sync=False), constant(width)),
                       arith.muli(lane_index(), constant(piece * number)))
    words = ir.VectorType.get((piece,), ir.IntegerType.get_signless(32))
    floats = ir.VectorType.get((piece,), ir.F32Type.get())

    parts = [[] for _ in range(number)]
    pointer = element(rows, first)
    for block in range(width // (LANES * piece * number)):
        here = llvm.load(floats if is_float32 else words, utils.getelementptr(
            pointer, [block * LANES * piece * number], kind.element_type))
        if is_float32:
            parts[0].append(here)
        else:
            parts[0].append(vector.bitcast(floats, arith.shli(here, splat(words, 16))))
            parts[1].append(vector.bitcast(floats, arith.andi(here, splat(words, -1 << 16))))
    return parts


BY_WARP = fragmented_array.TiledLayout(
    fragmented_array.Tiling(((WARPS,), (1,))), warp_dims=(-2,),
    lane_dims=(fragmented_array.Replicated(LANES),), vector_dim=-1)


def part_layout(columns: int) -> Any:
    """Of [4, columns] float32: a row a warp."""
    piece = piece_of(columns)
    return fragmented_array.TiledLayout(
        fragmented_array.Tiling(((WARPS, LANES * piece), (piece,))), warp_dims=(-3,),
        lane_dims=(-2,), vector_dim=-1)


def _array(registers, columns):
    layout = part_layout(columns)
    return fragmented_array.FragmentedArray(
        _registers=np.array(registers, dtype=object).reshape(
            layout.registers_shape((WARPS, columns))), _layout=layout, _is_signed=None)


def own_of_warp(_: Any, numbers: Any, at: Any) -> Any:
    """See `mosaic.own`."""
    kind = ir.MemRefType(numbers.type)
    row = arith.muli(utils.warp_idx(sync=False), constant(kind.shape[1]))
    place = arith.addi(row, number_of(at))
    register = llvm.load(ir.VectorType.get((1,), kind.element_type), element(numbers, place))
    return fragmented_array.FragmentedArray(
        _registers=np.array([register], dtype=object).reshape(
            BY_WARP.registers_shape((WARPS,))), _layout=BY_WARP,
        _is_signed=None if isinstance(kind.element_type, ir.FloatType) else True)


def load_of_warp(_: Any, rows: Any) -> tuple:
    """See `mosaic.load`."""
    columns = ir.MemRefType(rows.type).shape[1]
    parts = _loaded(rows)
    return tuple(_array(part, columns // len(parts)) for part in parts)


def renew_of_warp(_: Any, rows: Any, want: Any, *old: Any) -> tuple:
    """See `mosaic.renew`."""
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


def store_of_warp(_: Any, table: Any, row: Any, want: Any, *parts: Any) -> None:
    """See `mosaic.store`."""
    with utils.when(_is(want)):
        _store_parts(table, number_of(row), parts)


def finish_of_warp(
    _: Any, rows: Any, pieces: Any, numbers: Any, number: Any, row: Any,
    piece: Any, is_piece: Any, want: Any, *parts: Any,
) -> None:
    """See `mosaic.finish`."""
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
    piece = piece_of(parts[0].shape[1])
    turns = piece * len(parts)
    first = utils.getelementptr(row_of(table, row), [
        arith.muli(lane_index(), constant(turns))], kind)
    for block, registers in enumerate(zip(*(part.registers.flat for part in parts))):
        joined = llvm.mlir_undef(ir.VectorType.get((turns,), ir.F32Type.get()))
        for at in range(turns):
            number = llvm.extractelement(registers[at % len(parts)], constant(at // len(parts)))
            joined = llvm.insertelement(joined, number, constant(at))
        if not isinstance(kind, ir.F32Type):
            joined = arith.truncf(ir.VectorType.get((turns,), kind), joined)
        llvm.store(joined, utils.getelementptr(first, [block * LANES * turns], kind))


def store_numbers_of_warp(_: Any, out: Any, number: Any, at: Any, want: Any) -> None:
    """See `mosaic.store_numbers`."""
    lane = utils.single_thread_predicate(utils.ThreadSubset.WARP)
    with utils.when(arith.andi(lane, _is(want))):
        llvm.store(number_of(number), element(out, number_of(at)))


def fill_of_warp(
    steps: int, reads: int, _: Any, order: Any, slot: Any, weights: Any, plan: Any, scale: Any,
    first: Any, length: Any,
) -> None:
    """`mosaic_backward._fill` by the lanes of a warp, one step each at a time."""
    first, length, warp = number_of(first), number_of(length), utils.warp_idx(sync=False)
    end = arith.subi(arith.addi(first, length), constant(1))

    def between(low, at, high):
        return arith.minsi(arith.maxsi(at, low), high)

    for block in range(0, steps, LANES):
        step = arith.addi(lane_index(), constant(block))
        at = between(constant(0), arith.minsi(arith.addi(first, step), end), constant(reads - 1))
        read, here = loaded(order, at), loaded(slot, at)
        before = loaded(slot, arith.maxsi(arith.subi(at, constant(1)), constant(0)))
        inside = arith.cmpi(arith.CmpIPredicate.slt, step, length)
        new = arith.ori(arith.cmpi(arith.CmpIPredicate.eq, step, constant(0)),
                        arith.cmpi(arith.CmpIPredicate.ne, here, before))
        new = arith.extui(step.type, arith.andi(inside, new))
        weight = arith.select(inside, loaded(weights, read),
                              arith.constant(ir.F32Type.get(), 0.0))
        place = arith.addi(arith.muli(step, constant(WARPS)), warp)
        for number, (ref, value) in enumerate(((plan, read), (plan, here), (plan, new))):
            llvm.store(value, element(ref, arith.addi(place, constant(number * steps * WARPS))))
        llvm.store(weight, element(scale, place))
    utils.warp_barrier()


def add_segment(
    _: Any, rows: Any, pieces: Any, totals: Any, chunk: Any, stop: Any, row: Any, column: Any,
) -> None:
    """See `mosaic_rows._add_segment`: each warp adds every fourth piece, WIDE columns a lane; then
    each thread adds the four warps' sums of one column to the tail."""
    chunk, stop, row, column = map(number_of, (chunk, stop, row, column))
    kind = ir.MemRefType(pieces.type)
    _, sides, width = kind.shape
    four = ir.VectorType.get((WIDE,), ir.F32Type.get())
    nothing = splat(four, 0.)
    columns = arith.addi(column, arith.muli(lane_index(), constant(WIDE)))

    def piece(at, side, first):
        place = arith.addi(arith.muli(wide(at), constant(sides * width, 64)),
                           arith.addi(wide(first), constant(side * width, 64)))
        return utils.getelementptr(utils.memref_ptr(pieces), [place], kind.element_type)

    begin = arith.addi(arith.addi(chunk, constant(1)), utils.warp_idx(sync=False))
    loop = scf.ForOp(begin, stop, constant(WARPS * IN_FLIGHT), [nothing])
    with ir.InsertionPoint(loop.body):
        pieces_here = []
        for number in range(IN_FLIGHT):
            at = arith.addi(loop.induction_variable, constant(number * WARPS))
            inside = arith.cmpi(arith.CmpIPredicate.slt, at, stop)
            there = llvm.load(four, piece(arith.select(inside, at, chunk), 0, columns))
            pieces_here.append(arith.select(inside, there, nothing))
        scf.yield_([functools.reduce(arith.addf, pieces_here, loop.inner_iter_args[0])])
    place = arith.addi(arith.muli(utils.warp_idx(sync=False), constant(COLUMNS)),
                       arith.muli(lane_index(), constant(WIDE)))
    utils.warpgroup_barrier()       # all have added what was there
    llvm.store(loop.results[0], element(totals, place))
    utils.warpgroup_barrier()
    here = arith.addi(column, utils.thread_idx())
    total = llvm.load(kind.element_type, piece(chunk, 1, here))
    for warp in range(WARPS):
        at = arith.addi(utils.thread_idx(), constant(warp * COLUMNS))
        total = arith.addf(total, loaded(totals, at))
    out = ir.MemRefType(rows.type).element_type
    number = total if isinstance(out, ir.F32Type) else arith.truncf(out, total)
    llvm.store(number, utils.getelementptr(row_of(rows, row), [here], out))


def clear(number: int, n_slots: int, _: Any, rows: Any, slots: Any, first: Any) -> None:
    """See `mosaic_rows.clear`: a warp's rows, whose slots it asks for all at once."""
    kind = ir.MemRefType(rows.type)
    n_rows, width = kind.shape
    word = ir.IntegerType.get_signless(32)
    words = width * utils.bitwidth(kind.element_type) // 32 // LANES      # of a row, for a lane
    together = math.gcd(words, WIDE)
    vector = ir.VectorType.get((together,), word)
    begin = arith.addi(number_of(first), arith.muli(utils.warp_idx(sync=False), constant(number)))
    places = [arith.minsi(arith.addi(begin, constant(n)), constant(n_rows - 1))
              for n in range(number)]
    of_rows = [loaded(slots, place) for place in places]
    for place, slot in zip(places, of_rows):
        with utils.when(arith.cmpi(arith.CmpIPredicate.eq, slot, constant(n_slots))):
            at = utils.getelementptr(row_of(rows, place), [
                arith.muli(lane_index(), constant(together))], word)
            for block in range(words // together):
                llvm.store(splat(vector, 0), utils.getelementptr(
                    at, [block * together * LANES], word))

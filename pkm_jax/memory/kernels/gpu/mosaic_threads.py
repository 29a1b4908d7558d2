"""What one thread does in the retrieval's kernels for Mosaic GPU, as code; see `mosaic_retrieval`.

Functions build MLIR where they are called, for one thread of a warpgroup, which is one token. The
first argument of those that are inlined is the launch, which none needs.
"""

from typing import Any

import numpy as np
from jax.experimental.mosaic.gpu import fragmented_array, utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from pkm_jax.memory.kernels import networks
from pkm_jax.memory.kernels.gpu.backend import TOKENS
from pkm_jax.memory.kernels.gpu.mosaic_lanes import (
    WIDE,
    constant,
    element,
    loaded,
    number_of,
    row_of,
    splat,
)

BY_THREAD = fragmented_array.WGStridedFragLayout((TOKENS,), 1)


def _compare(a, b):
    swap = arith.cmpf(arith.CmpFPredicate.OLT, a[0], b[0])
    return ((arith.maximumf(a[0], b[0]), arith.select(swap, b[1], a[1])),
            (arith.minimumf(a[0], b[0]), arith.select(swap, a[1], b[1])))


def _larger(a, b):
    greater = arith.cmpf(arith.CmpFPredicate.OGT, a[0], b[0])
    return arith.maximumf(a[0], b[0]), arith.select(greater, a[1], b[1])


NUMBERS = networks.Comparators(_compare, _larger)


def share(_: Any, product: Any, scores: Any) -> None:
    """See `mosaic_retrieval._share`."""
    utils.warpgroup_barrier()       # all have taken what was there
    columns = utils.memref_slice(scores, (slice(None), slice(0, TOKENS)))
    product.store_untiled(columns, optimized=False)
    utils.warpgroup_barrier()


def add_to_lists(size: int, _: Any, scores: Any, first: Any, index: Any, *lists: Any) -> tuple:
    """See `mosaic_retrieval._add_to_lists`."""
    thread, first, index = utils.thread_idx(), number_of(first), number_of(index)
    new = []
    for row in range(size):
        at = arith.muli(arith.addi(first, constant(row)), constant(scores.type.shape[1]))
        new.append((loaded(scores, arith.addi(at, thread)), arith.addi(index, constant(row))))
    old = list(zip(*(map(number_of, part) for part in (lists[:size], lists[size:]))))
    best = networks.best_of_two(old, networks.sort(new, NUMBERS), NUMBERS)
    return tuple(_array(number) for part in zip(*best) for number in part)


def store_lists(_: Any, first: Any, scores: Any, indices: Any, *lists: Any) -> None:
    """See `mosaic_retrieval._store_lists`."""
    numbers = list(map(number_of, lists))
    size = len(numbers) // 2
    _store(scores, number_of(first), numbers[:size])
    _store(indices, number_of(first), numbers[size:])


def best_pairs(
    n_keys: int, k: int, _: Any, first: Any, best: Any, sub_keys: Any, scores: Any, slots: Any,
) -> None:
    """See `mosaic_retrieval._best_pairs`."""
    _, size, tokens = ir.MemRefType(best.type).shape
    token = arith.addi(number_of(first), utils.thread_idx())
    halves = [[tuple(loaded(ref, arith.addi(token, constant((part * size + rank) * tokens)))
                     for ref in (best, sub_keys)) for rank in range(k)] for part in range(2)]

    def pair(i, j):
        slot = arith.muli(halves[0][i][1], constant(n_keys))
        return (arith.addf(halves[0][i][0], halves[1][j][0]),
                arith.addi(slot, halves[1][j][1]))

    for ref, numbers in zip((scores, slots), zip(*networks.best_sums(k, pair, NUMBERS))):
        _store(ref, number_of(first), numbers)


def _store(ref, first, numbers):
    """Numbers of this thread's token to the rows of a matrix [rank, T]."""
    tokens = ir.MemRefType(ref.type).shape[1]
    at = arith.addi(first, utils.thread_idx())
    for row, number in enumerate(numbers):
        llvm.store(number, element(ref, arith.addi(at, constant(row * tokens))))


def spread(
    n_keys: int, _: Any, part: Any, first: Any, slots: Any, gradient: Any, by_key: Any,
) -> None:
    """See `mosaic_retrieval._spread`."""
    first, (_, k) = number_of(first), ir.MemRefType(slots.type).shape
    token = arith.addi(first, utils.thread_idx())
    _clear(by_key, first)
    in_first = arith.cmpi(arith.CmpIPredicate.eq, number_of(part), constant(0))
    keys, sums = [], []
    for slot in _row(slots, token, k):
        whole, rest = arith.divui(slot, constant(n_keys)), arith.remui(slot, constant(n_keys))
        keys.append(arith.select(in_first, whole, rest))
    numbers = list(_row(gradient, token, k))
    for key in keys:
        total = zero = arith.constant(ir.F32Type.get(), 0.)
        for other, number in zip(keys, numbers):
            same = arith.cmpi(arith.CmpIPredicate.eq, key, other)
            total = arith.addf(total, arith.select(same, number, zero))
        sums.append(total)
    utils.warpgroup_barrier()       # the zeros come from other threads than the sums
    kind = ir.MemRefType(by_key.type).element_type
    row = row_of(by_key, token)
    for key, total in zip(keys, sums):
        number = total if isinstance(kind, ir.F32Type) else arith.truncf(kind, total)
        llvm.store(number, utils.getelementptr(row, [key], kind))


def _clear(by_key, first):
    """Zeros over the rows [TOKENS, n] from `first` on, whose bytes all threads write in turn."""
    kind = ir.MemRefType(by_key.type)
    n_keys, words = kind.shape[1], ir.VectorType.get((WIDE,), ir.IntegerType.get_signless(32))
    a_store = WIDE * 32 // utils.bitwidth(kind.element_type)    # numbers
    at = utils.getelementptr(row_of(by_key, first), [
        arith.muli(utils.thread_idx(), constant(a_store))], kind.element_type)
    for number in range(n_keys // a_store):
        llvm.store(splat(words, 0), utils.getelementptr(
            at, [number * a_store * TOKENS], kind.element_type))


def _row(ref, token, k):
    """The k numbers of a token, [T, k] with a stride."""
    kind = ir.MemRefType(ref.type)
    stride, at = kind.get_strides_and_offset()[0][0], row_of(ref, token)
    together = WIDE if k % WIDE == 0 and stride % WIDE == 0 else 1
    for first in range(0, k, together):
        vector = ir.VectorType.get((together,), kind.element_type)
        numbers = llvm.load(vector, utils.getelementptr(at, [first], kind.element_type))
        yield from (llvm.extractelement(numbers, constant(n)) for n in range(together))


def _array(number):
    """[TOKENS] of which this thread holds a number."""
    vector = llvm.mlir_undef(ir.VectorType.get((1,), number.type))
    register = llvm.insertelement(vector, number, constant(0))
    return fragmented_array.FragmentedArray(
        _registers=np.array([register], dtype=object), _layout=BY_THREAD,
        _is_signed=None if isinstance(number.type, ir.FloatType) else True)

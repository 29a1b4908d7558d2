"""Exact top-K over N² slots on a TPU (Pallas, Mosaic, TensorCore): scores never leave the chip.

A program has a tile of 8 × 128 tokens, one head and one half of its query. Of 128 tokens at a time
the matrix unit makes the scores [N, 128], sub-keys along sublanes and tokens along lanes. Eight
sub-keys are one vector register, so that a network sorts eight lists of every token at once, block
after block, each merged into the K best so far; then the eight lists are merged by rotations along
sublanes. With both halves' lists of the tile in place, eight sublanes are eight times 128 tokens,
and the sorted lists that the candidate pairs (i·j ≤ K) form are merged.

Scores are compared as integers of the same order, so that NaN has a place and what fills a block up
comes last. Bytes: queries once, codebooks once a tile, 8·T·H·K for the result. Operations: for each
token, head and half 2·N·half on the matrix unit, and for 128 tokens and 8·K sub-keys a network of
191 comparators (K = 32). Floor: the vector instructions, as `benchmarks.tpu_compile` counts them.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int32

from pkm_jax.memory.kernels import networks
from pkm_jax.memory.kernels.tpu.rows import (
    LANES,
    SUBLANES,
    Interpret,
    padded_tokens,
    precision_of,
    whole_pieces,
)

TILE = SUBLANES * LANES     # tokens of a program
NOTHING = jnp.iinfo(jnp.int32).min      # below every score's integer


def best_slots(
    query: Float[Array, 'T H 2 half'], codebooks: Float[Array, 'H 2 N half'], k: int, *,
    interpret: Interpret,
) -> tuple[Float[Array, 'T H {k}'], Int32[Array, 'T H {k}']]:
    """The k best of the N² slots of every head, in descending order of score."""
    tokens, heads = query.shape[:2]
    n_keys = codebooks.shape[2]
    query, codebooks = whole_pieces(query), whole_pieces(codebooks)
    half = query.shape[-1]
    query = padded_tokens(query.reshape(tokens, -1), TILE)
    tiles, size = len(query) // TILE, pl.next_power_of_2(k)
    block = SUBLANES * size

    def kernel(query, codebooks, scores, slots, lists, sub_keys, numbers):
        _best_of_half(query, codebooks, lists, sub_keys, numbers, size, n_keys)

        @pl.when(pl.program_id(2) == 1)
        def _():
            _best_pairs(lists, sub_keys, scores, slots, n_keys)

    result = pl.BlockSpec((1, k, SUBLANES, LANES), lambda n, head, part: (head, 0, n, 0))
    shape = heads, k, tiles * SUBLANES, LANES
    lists = (2, size, SUBLANES, LANES)
    scores, slots = pl.pallas_call(
        kernel, grid=(tiles, heads, 2), name='best_slots', interpret=interpret,
        in_specs=[
            pl.BlockSpec((TILE, half), lambda n, head, part: (n, head * 2 + part)),
            pl.BlockSpec((1, 1, n_keys, half), lambda n, head, part: (head, part, 0, 0))],
        out_specs=[result, result],
        out_shape=[jax.ShapeDtypeStruct(shape, dtype) for dtype in (jnp.float32, jnp.int32)],
        scratch_shapes=[pltpu.VMEM(lists, jnp.int32), pltpu.VMEM(lists, jnp.int32),
                        pltpu.VMEM((pl.cdiv(n_keys, block) * block, LANES), jnp.int32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=('parallel', 'parallel', 'arbitrary')),
    )(query, codebooks)
    return _by_token(scores, tokens), _by_token(slots, tokens)


def _by_token(array, tokens):
    heads, k = array.shape[:2]
    return jnp.moveaxis(array.reshape(heads, k, -1)[:, :, :tokens], 2, 0)


def _best_of_half(query, codebooks, lists, sub_keys, numbers, size, n_keys):
    """Writes the `size` best sub-keys of every token of the tile, in the lists of this half."""
    part, rows = pl.program_id(2), SUBLANES * size
    precision = precision_of(query.dtype)
    if n_keys < len(numbers):
        numbers[n_keys:] = jnp.full((len(numbers) - n_keys, LANES), NOTHING)

    def wires_of(block):
        row = jax.lax.broadcasted_iota(jnp.int32, (SUBLANES, LANES), 0)
        starts = [block * rows + i * SUBLANES for i in range(size)]
        return [(numbers[pl.ds(pl.multiple_of(start, SUBLANES), SUBLANES)], row + start)
                for start in starts]

    def add_block(block, best):
        return networks.best_of_two(best, networks.sort(wires_of(block)))

    def search(group, _):
        of_group = query[pl.ds(pl.multiple_of(group * LANES, LANES), LANES)]
        scores = jax.lax.dot_general(codebooks[0, 0], of_group, (((1,), (1,)), ((), ())),
                                     preferred_element_type=jnp.float32, precision=precision)
        numbers[:n_keys] = _ordered(scores)
        best = jax.lax.fori_loop(1, len(numbers) // rows, add_block,
                                 networks.sort(wires_of(jnp.int32(0))))
        for shift in 4, 2, 1:
            best = networks.best_of_two(best, [
                tuple(pltpu.roll(array, shift, 0) for array in wire) for wire in best])
        for i, wire in enumerate(best):
            for array, kept in zip(wire, (lists, sub_keys)):
                kept[part, i, pl.ds(group, 1)] = array[:1]

    jax.lax.fori_loop(0, SUBLANES, search, None)


def _best_pairs(lists, sub_keys, scores, slots, n_keys):
    """Writes the best sums of the two lists of every token, and their slots."""
    def pair(i, j):
        return (_ordered(_score(lists[0, i]) + _score(lists[1, j])),
                sub_keys[0, i] * n_keys + sub_keys[1, j])

    for i, (number, slot) in enumerate(networks.best_sums(scores.shape[1], pair)):
        scores[0, i], slots[0, i] = _score(number), slot


def _ordered(score: Float[Array, '...']) -> Int32[Array, '...']:
    """Integers above NOTHING in the order of the numbers; NaN beyond infinity, by its sign."""
    return jnp.maximum(_flipped(jax.lax.bitcast_convert_type(score, jnp.int32)), NOTHING + 1)


def _score(number: Int32[Array, '...']) -> Float[Array, '...']:
    """What `_ordered` made an integer of."""
    return jax.lax.bitcast_convert_type(_flipped(number), jnp.float32)


def _flipped(bits):
    """Numbers below zero with all bits but the sign flipped: twice, as they were."""
    return bits ^ (bits >> 31 & 0x7fffffff)

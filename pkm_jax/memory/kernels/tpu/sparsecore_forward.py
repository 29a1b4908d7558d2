"""Weighted sum of value rows on the SparseCores of a TPU (Pallas, Mosaic).

A vector subcore takes tiles of TILE tokens, one after the other. A *part* is as many reads of one
token as a vector of the subcore has lanes: one indirect copy, a stream, brings their rows, and
STREAMS of them are on their way while parts before them are added up, in the order of the reads. A
token's own reads come first; what is no read in its last part is neither copied nor looked at. The
slots, weights and numbers of reads of the next tile come meanwhile. Rows of which not STREAMS parts
fit a subcore's memory are read in pieces, one piece for the whole tile after the other.

Bytes: as on the TensorCore. Operations of a subcore, for each read and vector of words: it is
loaded, and each half is widened (bfloat16 alone), multiplied and added.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import ShapeDtypeStruct
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int32

from pkm_jax.accelerators import LANES
from pkm_jax.memory.kernels.tpu.rows import Interpret, padded_tokens
from pkm_jax.memory.kernels.tpu.sparsecore import (
    NO_READ,
    SHARE,
    Chip,
    Rows,
    as_words,
    halves,
    leaving,
    on_subcores,
    over_vectors,
    too_large,
    widened,
    words_of,
)

STREAMS = 8         # parts on their way to a subcore, a power of two
TILE = 16           # tokens of a tile, a multiple of every chip's lanes


class Sizes(NamedTuple):
    """What the kernel is made for."""
    tiles: int
    reads: int      # of a token, with what fills up its last part
    piece: int      # words of a row that are read at a time
    chip: Chip
    interpret: Interpret


class Kept(NamedTuple):
    """What a subcore keeps: scalars of two tiles, a tile's numbers of reads, rows on their way,
    sums; and semaphores: of each stream, of each kind of scalars, of sums that leave."""
    slots: Any
    weights: Any
    counts: Any
    reads: Any
    rows: Any
    sums: Any
    arrived: Any
    scalars_arrived: Any
    left: Any


def unsupported(values: Any, reads: int, chip: Chip) -> str | None:
    """Why a subcore cannot read so many rows of this table for a token; None if it can."""
    if _piece(values, reads, chip) is None:
        return f'{reads} reads a token do not fit a subcore of {chip.memory} bytes'
    return too_large((len(values), words_of(values)))


def sum_rows(
    values: Float[Array, 'S V'], slots: Int32[Array, 'T R'], weights: Float[Array, 'T R'],
    counts: Int32[Array, 'T'], *, chip: Chip, owners: int = 1, interpret: Interpret,
) -> Float[Array, 'T V']:
    """The sum over the first `counts[t]` reads of each token, 1 to R, in the dtype of `values`."""
    tokens, table, piece = len(slots), as_words(values), _piece(values, slots.shape[1], chip)
    assert piece is not None, 'see unsupported'
    sizes = Sizes(-(-tokens // TILE), _whole_parts(slots.shape[1], chip), piece, chip, interpret)
    scalars = _tiled(slots, weights, counts, sizes)
    out = ShapeDtypeStruct((halves(values), sizes.tiles * TILE, table.shape[1]), jnp.float32)
    kept = Kept(
        slots=pltpu.VMEM((2 * TILE * sizes.reads,), jnp.int32),
        weights=pltpu.VMEM((2 * TILE * sizes.reads,), jnp.float32),
        counts=pltpu.VMEM((2 * LANES,), jnp.int32), reads=pltpu.SMEM((TILE,), jnp.int32),
        rows=pltpu.VMEM((STREAMS, chip.lanes, piece), table.dtype),
        sums=pltpu.VMEM((halves(values), TILE, piece), jnp.float32),
        arrived=pltpu.SemaphoreType.DMA((STREAMS,)),
        scalars_arrived=pltpu.SemaphoreType.DMA((len(scalars),)),
        left=pltpu.SemaphoreType.DMA((1,)))
    sums = on_subcores(
        functools.partial(_sum_tiles, sizes), chip, out, list(kept),
        _cost(slots, owners, scalars, out), interpret, 'read_rows_on_sparsecores')(*scalars, table)
    return jnp.concatenate(list(sums), axis=1)[:tokens, :values.shape[1]].astype(values.dtype)


def _whole_parts(reads, chip):
    return -(-reads // chip.lanes) * chip.lanes


def _piece(values, reads, chip):
    """The most words of a row, a multiple of LANES, that fit with all that is kept; None: none."""
    lines = words_of(values) // LANES
    scalars = 2 * (2 * TILE * _whole_parts(reads, chip) + LANES)
    places = STREAMS * chip.lanes + halves(values) * TILE
    return next((LANES * lines // pieces for pieces in range(1, lines + 1) if lines % pieces == 0
                 and 4 * (scalars + places * LANES * lines // pieces) <= SHARE * chip.memory), None)


def _tiled(slots, weights, counts, sizes):
    """Slots, weights and counts, tile by tile; the latter in whole lines of LANES."""
    counts = padded_tokens(counts, TILE, 1)
    slots, weights = (padded_tokens(jnp.pad(array, ((0, 0), (0, sizes.reads - array.shape[1]))),
                                    TILE) for array in (slots, weights.astype(jnp.float32)))
    place = jnp.arange(sizes.reads, dtype=jnp.int32)
    slots = jnp.where(place[None] < counts[:, None], slots, NO_READ)
    counts = jnp.pad(counts.reshape(-1, TILE), ((0, 0), (0, LANES - TILE)))
    return slots.reshape(-1), weights.reshape(-1), counts.reshape(-1)


def _cost(slots, owners, scalars, out):
    """Of a table of which each of several owners has about as many reads."""
    words = slots.size // owners * out.shape[2]
    return pl.CostEstimate(
        flops=2 * words * out.shape[0], transcendentals=0,
        bytes_accessed=4 * (words + out.size + sum(array.size for array in scalars)))


def _sum_tiles(sizes, number, subcores, slots, weights, counts, table, sums, *kept):
    """The tiles of one subcore, of which there are `subcores`: see the module."""
    kept = Kept(*kept)
    mine = (sizes.tiles - number + subcores - 1) // subcores
    pieces = table.shape[1] // sizes.piece

    def scalars_in(n):
        """Copies of what belongs to its tile n, to where that of tile n - 2 was."""
        every = (slots, kept.slots), (weights, kept.weights), (counts, kept.counts)
        return [pltpu.make_async_copy(
            one.at[pl.ds((number + n * subcores) * (own.shape[0] // 2), own.shape[0] // 2)],
            own.at[pl.ds((n & 1) * (own.shape[0] // 2), own.shape[0] // 2)],
            kept.scalars_arrived.at[at]) for at, (one, own) in enumerate(every)]

    def sums_out(n, piece):
        return leaving(
            kept.sums, sums.at[:, pl.ds((number + n * subcores) * TILE, TILE),
                               pl.ds(piece * sizes.piece, sizes.piece)], kept.left.at[0],
            sizes.interpret)

    def on_tile(n, __):
        for copy in scalars_in(n):
            copy.wait()

        @pl.when(n + 1 < mine)
        def _():
            for copy in scalars_in(n + 1):
                copy.start()

        _count_reads(kept, n & 1, sizes)
        jax.lax.fori_loop(0, pieces, functools.partial(on_piece, n), None)

    def on_piece(n, piece, _):
        _sum_piece(sizes, kept, n & 1, table, pl.ds(piece * sizes.piece, sizes.piece),
                   lambda: pl.when(n + piece > 0)(sums_out(0, 0).wait))
        sums_out(n, piece).start()

    @pl.when(mine > 0)
    def _():
        for copy in scalars_in(0):
            copy.start()
        jax.lax.fori_loop(0, mine, on_tile, None)
        sums_out(0, 0).wait()


def _count_reads(kept, which, sizes):
    """Has the numbers of reads of a tile where scalars can be read."""
    lanes = sizes.chip.lanes
    for start in range(0, TILE, lanes):
        counts = kept.counts[pl.ds(which * LANES + start, lanes)]
        for lane in range(lanes):
            kept.reads[start + lane] = counts[lane]


def _sum_piece(sizes, kept, which, table, columns, room):
    """Some columns of the sums of a tile; `room()` waits until there is room for them."""
    lanes, start = sizes.chip.lanes, which * (TILE * sizes.reads)

    def place_of(token, part):
        return start + token * sizes.reads + part * lanes

    def rows_of(token, part, at):
        return Rows(table, kept.slots, place_of(token, part), columns, kept.rows.at[at],
                    kept.arrived.at[at], lanes, sizes.interpret)

    def begin_next(ahead, at):
        """Begins the part `ahead`, (token, part), if there is one; the one after it."""
        token, part = ahead
        pl.when(token < TILE)(lambda: rows_of(token, part, at).begin())
        last = (part + 1) * lanes >= kept.reads[jnp.minimum(token, TILE - 1)]
        return token + last.astype(jnp.int32), jnp.where(last, 0, part + 1)

    def on_token(token, carry):
        _clear(kept.sums, token, sizes)

        def on_part(part, carry):
            at, ahead = carry
            rows_of(token, part, at).wait()
            reads = kept.reads[token] - part * lanes
            _add_part(kept, token, at, place_of(token, part), reads, sizes)
            return (at + 1) & STREAMS - 1, begin_next(ahead, at)

        parts = (kept.reads[token] + lanes - 1) // lanes
        return jax.lax.fori_loop(0, parts, on_part, carry)

    nothing = jnp.int32(0)
    ahead = jax.lax.fori_loop(0, STREAMS, lambda at, ahead: begin_next(ahead, at),
                              (nothing, nothing))
    room()
    jax.lax.fori_loop(0, TILE, on_token, (nothing, ahead))


def _clear(sums, token, sizes):
    @over_vectors(sizes.piece, sizes.chip, sizes.interpret)
    def _(column):
        for half in range(sums.shape[0]):
            sums[half, token, pl.ds(column, sizes.chip.lanes)] = jnp.zeros(
                sizes.chip.lanes, jnp.float32)


def _add_part(kept, token, at, place, reads, sizes):
    """Adds the rows at place `at`, of which the first `reads` are some, to the token's sums."""
    lanes = sizes.chip.lanes
    weights = kept.weights[pl.ds(place, lanes)]
    weights = [weights[lane] for lane in range(lanes)]

    def add(is_whole):
        @over_vectors(sizes.piece, sizes.chip, sizes.interpret)
        def _(column):
            here = pl.ds(column, lanes)
            sums = [kept.sums[half, token, here] for half in range(kept.sums.shape[0])]
            for read, weight in enumerate(weights):
                words = kept.rows[at, read, here]
                if not is_whole:
                    words = jnp.where(read < reads, words, jnp.zeros_like(words))
                sums = [total + weight * numbers for total, numbers in zip(sums, widened(words))]
            for half, total in enumerate(sums):
                kept.sums[half, token, here] = total

    pl.when(reads >= lanes)(lambda: add(True))
    pl.when(reads < lanes)(lambda: add(False))

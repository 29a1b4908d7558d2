"""Gradients of the weighted sum of value rows on the SparseCores of a TPU (Pallas, Mosaic).

The reads come sorted by slot, those of a slot together, as a *segment*. Every vector subcore has an
equal share of them in one piece, and takes it tile by tile. A *part* is as many reads as a vector
of the subcore has lanes. Two indirect copies bring the output gradients of its tokens and the value
rows of the slots that begin in it; AHEAD parts are on their way while parts before them are added
up, in the order of the reads. A value row is copied once for each segment and tile: a segment that
goes on in the next part hands it on. weight · gradient is added to a float32 sum, which is kept
after each read, and a third indirect copy takes the sums with which segments end to their rows. The
product of value row and gradient is the gradient of the read's weight.

A segment can begin in the share of one subcore and go on in others'. The one that it begins in
writes the row, of its own reads; the others leave what they begin with, the *rest* of a segment,
beside the rows, and it is added to them afterwards, in the order of the subcores. So no sum depends
on when a copy arrives, and many reads of one slot are shared like any. Rows without a read get
zeros by indirect copies too. Rows of which not AHEAD parts fit a subcore's memory are passed over
in pieces, one piece for the whole tile after the other.

Bytes: as on the TensorCore. Operations of a subcore, for each read and vector of words: both rows
are loaded, and of each half both are widened (bfloat16 alone), the gradient is multiplied twice and
added twice, and one sum is chosen.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import ShapeDtypeStruct
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int32

from pkm_jax.accelerators import LANES
from pkm_jax.memory.kernels.tpu import sparsecore_shares as shares
from pkm_jax.memory.kernels.tpu.own_reads import Reads
from pkm_jax.memory.kernels.tpu.rows import Interpret, padded_tokens
from pkm_jax.memory.kernels.tpu.sparsecore import (
    NO_READ,
    SHARE,
    Chip,
    Rows,
    as_words,
    fold_vectors,
    halves,
    leaving,
    on_subcores,
    over_vectors,
    too_large,
    widened,
    words_of,
)

AHEAD = 4           # parts on their way to a subcore, a power of two
LEAVING = 2         # parts whose sums are on their way to their rows, a power of two


class Sizes(NamedTuple):
    """What the kernel is made for."""
    with_values: bool
    columns: int    # of a row, whole LANES
    words: int      # of a row of the table
    piece: int      # words of a row that are passed over at a time
    chip: Chip
    interpret: Interpret


class Kept(NamedTuple):
    """What a subcore keeps. Lists of two tiles: of tokens, of slots whose value row is needed, of
    places that sums leave for, of weights; the tile's products. Rows on their way, and sums; those
    of the segment at hand and of the rest. Semaphores of lists, rows, sums and results."""
    told: Any
    tokens: Any
    slots: Any
    to: Any
    weights: Any
    products: Any
    gradients: Any
    values: Any
    sums: Any
    total: Any
    rest: Any
    lists_in: Any
    gradients_in: Any
    values_in: Any
    sums_out: Any
    results_out: Any


def unsupported(values: Any, gradient: Any, n_rows: int, chip: Chip) -> str | None:
    """Why the subcores cannot add up so many rows of the gradient of this table; None if they
    can."""
    if gradient.dtype != values.dtype:
        return f'gradients of {gradient.dtype} for rows of {values.dtype}'
    if _piece(gradient, chip) is None:
        return f'rows of {gradient.shape[1]} columns do not fit a subcore of {chip.memory} bytes'
    columns = -(-gradient.shape[1] // LANES) * LANES
    return too_large((len(values), words_of(values)), (n_rows, columns),
                     (len(gradient), words_of(gradient)))


def sum_by_slot(
    reads: Reads, place: Int32[Array, 'n'], used: Bool[Array, 'rows'], n_slots: int,
    gradient: Float[Array, 'T V'], per_token: int, values: Float[Array, 'S V'] | None = None, *,
    chip: Chip, interpret: Interpret,
) -> tuple[Float[Array, 'rows V'], Float[Array, 'n'] | None]:
    """The sum of weight · gradient over the reads of each slot, float32, at its place, and zeros in
    the rows that are not `used`; with `values` also the gradient of each read's weight. Reads are
    sorted by slot; `n_slots` is no read."""
    width, piece = gradient.shape[1], _piece(gradient, chip)
    assert piece is not None, 'see unsupported'
    told, place_of_rest, lists = shares.told(reads, place, n_slots, len(used), per_token, chip)
    unused = jnp.where(used, NO_READ, jnp.arange(len(used), dtype=jnp.int32))
    by_token, tables = as_words(gradient), [] if values is None else [as_words(values)]
    arrays = told, *lists, padded_tokens(unused, shares.TILE, NO_READ), by_token, *tables
    sizes = Sizes(values is not None, -(-width // LANES) * LANES, by_token.shape[1], piece, chip,
                  interpret)
    out = [ShapeDtypeStruct(shape, jnp.float32) for shape in (
        (len(used), sizes.columns), (len(place_of_rest), halves(gradient), sizes.words),
        *(lists[0].shape for _ in tables))]
    rows, rest, *products = on_subcores(
        functools.partial(_add_share, sizes), chip, out,
        list(_kept(halves(gradient), by_token.dtype, sizes)),
        _cost(len(place), by_token, arrays[:-1 - len(tables)], out), interpret,
        'read_backward_on_sparsecores')(*arrays)
    rows = shares.add_rests(rows, rest.reshape(len(rest), -1)[:, :sizes.columns], place_of_rest)
    by_read = (jnp.where(reads.slots < n_slots, one[:len(place)], 0) for one in products)
    return rows if sizes.columns == width else rows[:, :width], next(by_read, None)


def _kept(both, word, sizes):
    """The scratch of a subcore."""
    lanes, semaphore = sizes.chip.lanes, pltpu.SemaphoreType.DMA
    indices, numbers = (pltpu.VMEM((2 * shares.TILE,), one) for one in (jnp.int32, jnp.float32))
    rows = pltpu.VMEM((AHEAD, lanes, sizes.piece), word)
    wide = pltpu.VMEM((both, sizes.words), jnp.float32)
    return Kept(
        told=pltpu.VMEM((LANES,), jnp.int32), tokens=indices, slots=indices, to=indices,
        weights=numbers, products=pltpu.VMEM((shares.TILE,), jnp.float32), gradients=rows,
        values=rows, sums=pltpu.VMEM((LEAVING, both, lanes, sizes.piece), jnp.float32), total=wide,
        rest=wide, lists_in=semaphore((4,)), gradients_in=semaphore((AHEAD,)),
        values_in=semaphore((AHEAD,)), sums_out=semaphore((LEAVING,)),
        results_out=semaphore((1,)))


def _piece(gradient, chip):
    """The most words of a row, a multiple of LANES, that fit with all that is kept, and of which
    both halves of a row have a whole number, or one has it all; None: none."""
    lines, both = words_of(gradient) // LANES, -(-gradient.shape[1] // LANES)
    scalars = LANES + 9 * shares.TILE + 2 * halves(gradient) * lines * LANES
    places = (2 * AHEAD + LEAVING * halves(gradient)) * chip.lanes
    return next((LANES * lines // pieces for pieces in range(1, lines + 1) if lines % pieces == 0
                 and (pieces == 1 or both % (lines // pieces) == 0)
                 and 4 * (scalars + places * LANES * lines // pieces) <= SHARE * chip.memory), None)


def _cost(reads, by_token, scalars, out):
    """Of a table whose rows are all read that can be."""
    rows, both = min(out[0].shape[0], reads), len(out) - 1
    return pl.CostEstimate(
        flops=2 * both * reads * out[0].shape[1], transcendentals=0,
        bytes_accessed=4 * ((reads + (both - 1) * rows) * by_token.shape[1]
                            + sum(array.size for array in (*scalars, *out))))


def _add_share(sizes, number, subcores, told, *refs):
    """The reads of one subcore, and the rows without one that are its own: see the module."""
    *lists, unused, gradient = refs[:6]
    table, rows, rest, products = refs[6:10] if sizes.with_values else (None, *refs[6:8], None)
    kept = Kept(*refs[-len(Kept._fields):])
    _made(pltpu.make_async_copy(told.at[pl.ds(number * LANES, LANES)], kept.told,
                                kept.results_out.at[0]))
    line = kept.told[pl.ds(0, sizes.chip.lanes)]
    told = shares.Told(*(line[at] for at in range(len(shares.Told._fields))))
    _clear_sums(kept, sizes)
    _clear_rows(sizes, kept, number, subcores, unused, rows)

    def lists_in(n):
        """Copies of what belongs to its tile n, to where that of tile n - 2 was."""
        own = kept.tokens, kept.slots, kept.to, kept.weights
        return [pltpu.make_async_copy(
            one.at[shares.tile(told.first + n)], mine.at[shares.tile(n & 1)],
            kept.lists_in.at[at]) for at, (one, mine) in enumerate(zip(lists, own))]

    def start_lists(n):
        for copy in lists_in(n):
            copy.start()

    def on_tile(n, ended):
        for copy in lists_in(n):
            copy.wait()

        pl.when(n + 1 < told.tiles)(lambda: start_lists(n + 1))

        for at in range(0, shares.TILE, sizes.chip.lanes):
            kept.products[pl.ds(at, sizes.chip.lanes)] = jnp.zeros(sizes.chip.lanes, jnp.float32)
        tile = _Tile(sizes, kept, told, n, gradient, table, rows)
        next_ended = jax.lax.fori_loop(
            0, sizes.words // sizes.piece, lambda piece, _: tile.add(piece, ended), ended)
        if sizes.with_values:
            _made(leaving(kept.products, products.at[shares.tile(told.first + n)],
                          kept.results_out.at[0], sizes.interpret))
        return next_ended

    @pl.when(told.tiles > 0)
    def _():
        start_lists(0)
        jax.lax.fori_loop(0, told.tiles, on_tile, jnp.int32(1))

    _made(leaving(kept.rest, rest.at[number], kept.results_out.at[0], sizes.interpret))


def _made(copy):
    copy.start()
    copy.wait()


def _clear_sums(kept, sizes):
    """Zeros to leave for the rows without a read."""
    @over_vectors(sizes.piece, sizes.chip, sizes.interpret)
    def _(column):
        for half in range(kept.sums.shape[1]):
            for row in range(sizes.chip.lanes):
                kept.sums[0, half, row, pl.ds(column, sizes.chip.lanes)] = jnp.zeros(
                    sizes.chip.lanes, jnp.float32)


def _clear_rows(sizes, kept, number, subcores, unused, rows):
    """Zeros for the rows that `unused` names, the tiles of which subcores have in turn."""
    lanes, pieces = sizes.chip.lanes, sizes.words // sizes.piece
    parts, tiles = shares.TILE // lanes, unused.shape[0] // shares.TILE

    def on_part(part, act):
        """Starts or ends the copies of a part, if it has rows to clear."""
        @pl.when(jnp.max(kept.to[pl.ds(part * lanes, lanes)]) != NO_READ)
        def _():
            jax.lax.fori_loop(0, pieces, lambda piece, _: _leave(
                sizes, kept, rows, part * lanes, 0, piece, act), None)

    def on_tile(n, __):
        _made(pltpu.make_async_copy(unused.at[shares.tile(number + n * subcores)],
                                    kept.to.at[shares.tile(0)], kept.results_out.at[0]))

        @pl.loop(0, parts + LEAVING)
        def _(part):
            pl.when(part >= LEAVING)(lambda: on_part(part - LEAVING, Rows.wait))
            pl.when(part < parts)(lambda: on_part(part, Rows.begin))

    jax.lax.fori_loop(0, (tiles - number + subcores - 1) // subcores, on_tile, None)


def _leave(sizes, kept, rows, start, at, piece, act):
    """Starts or ends the copies of sums at place `at` to the rows that `kept.to` has from `start`
    on."""
    for half in range(-(-sizes.columns // sizes.words)):    # LANES columns are one half alone
        first = half * sizes.words
        width = min(sizes.piece, sizes.columns - first)
        first += piece * sizes.piece
        copy = Rows(rows, kept.to, start, pl.ds(first, width),
                    kept.sums.at[at, half, :, pl.ds(0, width)], kept.sums_out.at[at],
                    sizes.chip.lanes, sizes.interpret, leaves=True)
        pl.when(first < sizes.columns)(functools.partial(act, copy))


class _Tile(NamedTuple):
    """Tile n of a subcore, at work."""
    sizes: Sizes
    kept: Kept
    told: shares.Told
    n: Any
    gradient: Any
    table: Any
    rows: Any

    def add(self, piece, ended):
        """Adds up some columns; whether a segment ended with the read before and with the last."""
        kept, lanes = self.kept, self.sizes.chip.lanes
        start = (self.n & 1) * shares.TILE
        first = (self.told.first + self.n) * shares.TILE
        parts = (jnp.minimum(self.told.reads - first, shares.TILE) + lanes - 1) // lanes

        def begin(part):
            @pl.when(part < parts)
            def _():
                for copy in self._rows_in(part, piece):
                    copy.begin()

        def leave(part, act):
            _leave(self.sizes, kept, self.rows, start + part * lanes, part & LEAVING - 1, piece,
                    act)

        def on_part(part, ended):
            for copy in self._rows_in(part, piece):
                copy.wait()
            pl.when(part >= LEAVING)(lambda: leave(part - LEAVING, Rows.wait))
            ends_at = self.told.rest_ends - first - part * lanes
            ended, value = self._add_part(part, piece, ended, ends_at)
            leave(part, Rows.begin)
            pl.when((ends_at >= 0) & (ends_at < lanes))(lambda: self._keep_rest(
                part, piece, ends_at))
            if self.sizes.with_values:
                pl.when((ended == 0) & (part + 1 < parts))(lambda: self._hand_on(part, value))
            begin(part + AHEAD)
            return ended

        jax.lax.fori_loop(0, AHEAD, lambda part, _: begin(part), None)
        ended = jax.lax.fori_loop(0, parts, on_part, ended)
        jax.lax.fori_loop(jnp.maximum(parts - LEAVING, 0), parts,
                          lambda part, _: leave(part, Rows.wait), None)
        return ended

    def _rows_in(self, part, piece):
        """The copies of output gradients and of value rows."""
        kept, lanes, at = self.kept, self.sizes.chip.lanes, part & AHEAD - 1
        place = (self.n & 1) * shares.TILE + part * lanes
        columns = pl.ds(piece * self.sizes.piece, self.sizes.piece)
        every = [(self.gradient, kept.tokens, kept.gradients, kept.gradients_in),
                 (self.table, kept.slots, kept.values, kept.values_in)]
        return [Rows(one, indices, place, columns, local.at[at], arrived.at[at], lanes,
                     self.sizes.interpret)
                for one, indices, local, arrived in every[:1 + self.sizes.with_values]]

    def _add_part(self, part, piece, ended, ends_at):
        """Sums after each read of a part, and the products; whether a segment ends with the last
        read, and the place of its value row."""
        sizes, kept, lanes = self.sizes, self.kept, self.sizes.chip.lanes
        at, out = part & AHEAD - 1, part & LEAVING - 1
        place = pl.ds((self.n & 1) * shares.TILE + part * lanes, lanes)
        to, slots, weights = kept.to[place], kept.slots[place], kept.weights[place]
        reads, value = [], jnp.int32(0)
        for read in range(lanes):
            value = jnp.where(slots[read] == NO_READ, value, read)
            reads.append((weights[read], ended, value))
            ended = ((to[read] != NO_READ) | (ends_at == read)).astype(jnp.int32)

        def on_vector(column, products):
            here, whole = pl.ds(column, lanes), pl.ds(piece * sizes.piece + column, lanes)
            totals = [kept.total[half, whole] for half in range(kept.total.shape[0])]
            products = list(products)
            for read, (weight, begins, value) in enumerate(reads):
                by_token = widened(kept.gradients[at, read, here])
                for half, one in enumerate(by_token):
                    total = jnp.where(begins != 0, jnp.zeros_like(one), totals[half])
                    totals[half] = total + weight * one
                    kept.sums[out, half, read, here] = totals[half]
                if sizes.with_values:
                    for one, other in zip(by_token, widened(kept.values[at, value, here])):
                        products[read] += one * other
            for half, total in enumerate(totals):
                kept.total[half, whole] = total
            return tuple(products)

        nothing = jnp.zeros(lanes, jnp.float32)
        products = fold_vectors(sizes.piece, sizes.chip, sizes.interpret, on_vector,
                                (nothing,) * (lanes if sizes.with_values else 0))
        lane, found = jax.lax.iota(jnp.int32, lanes), nothing
        for read, product in enumerate(products):
            found = jnp.where(lane == read, jnp.sum(product), found)
        here = pl.ds(part * lanes, lanes)
        kept.products[here] += found
        return ended, value

    def _keep_rest(self, part, piece, read):
        """Keeps the sum after a read of the part as that of the rest."""
        sizes, kept = self.sizes, self.kept

        @over_vectors(sizes.piece, sizes.chip, sizes.interpret)
        def _(column):
            for half in range(kept.rest.shape[0]):
                kept.rest[half, pl.ds(piece * sizes.piece + column, sizes.chip.lanes)] = kept.sums[
                    part & LEAVING - 1, half, read, pl.ds(column, sizes.chip.lanes)]

    def _hand_on(self, part, value):
        """Has the value row where the next part has that of its first read."""
        sizes, kept = self.sizes, self.kept

        @over_vectors(sizes.piece, sizes.chip, sizes.interpret)
        def _(column):
            here = pl.ds(column, sizes.chip.lanes)
            kept.values[part + 1 & AHEAD - 1, 0, here] = kept.values[part & AHEAD - 1, value, here]

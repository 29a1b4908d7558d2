"""The shares of vector subcores in reads that are sorted by slot.

A share is whole tiles of the reads that are made here, as many as any other's or one more. So it
can begin inside a segment, the reads of a slot: what it has of that is the *rest* of the segment.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int32

from pkm_jax.accelerators import LANES
from pkm_jax.memory.kernels.tpu.own_reads import Reads
from pkm_jax.memory.kernels.tpu.rows import padded_tokens
from pkm_jax.memory.kernels.tpu.sparsecore import NO_READ, Chip

TILE = 512          # sorted reads of a tile, a multiple of LANES


class Told(NamedTuple):
    """What a subcore is told: its first tile, how many it has, the read with which the rest that it
    begins with ends, -1: none; and how many reads there are in all."""
    first: Any
    tiles: Any
    rest_ends: Any
    reads: Any


def told(
    reads: Reads, place: Int32[Array, 'n'], n_slots: int, n_rows: int, per_token: int, chip: Chip,
) -> tuple[Int32[Array, 'numbers'], Int32[Array, 'subcores'], list[Array]]:
    """What each subcore is told, in a line of LANES; the place of the rest that it begins with,
    `n_rows`: none; and lists of all reads in whole tiles: of tokens, of slots where a segment or a
    tile begins, of places where a segment or a share ends but no rest, each NO_READ elsewhere, and
    of weights. Slots ascend; `n_slots` is no read."""
    number, at = chip.cores * chip.subcores, jnp.arange(len(place), dtype=jnp.int32)
    slots, own = reads.slots, jnp.sum(reads.slots < n_slots, dtype=jnp.int32)
    each, more = jnp.divmod((own + TILE - 1) // TILE, number)
    subcore = jnp.arange(number, dtype=jnp.int32)
    first = subcore * each + jnp.minimum(subcore, more)
    tiles = each + (subcore < more).astype(jnp.int32)
    last = jnp.minimum((first + tiles) * TILE, own) - 1
    begins = jnp.concatenate([jnp.ones(1, bool), slots[1:] != slots[:-1]])

    def at_first(array, fill):
        return array.at[first * TILE].get(mode='fill', fill_value=fill)

    goes_on = (tiles > 0) & ~at_first(begins, True)
    segment_ends = jnp.searchsorted(slots, at_first(slots, n_slots), side='right') - 1
    rest_ends = jnp.where(goes_on, jnp.minimum(segment_ends.astype(jnp.int32), last), -1)
    ends = jnp.concatenate([begins[1:], jnp.ones(1, bool)]).at[
        jnp.where(tiles > 0, last, len(at))].set(True, mode='drop')
    to = jnp.where(ends & (at < own), place, NO_READ).at[
        jnp.where(goes_on, rest_ends, len(at))].set(NO_READ, mode='drop')
    lists = ((jnp.where(at < own, reads.order // per_token, NO_READ), NO_READ),
             (jnp.where((begins | (at % TILE == 0)) & (at < own), slots, NO_READ), NO_READ),
             (to, NO_READ), (reads.weights.astype(jnp.float32), 0))
    numbers = jnp.stack(Told(first, tiles, rest_ends, jnp.full(number, own)), axis=1)
    return (jnp.pad(numbers, ((0, 0), (0, LANES - numbers.shape[1]))).reshape(-1),
            jnp.where(goes_on, at_first(place, n_rows), n_rows),
            [padded_tokens(array, TILE, fill) for array, fill in lists])


def tile(n: Any) -> slice | pl.Slice:
    """Where tile n is."""
    return pl.ds(n * TILE, TILE)


def add_rests(
    rows: Float[Array, 'n_rows V'], rests: Float[Array, 'subcores V'],
    place: Int32[Array, 'subcores'],
) -> Float[Array, 'n_rows V']:
    """The rows with what each subcore has of a segment that another began, at its place; `n_rows`:
    nothing, whatever its numbers are. Those of one row are added up first, in their order."""
    goes_on = jnp.concatenate([jnp.zeros(1, bool), place[1:] == place[:-1]])

    def add(total, one):
        rest, goes_on = one
        total = rest + jnp.where(goes_on, total, 0)
        return total, total

    _, totals = jax.lax.scan(add, jnp.zeros_like(rests[0]), (rests, goes_on))
    is_last = jnp.concatenate([~goes_on[1:], jnp.ones(1, bool)]) & (place < len(rows))
    nowhere = len(rows) + jnp.arange(len(place), dtype=jnp.int32)
    return rows.at[jnp.where(is_last, place, nowhere)].add(totals, mode='drop', unique_indices=True)

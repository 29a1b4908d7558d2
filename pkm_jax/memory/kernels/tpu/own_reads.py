"""The reads of one of several owners of a table's rows, packed.

Of a block of BLOCK reads an owner has about one in `owners`. A sort of the block by slot puts these
first (the slots of others are S, the last), so that a *window* of the first few places holds them
all. Where reads are so skewed that some block has more, there are more windows: none is left out.
Blocks lie along sublanes, LANES of them side by side, so that a sort of them stays on the chip and
nothing is transposed.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float, Int32

from pkm_jax.accelerators import LANES

BLOCK = 2_048       # reads that are sorted at a time
SPREAD = 5.5        # standard deviations above the mean that a window holds
MULTIPLE = 32       # of the size of a window


class Reads(NamedTuple):
    """Some reads: their slots, places among all and weights."""
    slots: Int32[Array, '...']
    order: Int32[Array, '...']
    weights: Float[Array, '...']


def in_blocks(
    slots: Int32[Array, 'T R'], weights: Float[Array, 'T R'], n_slots: int,
) -> Reads:
    """All reads [parts, BLOCK, LANES], each lane of a part sorted by slot; S for what fills up."""
    size = BLOCK * LANES

    def blocked(array, fill):
        flat = array.reshape(-1)
        return jnp.pad(flat, (0, -len(flat) % size), constant_values=fill).reshape(
            -1, BLOCK, LANES)

    slots = blocked(slots, n_slots)
    order = jnp.arange(slots.size, dtype=jnp.int32).reshape(slots.shape)
    return Reads(*(with_layout_constraint(array, Layout((0, 1, 2))) for array in jax.lax.sort(
        (slots, order, blocked(weights, 0)), dimension=1, num_keys=1, is_stable=False)))


def window_size(owners: int) -> int:
    """Places for the own reads of a block, which hold all if slots are spread evenly."""
    mean = BLOCK / owners
    return min(math.ceil((mean + SPREAD * math.sqrt(mean)) / MULTIPLE) * MULTIPLE, BLOCK)


def windows(blocks: Reads, n_slots: int, size: int) -> Int32[Array, '']:
    """How many windows of `size` there are own reads in."""
    most = jnp.max(jnp.sum(blocks.slots < n_slots, axis=1, dtype=jnp.int32))
    return (most + size - 1) // size


def window(blocks: Reads, number: Int32[Array, ''] | int, n_slots: int, size: int) -> Reads:
    """The own reads in window `number` of every block, and reads of S, in one list by slot."""
    start = jnp.minimum(number * size, BLOCK - size)    # the last one may overlap the one before

    def cut(array):
        return jax.lax.dynamic_slice_in_dim(array, start, size, axis=1)

    slots, order, weights = map(cut, blocks)
    place = start + jnp.arange(size, dtype=jnp.int32)[None, :, None]
    return by_slot(Reads(jnp.where(place < number * size, n_slots, slots), order, weights))


def by_slot(reads: Reads) -> Reads:
    """Reads in one list by slot; those of a slot by their places."""
    return Reads(*jax.lax.sort(tuple(array.reshape(-1) for array in reads), num_keys=2,
                               is_stable=False))

"""What the devices of a mesh send each other for a memory: the table of docs/scaling.md."""

import math
from typing import NamedTuple

from pkm_jax.memory.replica_exchange import replica_exchange
from pkm_jax.mesh import Shards

FLOAT = 4       # bytes of sums, and of a slot's number


class Read(NamedTuple):
    """The read of one memory for the tokens of all devices at a time."""
    tokens: int             # T
    reads: int              # R, of a token
    slots: int              # S
    width: int              # V
    itemsize: int           # bytes of a value as it is read
    weight_itemsize: int    # bytes of a weight


class Sent(NamedTuple):
    """What a collective sends, the axes of the mesh that it goes along, and its bytes."""
    what: str
    axes: tuple[str, ...]
    bytes: float            # by each device, on a ring


def bytes_sent(shards: Shards, read: Read, sparse: bool) -> list[Sent]:
    """Every collective of a memory's read, forward and backward, with sparse or dense updates.

    Of m devices each sends (m - 1) / m of what they gather, scatter or turn, twice that of what
    they sum. What has one member is left out.
    """
    data, rows, columns = shards
    tokens, reads, slots, width, value, weight = read
    group, shard, part = tokens // data, slots // rows, width // columns
    own = tokens // math.prod(shards)
    read_numbers, of_group = tokens * reads, group * reads
    exchange = replica_exchange(shards, *read).what
    everywhere, memory = ('data', 'rows', 'columns'), ('rows', 'columns')
    whole = exchange == 'tokens'    # then replicas see the tokens of all
    found = [
        ('columns of own tokens', ('columns',), own * width * value),
        ('columns of their gradients', ('columns',), own * width * value),
        ('partial reads', ('rows',), group * part * FLOAT),
        ('gradients of the weights', memory, of_group * weight)]
    if sparse:
        found += [
            ('slots', everywhere, read_numbers * FLOAT),
            ('weights', everywhere if whole else memory,
             (read_numbers if whole else of_group) * weight),
            ('gradients of the reads', ('data', 'rows') if whole else ('rows',),
             (tokens if whole else group) * part * value)]
        if exchange == 'rows':
            numbered = of_group < shard     # else each has its own place
            found.append(('rows of each replica', ('data',),
                          data * min(shard, of_group) * (part + numbered) * FLOAT))
        if read_numbers >= shard:
            found.append(('marks of what was read', ('data',), 2 * shard))
    else:
        found += [
            ('slots', memory, of_group * FLOAT),
            ('weights', memory, of_group * weight),
            ('gradients of the reads', ('rows',), group * part * FLOAT),
            ('gradient of the table', ('data',), 2 * shard * part * FLOAT)]
    return [Sent(what, axes, size * (members - 1) / members) for what, axes, size in found
            if (members := math.prod(getattr(shards, axis) for axis in axes)) > 1]


def mean_squares_sent(shards: Shards, rows: int) -> Sent:
    """What a step of a row-wise optimizer sends of so many rows of a shard that it updates."""
    others = (shards.columns - 1) / shards.columns
    return Sent('mean squares of rows', ('columns',), 2 * others * rows * FLOAT)

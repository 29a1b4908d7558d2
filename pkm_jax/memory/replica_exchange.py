"""What the replicas of a value table exchange in a sparse backward pass, and what it costs."""

from typing import NamedTuple

from pkm_jax.mesh import Shards


class ReplicaExchange(NamedTuple):
    """A choice, and what it was made by."""
    what: str               # 'nothing', 'tokens' (slots, weights, output gradients) or 'rows'
    bytes: dict[str, int]   # that one device receives in a step, by choice


def replica_exchange(
    shards: Shards, tokens: int, reads: int, n_slots: int, width: int, itemsize: int,
    weight_itemsize: int,
) -> ReplicaExchange:
    """The exchange of fewer bytes, for `tokens` of `reads` each, whose gradients have `itemsize`
    bytes a number and whose weights `weight_itemsize`. All replicas get all slots either way.

    Tokens: every replica computes the rows of all of them, in the order that one device would.
    Rows: it computes those of its own tokens, which are then merged.
    """
    others, own_reads = shards.data - 1, tokens // shards.data * reads
    columns = width // shards.columns
    rows = min(n_slots // shards.rows, own_reads)
    received = {'tokens': others * (tokens // shards.data * columns * itemsize
                                    + own_reads * (4 + weight_itemsize)),
                'rows': others * (rows * (columns + 1) * 4 + own_reads * 4)}
    return ReplicaExchange(min(received, key=received.get) if others else 'nothing', received)

"""Gradients and updates of the few rows of a table that a step read (docs/method.md, section 5)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32


class SparseRows(NamedTuple):
    """A few rows of a table [S, V]: `rows[i]` belongs to row `ids[i]`; an id of S is not in use.

    With fewer places than S, the ids in use come first, in ascending order and each once. With S
    places, row i has place i, so that nothing is gathered or scattered. The list of a table that is
    split by rows is the lists of its parts, one after another, with a count for each.
    """
    #: which rows
    ids: Int32[Array, 'rows']
    #: what belongs to them, zeros where the id is S; in float32, or in the dtype of a `no_delta`:
    #: sums and updates widen what they read
    rows: Float[Array, 'rows V']
    #: how many are in use
    count: Int32[Array, 'shards']   # type: ignore[assignment]  # hides a method of tuples
    #: a factor of the rows that they are yet to get; None: 1
    scale: Float[Array, ''] | None = None


class Touched(NamedTuple):
    """The rows that a read touched: `ids` and `count` of `SparseRows`."""
    #: which rows; S where a place is not in use
    ids: Int32[Array, 'rows']
    #: how many are in use
    count: Int32[Array, 'shards']   # type: ignore[assignment]  # hides a method of tuples


def is_rows(node: Any) -> bool:
    """Whether a node of a gradient is a compact one: `is_leaf` for jax.tree functions."""
    return isinstance(node, SparseRows)


def rows_of(tree: Any) -> Any:
    """`tree` with the rows alone of every SparseRows, in float32: what norms and sums are taken
    of."""
    return jax.tree.map(lambda leaf: leaf.rows.astype(jnp.float32) if is_rows(leaf) else leaf,
                        tree, is_leaf=is_rows)


def in_order(
    ids: Int32[Array, '...'],
) -> tuple[Int32[Array, 'n'], Int32[Array, 'n']]:
    """Positions of the flattened ids in the order of the ids, equal ones as they are; and the
    sorted ids.

    No place is below 0, but so the ids need the order: XLA for GPUs would else leave it out of a
    sort where nothing uses it, and no longer merge that sort with an equal one.
    """
    ids = ids.reshape(-1)
    ids, order = jax.lax.sort((ids, jnp.arange(ids.size, dtype=jnp.int32)), num_keys=1)
    return order, jnp.where(order < 0, 0, ids)


def sorted_like_reads(ids: Int32[Array, '...']) -> Int32[Array, 'n']:
    """The flattened ids, ascending: on an NVIDIA GPU by the sort of `in_order`, which the gradients
    of the same reads ask for."""
    return jax.lax.platform_dependent(
        ids, cuda=lambda ids: in_order(ids)[1], default=lambda ids: jnp.sort(ids, None))


def distinct(
    ids: Int32[Array, 'n'], n_slots: int, capacity: int,
) -> tuple[Int32[Array, '{capacity}'], Int32[Array, '1']]:
    """The different ones of ascending ids below `n_slots`, filled up with n_slots; and their
    number. There must be no more than `capacity` of them."""
    first = starts(ids) & (ids < n_slots)
    position = jnp.where(first, ranks(ids) - 1, capacity)
    found = jnp.full(capacity, n_slots, jnp.int32).at[position].set(ids, mode='drop')
    return found, jnp.sum(first, dtype=jnp.int32)[None]


def ranks(ids: Int32[Array, 'n']) -> Int32[Array, 'n']:
    """How many different ids there are up to and with each of ascending ids."""
    return jnp.cumsum(starts(ids), dtype=jnp.int32)


def starts(ids: Int32[Array, 'n']) -> Bool[Array, 'n']:
    """Which of ascending ids are not those before them."""
    return jnp.concatenate([jnp.ones_like(ids[:1], bool), ids[1:] != ids[:-1]])


def in_place(marked: Bool[Array, 'S']) -> tuple[Int32[Array, 'S'], Int32[Array, '1']]:
    """`ids` and `count` of SparseRows with a place for every slot, of which these are in use."""
    size = len(marked)
    return (jnp.where(marked, jnp.arange(size, dtype=jnp.int32), size),
            jnp.sum(marked, dtype=jnp.int32)[None])


def merge(parts: SparseRows, n_slots: int, capacity: int) -> SparseRows:
    """The sum of parts stacked along a leading axis, in float32, added in their order:
    deterministic.

    There must be no more than `capacity` different ids in all.
    """
    if capacity == n_slots:
        ids, count = in_place(jnp.zeros(n_slots, bool).at[parts.ids].set(True, mode='drop'))
    else:
        ids, count = distinct(jnp.sort(parts.ids, None), n_slots, capacity)

    def add(rows, part):
        part = part._replace(rows=part.rows.astype(jnp.float32))
        if len(part.ids) == n_slots:
            return rows + part.rows, None
        places = part.ids if capacity == n_slots else jnp.where(
            part.ids < n_slots, jnp.searchsorted(ids, part.ids), capacity)
        return _at(rows, places).add(part.rows, **_DIFFERENT), None

    start = jnp.zeros((capacity, parts.rows.shape[-1]), jnp.float32)
    return SparseRows(ids, jax.lax.scan(add, start, parts)[0], count)


def take_rows(table: Array, ids: Int32[Array, 'rows']) -> Array:
    """Rows of `table` [S, …] with the ids of SparseRows; zeros for ids of S."""
    if len(ids) == len(table):
        return jnp.where(_in_use(ids, table), table, 0)
    return table.at[ids].get(mode='fill', fill_value=0, wrap_negative_indices=False)


def put_rows(table: Array, ids: Int32[Array, 'rows'], rows: Array) -> Array:
    """`table` [S, …] with the rows set that the ids of SparseRows name; the others keep every bit.

    Done in place where the table is not used again, at a cost that does not depend on S (but in
    bfloat16 on a CPU, where XLA passes the whole table through float32).
    """
    rows = rows.astype(table.dtype)
    if len(ids) == len(table):
        return jnp.where(_in_use(ids, table), rows, table)
    return _at(table, ids).set(rows, **_DIFFERENT)


def _in_use(ids, table):
    """Which places of a list with one for every slot are in use, with the axes of the table."""
    return (ids < len(table)).reshape(-1, *(1 for _ in table.shape[1:]))


_DIFFERENT: Any = dict(mode='drop', unique_indices=True, wrap_negative_indices=False)


def _at(table, ids):
    """Different rows of a table, none for ids of S; these must differ too, for a scatter to need
    no atomic operations."""
    size = len(table)
    return table.at[jnp.where(ids < size, ids, size + jnp.arange(len(ids), dtype=jnp.int32))]

"""Gradients and updates of the few rows of a table that a step read (docs/method.md, section 5)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32


class SparseRows(NamedTuple):
    """Rows of a table: `rows[i]` belongs to row `ids[i]` of its S rows.

    The ids in use ascend without repetition; those after the first `count` are S, and their rows
    zero. A table split by rows has one such list, and one count, after another (memory/sharded).
    """
    ids: Int32[Array, 'rows']
    rows: Float[Array, 'rows V']    # float32
    count: Int32[Array, 'shards']   # type: ignore[assignment]  # hides a method of tuples


class Touched(NamedTuple):
    """`ids` and `count` of the SparseRows that a read touched."""
    ids: Int32[Array, 'rows']
    count: Int32[Array, 'shards']   # type: ignore[assignment]  # hides a method of tuples


def is_rows(node: Any) -> bool:
    """Whether a node of a gradient is a compact one: `is_leaf` for jax.tree functions."""
    return isinstance(node, SparseRows)


def rows_of(tree: Any) -> Any:
    """`tree` with the rows alone of every SparseRows: what norms and sums are taken of."""
    return jax.tree.map(lambda leaf: leaf.rows if is_rows(leaf) else leaf, tree, is_leaf=is_rows)


def distinct(
    ids: Int32[Array, '...'], n_slots: int, capacity: int,
) -> tuple[Int32[Array, '{capacity}'], Int32[Array, '1']]:
    """The different ids below `n_slots`, ascending, filled up with n_slots; and their number.

    One sort. There must be no more than `capacity` of them.
    """
    ids = jnp.sort(ids.reshape(-1))
    first = jnp.concatenate([jnp.ones(1, bool), ids[1:] != ids[:-1]]) & (ids < n_slots)
    return packed(ids, first, n_slots, capacity)


def packed(
    ids: Int32[Array, 'n'], chosen: Bool[Array, 'n'], n_slots: int, capacity: int,
) -> tuple[Int32[Array, '{capacity}'], Int32[Array, '1']]:
    """The chosen ids in their order, filled up with n_slots; and their number.

    There must be no more than `capacity` of them.
    """
    position = jnp.where(chosen, jnp.cumsum(chosen) - 1, capacity)
    found = jnp.full(capacity, n_slots, jnp.int32).at[position].set(ids, mode='drop')
    return found, jnp.sum(chosen, dtype=jnp.int32)[None]


def merge(parts: SparseRows, n_slots: int, capacity: int) -> SparseRows:
    """The sum of parts stacked along a leading axis, added in their order: deterministic.

    There must be no more than `capacity` different ids in all.
    """
    ids, count = distinct(parts.ids, n_slots, capacity)

    def add(rows, part):
        where = jnp.where(part.ids < n_slots, jnp.searchsorted(ids, part.ids), capacity)
        return put_rows(rows, where, part.rows, add=True), None

    start = jnp.zeros((capacity, parts.rows.shape[-1]), jnp.float32)
    return SparseRows(ids, jax.lax.scan(add, start, parts)[0], count)


def take_rows(table: Array, ids: Int32[Array, 'rows']) -> Array:
    """Rows of `table` [S, …]; zeros for ids of S or more."""
    return table.at[ids].get(mode='fill', fill_value=0, wrap_negative_indices=False)


def put_rows(table: Array, ids: Int32[Array, 'rows'], rows: Array, add: bool = False) -> Array:
    """`table` [S, …] with different rows set, or added to; ids of S or more change nothing.

    Done in place where the table is not used again, at a cost that does not depend on S (but in
    bfloat16 on a CPU, where XLA passes the whole table through float32).
    """
    size = len(table)
    # Ids that change nothing must differ too, for the scatter to need no atomic operations.
    ids = jnp.where(ids < size, ids, size + jnp.arange(len(ids), dtype=jnp.int32))
    where = table.at[ids]
    change = where.add if add else where.set
    return change(rows.astype(table.dtype), mode='drop', unique_indices=True,
                  wrap_negative_indices=False)

"""Groups of parameters by path, their norms, and the schedule of a learning rate."""

from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from pkm_jax.memory.sparse_rows import is_rows, rows_of
from pkm_jax.models.interface import path_of

GROUPS = 'values', 'undecayed', 'decayed'


def group_of(path: str, tables: Collection[str]) -> str:
    """The group of the parameter at 'layers/0/attention/query/kernel'; `tables` are the paths of
    the value tables."""
    if path in tables:
        return 'values'
    return 'undecayed' if path.endswith(('bias', 'scale')) else 'decayed'


def groups_of(params: Any, tables: Collection[str]) -> Any:
    """A tree like the parameters, of the names of their groups: labels for `optax.partition`."""
    return jax.tree_util.tree_map_with_path(lambda path, _: group_of(path_of(path), tables),
                                            params, is_leaf=is_rows)


def group_norms(tree: Any, tables: Collection[str]) -> dict[str, Float[Array, '']]:
    """The 2-norm of each group of parameters, gradients or updates, summed in float32.

    SparseRows count as their rows. Groups without a parameter are left out.
    """
    squares = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(rows_of(tree)):
        square = jnp.sum(jnp.square(leaf.astype(jnp.float32)))
        squares.setdefault(group_of(path_of(path), tables), []).append(square)
    return {group: jnp.sqrt(sum(squares[group])) for group in GROUPS if group in squares}


def schedule(peak: float, warmup: int, steps: int) -> optax.Schedule:
    """Linear from 0 to `peak` over `warmup` steps, then linear to 0 at `steps`."""
    return optax.join_schedules([optax.linear_schedule(0., peak, warmup),
                                 optax.linear_schedule(peak, 0., steps - warmup)], [warmup])

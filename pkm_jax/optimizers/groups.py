"""Groups of parameters by path, their norms, and the schedule of a learning rate."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from pkm_jax.memory.sparse_rows import is_rows, rows_of

# The first pattern found in a parameter's path names its group.
GROUPS = (
    (r'memory/values$', 'values'),
    (r'(bias|scale)$', 'undecayed'),
    (r'', 'decayed'),
)


def group_of(path: str) -> str:
    """The group of the parameter at 'layers/0/attention/query/kernel'."""
    return next(group for pattern, group in GROUPS if re.search(pattern, path))


def groups_of(params: Any) -> Any:
    """A tree like the parameters, of the names of their groups: labels for `optax.partition`."""
    return jax.tree_util.tree_map_with_path(lambda path, _: group_of(path_of(path)), params,
                                            is_leaf=is_rows)


def group_norms(tree: Any) -> dict[str, Float[Array, '']]:
    """The 2-norm of each group of parameters, gradients or updates, summed in float32.

    SparseRows count as their rows. Groups without a parameter are left out.
    """
    squares = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(rows_of(tree)):
        square = jnp.sum(jnp.square(leaf.astype(jnp.float32)))
        squares.setdefault(group_of(path_of(path)), []).append(square)
    return {group: jnp.sqrt(sum(squares[group])) for _, group in GROUPS if group in squares}


def schedule(peak: float, warmup: int, steps: int) -> optax.Schedule:
    """Linear from 0 to `peak` over `warmup` steps, then linear to 0 at `steps`."""
    return optax.join_schedules([optax.linear_schedule(0., peak, warmup),
                                 optax.linear_schedule(peak, 0., steps - warmup)], [warmup])


def path_of(keys: tuple) -> str:
    """'layers/0/attention/query/kernel' of the keys that lead to a leaf of a tree."""
    return jax.tree_util.keystr(keys, simple=True, separator='/')

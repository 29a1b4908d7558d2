"""Steps whose loss or gradient is none to learn from change nothing but the number of the step."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from pkm_jax.memory.sparse_rows import is_rows
from pkm_jax.optimizers.sparse import RowsState, is_of_table

FORGETS = 0.01      # share of a running mean that each step replaces


class LossLimit(NamedTuple):
    """The state of an optimizer beside the loss above which its steps are skipped."""
    limit: Float[Array, '']     # infinite before the first step
    inner: Any


def limit_loss(
    inner: optax.GradientTransformation, factor: float,
) -> optax.GradientTransformationExtraArgs:
    """`inner`, watching the running mean of the loss that `update` is given as `loss`.

    Steps whose loss is above `factor` times that mean are not `is_sound`.
    """
    def init(params):
        return LossLimit(jnp.full((), jnp.inf), inner.init(params))

    def update(updates, state, params=None, *, loss, **others):
        updates, changed = optax.with_extra_args_support(inner).update(
            updates, state.inner, params, **others)
        moved = state.limit + FORGETS * (factor * loss - state.limit)
        return updates, LossLimit(
            jnp.where(jnp.isinf(state.limit), factor * loss, moved), changed)

    return optax.GradientTransformationExtraArgs(init, update)


def is_sound(
    loss: Float[Array, ''], gradient_norm: Float[Array, ''], state: Any,
) -> Bool[Array, '']:
    """Whether to take a step: loss and gradient are finite, and the loss is not above its limit."""
    sound = jnp.isfinite(loss) & jnp.isfinite(gradient_norm)
    return sound & (loss <= state.limit) if isinstance(state, LossLimit) else sound


def rows_if(sound: Bool[Array, ''], gradient: Any, params: Any) -> Any:
    """A gradient whose SparseRows name no row unless `sound`: no row of a table is written."""
    def name(gradient, param):
        if not is_rows(gradient):
            return gradient
        return gradient._replace(ids=jnp.where(sound, gradient.ids, len(param)),
                                 count=jnp.where(sound, gradient.count, 0))

    return jax.tree.map(name, gradient, params, is_leaf=is_rows)


def params_if(sound: Bool[Array, ''], updates: Any, changed: Any, params: Any) -> Any:
    """The `changed` parameters, or those of before; tables stay as they are, see `rows_if`."""
    return jax.tree.map(
        lambda update, new, old: new if is_of_table(update) else jnp.where(sound, new, old),
        updates, changed, params, is_leaf=is_of_table)


def state_if(sound: Bool[Array, ''], changed: Any, state: Any) -> Any:
    """The `changed` state of an optimizer, or that of before; of tables only counts: `rows_if`."""
    def choose(new, old):
        if isinstance(new, RowsState):
            return new._replace(count=jnp.where(sound, new.count, old.count))
        return jnp.where(sound, new, old)

    return jax.tree.map(choose, changed, state, is_leaf=lambda node: isinstance(node, RowsState))

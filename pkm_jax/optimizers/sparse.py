"""Optax-style transformations of compact gradients: only the rows that a step read change.

Updates and gradients are trees with a `SparseRows` in place of each value table's array; those of
other parameters belong in another group of `optax.partition`. States are as large as Optax's and
laid out like the tables; rows that were not read keep every bit of theirs. Rates are numbers or
Optax schedules, moments float32 whatever the table is. `axes` are those of the mesh in use that
split the tables, as in `ProductKeyMemory`; None: see `pkm_jax.mesh.axes_of`.

`update(updates, state, params, rounding=key)` changes the tables too, each touched row in one pass,
on a TPU or a GPU by a kernel. Its updates are for `apply_updates` with the same key, which then
only takes the tables; the results are those of `update(updates, state)`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int32, Key

from pkm_jax.memory.sharded import on_parts, put_rows, resolve, take_rows
from pkm_jax.memory.sparse_rows import is_rows, rows_of
from pkm_jax.mesh import Axes, axes_of, explicit_axes, on_auto_axes, specs_of
from pkm_jax.optimizers import rules
from pkm_jax.optimizers.rounding import round_stochastically
from pkm_jax.optimizers.rules import Numbers, Rule
from pkm_jax.refusal import Refusal

Rate = float | Callable[[Any], Any]     # or an Optax schedule


class ChangedTable(NamedTuple):
    """In the place of an update: a table that has had it."""
    table: Float[Array, 'S V']
    #: of each part of the table by rows and columns, the norm of its update
    norms: Float[Array, 'rows columns']


def is_of_table(node: Any) -> bool:
    """Whether a node of updates is a table's: `is_leaf` for jax.tree functions."""
    return is_rows(node) or isinstance(node, ChangedTable)


def norms_of(updates: Any) -> Any:
    """Updates with the norms of its parts for every ChangedTable: for norms of the whole."""
    return jax.tree.map(lambda node: node.norms if isinstance(node, ChangedTable) else node,
                        updates, is_leaf=is_of_table)


class RowsState(NamedTuple):
    """Steps taken, and trees of moments: [S, V], or [S] where they are one number a row."""
    count: Int32[Array, '']     # type: ignore[assignment]  # hides a method of tuples
    moments: tuple


def clip_by_global_norm(largest: float) -> optax.GradientTransformation:
    """`optax.clip_by_global_norm` that leaves rows of SparseRows as they are: they get a `scale`.

    So they need not be written again before a kernel reads them.
    """
    inner = optax.clip_by_global_norm(largest)

    def update(updates, state, params=None):
        rows = rows_of(updates)
        clipped, state = inner.update(rows, state)
        norm = optax.tree.norm(rows)
        scale = jnp.where(norm < largest, 1, largest / norm)
        return _map(lambda old, new: old._replace(scale=scale) if is_rows(old) else new,
                    updates, clipped), state

    return optax.GradientTransformation(inner.init, update)


def sparse_sgd(
    rate: Rate, *, axes: Axes | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Stochastic gradient descent of the rows that were read, without moments."""
    return _by_row(rate, rules.sgd_rule(), axes)


def lazy_adam(
    rate: Rate, beta1: float = 0.9, beta2: float = 0.999, epsilon: float = 1e-8, *,
    axes: Axes | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Adam whose moments decay only when their row is read, as in torch.optim.SparseAdam.

    The correction of the bias is that of all steps taken; epsilon is added to √v before it.
    `rate` is a number or an Optax schedule; `axes`: see `pkm_jax.mesh.axes_of`.
    """
    return _by_row(rate, rules.lazy_adam_rule(beta1, beta2, epsilon), axes)


def rowwise_adam(
    rate: Rate, beta1: float = 0.9, beta2: float = 0.999, epsilon: float = 1e-8, *,
    axes: Axes | None = None,
) -> optax.GradientTransformationExtraArgs:
    """`lazy_adam` with one second moment for each row, that of the mean square of its gradient."""
    return _by_row(rate, rules.rowwise_adam_rule(beta1, beta2, epsilon), axes)


def rowwise_adagrad(
    rate: Rate, epsilon: float = 1e-8, *, axes: Axes | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Adagrad (Duchi et al. 2011) with one sum a row, of the mean squares of its gradient."""
    return _by_row(rate, rules.rowwise_adagrad_rule(epsilon), axes)


def apply_updates(
    params: Any, updates: Any, key: Key[Array, ''], *, axes: Axes | None = None,
) -> Any:
    """`optax.apply_updates` for trees in which `SparseRows` are the updates of tables.

    Only the rows that they name change. Rows of a bfloat16 table are rounded stochastically; the
    random bits depend on the key, the row and the column alone, so that they are the same on any
    layout of devices. Tables stay split as they are.

    Raises:
      Refusal: the mesh in use lacks one of the axes.
    """
    axes = axes_of(axes)[0]

    def change(table, update, key):
        rows = (take_rows(table, update.ids, axes=axes).astype(jnp.float32)
                + update.rows.astype(jnp.float32))
        if table.dtype == jnp.bfloat16:
            rows = round_stochastically(rows, update.ids, key)
        return put_rows(table, update.ids, rows, axes=axes)

    def apply(update, param):
        if isinstance(update, ChangedTable):
            return update.table
        if not is_rows(update):
            return optax.apply_updates(param, update)
        return on_auto_axes(change, specs_of(param))(param, update, key)

    return _map(apply, updates, params)


# Both are made from the table, so that they are split as it is (see layout.py).

def _per_number(table):
    return jnp.zeros_like(table, dtype=jnp.float32)


def _per_row(table):
    return jnp.zeros_like(jax.eval_shape(lambda rows: jnp.sum(rows, axis=1), table),
                          dtype=jnp.float32)


def _by_row(rate: Rate, rule: Rule, axes: Axes | None) -> optax.GradientTransformationExtraArgs:
    """Descent by -rate times the rule's step; see the module."""
    zeros = [_per_row if per_row else _per_number for per_row in rule.per_row]

    def init(params):
        return RowsState(jnp.zeros((), jnp.int32), tuple(
            jax.tree.map(start, params) for start in zeros))

    def update(updates, state, params=None, *, rounding=None, **_):
        if rounding is not None and params is None:
            raise Refusal('update(…, rounding=key) changes the tables too: give it params.')
        count = optax.safe_increment(state.count)
        numbers = (jnp.asarray(rate(state.count) if callable(rate) else rate, jnp.float32),
                   rule.correction(count.astype(jnp.float32)))

        def of_table(gradient, *arrays):
            specs = specs_of(arrays)
            if rounding is None:
                results = specs_of(gradient)._replace(scale=None), *specs
                change = on_auto_axes(functools.partial(_change_rows, rule, axes), results)
                return change(numbers, gradient, *arrays)
            parts: Any = explicit_axes(axes_of(axes)[0]).table  # a spec in place of an array
            results = ChangedTable(specs[0], parts), *specs[1:]
            change = on_auto_axes(functools.partial(_change_table, rule, axes), results)
            return change(numbers, rounding, gradient, *arrays)

        gradients, tree = jax.tree.flatten(updates, is_leaf=is_rows)
        trees = ([] if rounding is None else [params]) + list(state.moments)
        by_table = list(map(of_table, gradients, *map(jax.tree.leaves, trees)))
        updates, *moments = (jax.tree.unflatten(tree, [results[at] for results in by_table])
                             for at in range(1 + len(zeros)))
        return updates, RowsState(count, tuple(moments))

    return optax.GradientTransformationExtraArgs(init, update)


def _change_rows(rule, axes, numbers, gradient, *moments):
    """SparseRows of what is to be added to a table, and its moments changed."""
    axes = axes_of(axes)[0]
    change, moments = rules.changes(
        gradient.ids, _numbers(numbers, gradient), gradient.rows, _mean_squares(rule, gradient),
        moments, rule, take=functools.partial(take_rows, axes=axes),
        put=functools.partial(put_rows, axes=axes))
    return gradient._replace(rows=change, scale=None), *moments


def _change_table(rule, axes, numbers, rounding, gradient, *changing):
    """A table changed, and its moments."""
    axes, implementation = resolve(axes, None)
    norms, table, *moments = on_parts(
        functools.partial(rules.update_rows, implementation, rule=rule), gradient.ids,
        (jnp.stack(_numbers(numbers, gradient)), jax.random.bits(rounding, (2,))),
        (gradient.rows, _mean_squares(rule, gradient)), changing, axes=axes)
    return ChangedTable(table, norms), *moments


def _numbers(numbers, gradient):
    rate, correction = numbers
    return Numbers(rate, correction, jnp.ones(()) if gradient.scale is None else gradient.scale)


def _mean_squares(rule, gradient):
    """Of each row, scaled; zeros where no moment is one number a row. They are of the rows as they
    lie, so that one pass is enough for these and for the norm of the gradient."""
    if not any(rule.per_row):
        return jnp.zeros(len(gradient.rows))
    squares = jnp.mean(gradient.rows.astype(jnp.float32) ** 2, axis=1)
    return squares if gradient.scale is None else squares * gradient.scale ** 2


def _map(function: Callable, updates: Any, *trees: Any) -> Any:
    """jax.tree.map over parameters, what there is of a table among the updates being one."""
    return jax.tree.map(function, updates, *trees, is_leaf=is_of_table)

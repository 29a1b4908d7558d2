"""Optax-style transformations of compact gradients: only the rows that a step read change.

Updates and gradients are trees with a `SparseRows` in place of each value table's array; those of
other parameters belong in another group of `optax.partition`. States are as large as Optax's and
laid out like the tables; rows that were not read keep every bit of theirs. Rates are numbers or
Optax schedules, moments float32 whatever the table is. `axes` are those of the mesh in use that
split the tables, as in `ProductKeyMemory`; None: see `pkm_jax.mesh.axes_of`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, BFloat16, Float, Int32, Key, UInt32

from pkm_jax.dispatch import Choice, Kernel
from pkm_jax.memory import sparse_rows
from pkm_jax.memory.sharded import on_parts, put_rows, resolve, take_rows
from pkm_jax.memory.sparse_rows import is_rows, rows_of
from pkm_jax.mesh import Axes, axes_of, on_auto_axes, specs_of

Rate = float | Callable[[Any], Any]     # or an Optax schedule


class Rule(NamedTuple):
    """How the rows of a table change with their gradient. A moment is as large as the table, or one
    number a row, which the step gets as a column."""
    moments: Callable[..., tuple]   # gradient, mean squares of its rows, *old moments -> new ones
    step: Callable[..., Array]      # gradient, *new moments, correction -> what is descended
    per_row: tuple[bool, ...]       # of each moment, whether it is one number a row
    correction: Callable[[Array], Array]    # of the number of the step -> a factor of it


class ChangedTable(NamedTuple):
    """In the place of an update: a table that has had it."""
    table: Array
    #: of each row, and part by columns, the norm of its update
    norms: Float[Array, 'S parts']


def is_of_table(node: Any) -> bool:
    """Whether a node of updates is a table's: `is_leaf` for jax.tree functions."""
    return is_rows(node) or isinstance(node, ChangedTable)


def norms_of(updates: Any) -> Any:
    """Updates with the norms of its rows for every ChangedTable: for norms of the whole."""
    return jax.tree.map(lambda node: node.norms if isinstance(node, ChangedTable) else node,
                        updates, is_leaf=is_of_table)


class RowsState(NamedTuple):
    """Steps taken, and trees of moments: [S, V], or [S] where they are one number a row."""
    count: Int32[Array, '']     # type: ignore[assignment]  # hides a method of tuples
    moments: tuple


def on_rows(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """`inner`, which must not keep a state of the parameters' size, applied to the rows alone."""
    def update(updates, state, params=None):
        changed, state = inner.update(rows_of(updates), state)
        return _map(lambda old, new: old._replace(rows=new) if is_rows(old) else new,
                    updates, changed), state

    return optax.GradientTransformation(inner.init, update)


def sparse_sgd(rate: Rate) -> optax.GradientTransformation:
    """Stochastic gradient descent of the rows that were read, without moments."""
    return on_rows(optax.sgd(rate))


def lazy_adam(
    rate: Rate, beta1: float = 0.9, beta2: float = 0.999, epsilon: float = 1e-8, *,
    axes: Axes | None = None,
) -> optax.GradientTransformation:
    """Adam whose moments decay only when their row is read, as in torch.optim.SparseAdam.

    The correction of the bias is that of all steps taken; epsilon is added to √v before it.
    `rate` is a number or an Optax schedule; `axes`: see `pkm_jax.mesh.axes_of`.
    """
    return _by_row(rate, lazy_adam_rule(beta1, beta2, epsilon), axes)


def rowwise_adam(
    rate: Rate, beta1: float = 0.9, beta2: float = 0.999, epsilon: float = 1e-8, *,
    axes: Axes | None = None,
) -> optax.GradientTransformation:
    """`lazy_adam` with one second moment for each row, that of the mean square of its gradient."""
    return _by_row(rate, rowwise_adam_rule(beta1, beta2, epsilon), axes)


def rowwise_adagrad(
    rate: Rate, epsilon: float = 1e-8, *, axes: Axes | None = None,
) -> optax.GradientTransformation:
    """Adagrad (Duchi et al. 2011) with one sum a row, of the mean squares of its gradient."""
    return _by_row(rate, rowwise_adagrad_rule(epsilon), axes)


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
        rows = take_rows(table, update.ids, axes=axes).astype(jnp.float32) + update.rows
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


def round_stochastically(
    rows: Float[Array, 'rows V'], ids: Int32[Array, 'rows'], key: Key[Array, ''],
) -> BFloat16[Array, 'rows V']:
    """Float32 rows as bfloat16: up or down, so that the mean is the number that was rounded."""
    columns = jnp.arange(rows.shape[1], dtype=jnp.int32)
    bits = noise(jax.random.bits(key, (2,)), ids[:, None], columns[None])
    return rounded(rows, bits).astype(jnp.bfloat16)


def noise(
    seed: Any, rows: Int32[Array, '...'], columns: Int32[Array, '...'],
) -> UInt32[Array, '...']:
    """16 random bits for each number, by two words of seed, its row and its column alone."""
    rows, columns = rows.astype(jnp.uint32), columns.astype(jnp.uint32)
    return _mix(_mix(rows ^ seed[0]) ^ _mix(columns ^ seed[1])) >> 16


def rounded(numbers: Float[Array, '...'], bits: UInt32[Array, '...']) -> Float[Array, '...']:
    """Numbers that bfloat16 has, in float32: rounded up where those of 16 bits carry."""
    carried = jax.lax.bitcast_convert_type(numbers, jnp.uint32) + bits & jnp.uint32(0xFFFF0000)
    return jnp.where(jnp.isfinite(numbers), jax.lax.bitcast_convert_type(carried, jnp.float32),
                     numbers)


def _mix(x: UInt32[Array, '...']) -> UInt32[Array, '...']:
    """Scrambles 32 bits: the finaliser of MurmurHash3 (Appleby, public domain)."""
    x = (x ^ x >> 16) * jnp.uint32(0x85EBCA6B)
    x = (x ^ x >> 13) * jnp.uint32(0xC2B2AE35)
    return x ^ x >> 16


def lazy_adam_rule(beta1: float, beta2: float, epsilon: float) -> Rule:
    """That of `lazy_adam`."""
    def moments(gradient, _, first, second):
        return (first + (1 - beta1) * (gradient - first),
                second + (1 - beta2) * (gradient ** 2 - second))

    return _adam(moments, beta1, beta2, epsilon, (False, False))


def rowwise_adam_rule(beta1: float, beta2: float, epsilon: float) -> Rule:
    """That of `rowwise_adam`."""
    def moments(gradient, square, first, second):
        return (first + (1 - beta1) * (gradient - first),
                second + (1 - beta2) * (square - second))

    return _adam(moments, beta1, beta2, epsilon, (False, True))


def rowwise_adagrad_rule(epsilon: float) -> Rule:
    """That of `rowwise_adagrad`."""
    def moments(_, square, total):
        return total + square,

    def step(gradient, total, _):
        return gradient / (jnp.sqrt(total) + epsilon)

    return Rule(moments, step, (True,), jnp.ones_like)


def _adam(moments, beta1, beta2, epsilon, per_row):
    def step(_, first, second, correction):
        return correction * first / (jnp.sqrt(second) + epsilon)

    def correction(count):
        return jnp.sqrt(1 - beta2 ** count) / (1 - beta1 ** count)

    return Rule(moments, step, per_row, correction)


# Both are made from the table, so that they are split as it is (see layout.py).

def _per_number(table):
    return jnp.zeros_like(table, dtype=jnp.float32)


def _per_row(table):
    return jnp.zeros_like(jax.eval_shape(lambda rows: jnp.sum(rows, axis=1), table),
                          dtype=jnp.float32)


def _by_row(rate: Rate, rule: Rule, axes: Axes | None) -> optax.GradientTransformation:
    """Descent by -rate times the rule's step."""
    zeros = [_per_row if per_row else _per_number for per_row in rule.per_row]

    def init(params):
        return RowsState(jnp.zeros((), jnp.int32), tuple(
            jax.tree.map(start, params) for start in zeros))

    def update(updates, state, params=None, *, rounding=None, **_):
        count = optax.safe_increment(state.count)
        scale = rate(state.count) if callable(rate) else rate
        numbers = jnp.stack([scale, rule.correction(count.astype(jnp.float32))])
        split, implementation = resolve(axes, None)

        def change_rows(numbers, gradient, *moments):
            tables, new = _new_moments(rule, gradient, moments, split)
            step = rule.step(gradient.rows, *map(_as_column, new), numbers[1])
            return gradient._replace(rows=-numbers[0] * step), *tables

        def change_table(numbers, gradient, table, *moments):
            squares = _mean_squares(rule, gradient.rows)
            changed = on_parts(
                functools.partial(_update_choice, implementation, rule=rule), table, gradient.ids,
                (numbers, jax.random.bits(rounding, (2,))),
                (gradient.rows, jnp.zeros(len(table)) if squares is None else squares, *moments),
                axes=split)
            return ChangedTable(*changed[:2]), *changed[2:]

        def of_table(gradient, table, *moments):
            in_order = rounding is not None and len(gradient.ids) == len(table)
            change, arrays = (change_table, (gradient, table, *moments)) if in_order else (
                change_rows, (gradient, *moments))
            return on_auto_axes(change, specs_of(arrays))(numbers, *arrays)

        gradients, tree = jax.tree.flatten(updates, is_leaf=is_rows)
        tables = jax.tree.leaves(params) if rounding is not None else [None] * len(gradients)
        by_table = map(of_table, gradients, tables, *map(jax.tree.leaves, state.moments))
        updates, *moments = (jax.tree.unflatten(tree, leaves) for leaves in zip(*by_table))
        return updates, RowsState(count, tuple(moments))

    return optax.GradientTransformationExtraArgs(init, update)


def _new_moments(rule, gradient, moments, split):
    """Moments with the rows that were read changed, and these rows."""
    old = [take_rows(moment, gradient.ids, axes=split) for moment in moments]
    new = rule.moments(gradient.rows, _mean_squares(rule, gradient.rows), *old)
    tables = [put_rows(moment, gradient.ids, rows, axes=split)
              for moment, rows in zip(moments, new)]
    if len(gradient.ids) == len(tables[0]):
        tables = [_written_once(table) for table in tables]
        new = tuple(take_rows(table, gradient.ids, axes=split) for table in tables)
    return tables, new


def reference(
    table: Float[Array, 'S V'], ids: Int32[Array, 'S'], start: Int32[Array, '2'],
    numbers: Float[Array, '2'], seed: UInt32[Array, '2'], gradient: Float[Array, 'S V'],
    squares: Float[Array, 'S'], *moments: Float[Array, 'S ...'], rule: Rule,
) -> tuple[Array, ...]:
    """A table changed in the rows whose place in `ids` is in use, the norm of each row's change,
    and changed moments, in plain jnp.

    `start`: the slot and the column with which this part of a table begins; `numbers`: the rate and
    the rule's correction; `seed`: of the random bits; `squares`: the mean ones of each row.
    """
    old = [sparse_rows.take_rows(moment, ids) for moment in moments]
    new = rule.moments(gradient, squares, *old)
    changed = [_written_once(sparse_rows.put_rows(moment, ids, rows))
               for moment, rows in zip(moments, new)]
    new = [sparse_rows.take_rows(moment, ids) for moment in changed]
    change = -numbers[0] * rule.step(gradient, *map(_as_column, new), numbers[1])
    rows = sparse_rows.take_rows(table, ids).astype(jnp.float32) + change
    if table.dtype == jnp.bfloat16:
        slots, columns = (jnp.arange(size, dtype=jnp.int32) + at
                          for size, at in zip(table.shape, start))
        rows = rounded(rows, noise(seed, slots[:, None], columns[None]))
    norms = jnp.sqrt(jnp.sum(jnp.where((ids < len(table))[:, None], change, 0) ** 2, axis=1))
    return sparse_rows.put_rows(table, ids, rows), norms[:, None], *changed


def _load_for_tpus():
    from pkm_jax.optimizers import tpu_rows
    return Kernel(tpu_rows.update, tpu_rows.unsupported)


_update_choice = Choice('update of rows', reference, None, _load_for_tpus)


def _mean_squares(rule, rows):
    """Of each row; none where no moment is one number a row."""
    return jnp.mean(rows ** 2, axis=1) if any(rule.per_row) else None


def _as_column(moment):
    return moment[:, None] if moment.ndim == 1 else moment


def _written_once(moment):
    """The moment; on a TPU behind a barrier, so that what follows reads what was written, where XLA
    would compute it a second time, from the gradient and the old moment."""
    return jax.lax.platform_dependent(moment, tpu=jax.lax.optimization_barrier,
                                      default=lambda moment: moment)


def _map(function: Callable, updates: Any, *trees: Any) -> Any:
    """jax.tree.map over parameters, what there is of a table among the updates being one."""
    return jax.tree.map(function, updates, *trees, is_leaf=is_of_table)

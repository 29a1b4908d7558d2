"""Optax-style transformations of compact gradients: only the rows that a step read change.

Updates and gradients are trees with a `SparseRows` in place of each value table's array; those of
other parameters belong in another group of `optax.partition`. States are as large as Optax's and
laid out like the tables; rows that were not read keep every bit of theirs. Rates are numbers or
Optax schedules, moments float32 whatever the table is. `axes` are those of the mesh in use that
split the tables, as in `ProductKeyMemory`; None: see `pkm_jax.mesh.axes_of`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, BFloat16, Float, Int32, Key, UInt32

from pkm_jax.memory.sharded import put_rows, take_rows
from pkm_jax.memory.sparse_rows import is_rows, rows_of
from pkm_jax.mesh import Axes, axes_of, on_auto_axes, specs_of

Rate = float | Callable[[Any], Any]     # or an Optax schedule


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
    def moments(gradient, first, second):
        return (first + (1 - beta1) * (gradient - first),
                second + (1 - beta2) * (gradient ** 2 - second))

    def step(_, first, second, count):
        return _adam_step(first, second, count, beta1, beta2, epsilon)

    return _by_row(rate, moments, step, (_per_number, _per_number), axes)


def rowwise_adam(
    rate: Rate, beta1: float = 0.9, beta2: float = 0.999, epsilon: float = 1e-8, *,
    axes: Axes | None = None,
) -> optax.GradientTransformation:
    """`lazy_adam` with one second moment for each row, that of the mean square of its gradient."""
    def moments(gradient, first, second):
        return (first + (1 - beta1) * (gradient - first),
                second + (1 - beta2) * (jnp.mean(gradient ** 2, axis=1) - second))

    def step(_, first, second, count):
        return _adam_step(first, second[:, None], count, beta1, beta2, epsilon)

    return _by_row(rate, moments, step, (_per_number, _per_row), axes)


def rowwise_adagrad(
    rate: Rate, epsilon: float = 1e-8, *, axes: Axes | None = None,
) -> optax.GradientTransformation:
    """Adagrad (Duchi et al. 2011) with one sum a row, of the mean squares of its gradient."""
    def moments(gradient, total):
        return total + jnp.mean(gradient ** 2, axis=1),

    def step(gradient, total, _):
        return gradient / (jnp.sqrt(total)[:, None] + epsilon)

    return _by_row(rate, moments, step, (_per_row,), axes)


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
        if not is_rows(update):
            return optax.apply_updates(param, update)
        return on_auto_axes(change, specs_of(param))(param, update, key)

    return _map(apply, updates, params)


def round_stochastically(
    rows: Float[Array, 'rows V'], ids: Int32[Array, 'rows'], key: Key[Array, ''],
) -> BFloat16[Array, 'rows V']:
    """Float32 rows as bfloat16: up or down, so that the mean is the number that was rounded."""
    seed = jax.random.bits(key, (2,))
    by_row = _mix(ids.astype(jnp.uint32) ^ seed[0])
    columns = jnp.arange(rows.shape[1], dtype=jnp.uint32)
    noise = _mix(by_row[:, None] ^ _mix(columns ^ seed[1])[None]) >> 16
    bits = jax.lax.bitcast_convert_type(rows, jnp.uint32) + noise >> 16
    rounded = jax.lax.bitcast_convert_type(bits.astype(jnp.uint16), jnp.bfloat16)
    return jnp.where(jnp.isfinite(rows), rounded, rows.astype(jnp.bfloat16))


def _mix(x: UInt32[Array, '...']) -> UInt32[Array, '...']:
    """Scrambles 32 bits: the finaliser of MurmurHash3 (Appleby, public domain)."""
    x = (x ^ x >> 16) * jnp.uint32(0x85EBCA6B)
    x = (x ^ x >> 13) * jnp.uint32(0xC2B2AE35)
    return x ^ x >> 16


def _adam_step(first, second, step, beta1, beta2, epsilon):
    correction = jnp.sqrt(1 - beta2 ** step) / (1 - beta1 ** step)
    return correction * first / (jnp.sqrt(second) + epsilon)


# Both are made from the table, so that they are split as it is (see layout.py).

def _per_number(table):
    return jnp.zeros_like(table, dtype=jnp.float32)


def _per_row(table):
    return jnp.zeros_like(jax.eval_shape(lambda rows: jnp.sum(rows, axis=1), table),
                          dtype=jnp.float32)


def _by_row(
    rate: Rate, change: Callable[..., tuple], step: Callable[..., Array],
    zeros: tuple[Callable, ...], axes: Axes | None,
) -> optax.GradientTransformation:
    """Descent by -rate · `step(gradient, *new moments, step number)`, of new moments
    `change(gradient, *moments)`. `zeros` make each moment of a table."""
    def init(params):
        return RowsState(jnp.zeros((), jnp.int32), tuple(
            jax.tree.map(start, params) for start in zeros))

    def update(updates, state, params=None):
        count = optax.safe_increment(state.count)
        scale = rate(state.count) if callable(rate) else rate
        split = axes_of(axes)[0]

        def change_rows(count, scale, gradient, *moments):
            old = [take_rows(moment, gradient.ids, axes=split) for moment in moments]
            new = change(gradient.rows, *old)
            tables = [put_rows(moment, gradient.ids, rows, axes=split)
                      for moment, rows in zip(moments, new)]
            if len(gradient.ids) == len(tables[0]):
                tables = [_written_once(table) for table in tables]
                new = tuple(take_rows(table, gradient.ids, axes=split) for table in tables)
            change_of = step(gradient.rows, *new, count.astype(jnp.float32))
            return gradient._replace(rows=-scale * change_of), *tables

        def of_table(*arrays):
            return on_auto_axes(change_rows, specs_of(arrays))(count, scale, *arrays)

        gradients, tree = jax.tree.flatten(updates, is_leaf=is_rows)
        by_table = map(of_table, gradients, *map(jax.tree.leaves, state.moments))
        updates, *moments = (jax.tree.unflatten(tree, leaves) for leaves in zip(*by_table))
        return updates, RowsState(count, tuple(moments))

    return optax.GradientTransformation(init, update)


def _written_once(moment):
    """The moment, which on a TPU what follows reads as it is written: XLA would compute it again,
    from the gradient and the old one."""
    return jax.lax.platform_dependent(moment, tpu=jax.lax.optimization_barrier,
                                      default=lambda moment: moment)


def _map(function: Callable, updates: Any, *trees: Any) -> Any:
    """jax.tree.map over parameters, a SparseRows among the updates being one."""
    return jax.tree.map(function, updates, *trees, is_leaf=is_rows)

"""How the touched rows of a table change with their gradient: by rule, in plain jnp or by a kernel.

One function of a whole part of a table, so that a kernel can take its place: `update_rows`.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, UInt32

from pkm_jax.dispatch import Choice, Kernel
from pkm_jax.memory.sparse_rows import put_rows, take_rows
from pkm_jax.optimizers.rounding import round_rows


class Rule(NamedTuple):
    """How the rows of a table change with their gradient. A moment is as large as the table, and
    then depends on the gradient and others of its kind alone; or it is one number a row, depends on
    the mean squares and others of its kind alone, and the step gets it as a column."""
    moments: Callable[..., tuple]   # gradient, mean squares of its rows, *old moments -> new ones
    step: Callable[..., Array]      # gradient, *new moments, correction -> what is descended
    per_row: tuple[bool, ...]       # of each moment, whether it is one number a row
    correction: Callable[[Array], Array] = jnp.ones_like    # of the step's number -> a factor of it


class Numbers(NamedTuple):
    """What of a step is the same for all rows."""
    rate: Float[Array, '']
    correction: Float[Array, '']    # the rule's
    scale: Float[Array, '']         # a factor of the gradient


def sgd_rule() -> Rule:
    """That of `sparse_sgd`."""
    return Rule(lambda gradient, _: (), lambda gradient, _: gradient, ())


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

    return Rule(moments, step, (True,))


def _adam(moments, beta1, beta2, epsilon, per_row):
    def step(_, first, second, correction):
        return correction * first / (jnp.sqrt(second) + epsilon)

    def correction(count):
        return jnp.sqrt(1 - beta2 ** count) / (1 - beta1 ** count)

    return Rule(moments, step, per_row, correction)


def changes(
    ids: Int32[Array, 'rows'], numbers: Numbers, gradient: Float[Array, 'rows V'],
    squares: Float[Array, 'rows'], moments: Sequence[Float[Array, 'S ...']], rule: Rule, *,
    take: Callable = take_rows, put: Callable = put_rows,
) -> tuple[Float[Array, 'rows V'], tuple[Float[Array, 'S ...'], ...]]:
    """By how much the rows of SparseRows with these `ids` change, and moments changed in them.

    `squares` are the mean ones of each row of the gradient, scaled; `take` and `put` rows. The
    gradient may be narrower than float32, in which all is computed.
    """
    gradient = gradient.astype(jnp.float32) * numbers.scale
    new = rule.moments(gradient, squares, *(take(moment, ids) for moment in moments))
    changed = tuple(put(moment, ids, rows) for moment, rows in zip(moments, new))
    if moments and len(ids) == len(moments[0]):
        changed = tuple(map(_written_once, changed))
        new = tuple(take(moment, ids) for moment in changed)
    return -numbers.rate * rule.step(gradient, *map(_as_column, new), numbers.correction), changed


def reference(
    ids: Int32[Array, 'rows'], start: Int32[Array, '2'], numbers: Float[Array, '3'],
    seed: UInt32[Array, '2'], gradient: Float[Array, 'rows V'], squares: Float[Array, 'rows'],
    table: Float[Array, 'S V'], *moments: Float[Array, 'S ...'], rule: Rule,
) -> tuple[Array, ...]:
    """The norm [1, 1] of the change of a part of a table, the part changed, and its moments, in
    plain jnp; other arguments as in `changes`.

    `start`: the slot and the column with which the part begins; `numbers`: those of `Numbers`;
    `seed`: of the random bits with which rows of a bfloat16 table are rounded.
    """
    change, changed = changes(ids, Numbers(*numbers), gradient, squares, moments, rule)
    rows = take_rows(table, ids).astype(jnp.float32) + change
    if table.dtype == jnp.bfloat16:
        rows = round_rows(rows, ids + start[0], seed, start[1])
    squares = jnp.sum(jnp.where((ids < len(table))[:, None], change, 0) ** 2, keepdims=True)
    return jnp.sqrt(squares), put_rows(table, ids, rows), *changed


def moments_of_rows(
    ids: Int32[Array, 'rows'], gradient: Float[Array, 'rows V'], squares: Float[Array, 'rows'],
    moments: Sequence[Float[Array, 'S ...']], rule: Rule,
) -> tuple[list[Float[Array, 'rows']], tuple[Float[Array, 'S ...'], ...]]:
    """New moments of the rows with these `ids`, of those that are one number a row; and `moments`,
    of which these are changed. For kernels that leave such moments to XLA."""
    old, gradient = [take_rows(moment, ids) for moment in moments], gradient.astype(jnp.float32)
    new = rule.moments(gradient, squares, *old)     # those of rows alone are computed
    by_row = [rows for rows, one in zip(new, rule.per_row) if one]
    return by_row, tuple(put_rows(moment, ids, rows) if one else moment
                         for moment, rows, one in zip(moments, new, rule.per_row))


def _load_for_gpus():
    from pkm_jax.optimizers import gpu_rows
    return Kernel(gpu_rows.update, gpu_rows.unsupported)


def _load_for_tpus():
    from pkm_jax.optimizers import tpu_rows
    return Kernel(tpu_rows.update, tpu_rows.unsupported)


#: `reference`, or the kernel of the platform that a program is lowered for.
update_rows = Choice('update of rows', reference, _load_for_gpus, _load_for_tpus)


def _as_column(moment):
    return moment[:, None] if moment.ndim == 1 else moment


def _written_once(moment):
    """The moment; on a TPU behind a barrier, so that what follows reads what was written, where XLA
    would compute it a second time, from the gradient and the old moment."""
    return jax.lax.platform_dependent(moment, tpu=jax.lax.optimization_barrier,
                                      default=lambda moment: moment)

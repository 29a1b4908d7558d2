"""The update of a table's rows on a TPU (Pallas, Mosaic, TensorCore), each touched once.

Where every row of a part has its place, a program takes a block of the table, of its moments and of
the gradient, and writes table and moments where they were. Rows that are not in use keep what they
have. XLA keeps a table whose width is no multiple of LANES column after column; it is taken so.
With fewer places than rows see `tpu_few_rows`.

Bytes: the gradient is read, table and moments are read and written, once each. Operations: those of
the rule and, in bfloat16, some 20 for the random bits of each number. Floor: the bytes over the
memory bandwidth.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import ShapeDtypeStruct
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int32, UInt32

from pkm_jax.accelerators import LANES
from pkm_jax.memory.kernels.tpu.rows import Interpret
from pkm_jax.optimizers import tpu_few_rows
from pkm_jax.optimizers.rounding import noise, rounded
from pkm_jax.optimizers.rules import Numbers, Rule

BLOCK = 98_304      # numbers of a block at most, but where LANES rows have more
ROWS = 256          # of a block of a table that is kept row after row
WIDEST = 1_024      # columns of one that is not


def unsupported(
    ids: ShapeDtypeStruct, start: ShapeDtypeStruct, numbers: ShapeDtypeStruct,
    seed: ShapeDtypeStruct, gradient: ShapeDtypeStruct, squares: ShapeDtypeStruct,
    table: ShapeDtypeStruct, *_: ShapeDtypeStruct, rule: Any,
) -> str | None:
    """Why the kernels cannot update this table; None if they can."""
    if table.dtype not in (jnp.float32, jnp.bfloat16):
        return f'a table of {table.dtype} (float32 or bfloat16)'
    if ids.shape[0] < table.shape[0]:
        return tpu_few_rows.unsupported(table)
    if table.shape[1] % LANES and table.shape[1] > WIDEST:
        return f'{table.shape[1]} columns (a multiple of {LANES}, or at most {WIDEST})'
    return None


def update(
    ids: Int32[Array, 'rows'], start: Int32[Array, '2'], numbers: Float[Array, '3'],
    seed: UInt32[Array, '2'], gradient: Float[Array, 'rows V'], squares: Float[Array, 'rows'],
    table: Float[Array, 'S V'], *moments: Float[Array, 'S ...'], rule: Rule, interpret: Interpret,
) -> tuple[Array, ...]:
    """The norm of the change, the table changed, and its moments: see `rules.reference`."""
    gradient = gradient.astype(jnp.float32)
    run = _update_all if len(ids) == len(table) else tpu_few_rows.update
    return run(ids, start, numbers, seed, gradient, squares, table, *moments, rule=rule,
               interpret=interpret)


def _update_all(ids, start, numbers, seed, gradient, squares, *changing, rule, interpret):
    """Of rows that all have a place."""
    (slots, width), turned = gradient.shape, gradient.shape[1] % LANES != 0
    block, grid = _blocks(slots, width, turned)
    by_row = pl.BlockSpec((1, block[turned]), lambda n, _: (0, n))
    by_number = pl.BlockSpec(block, lambda n, c: (c, n) if turned else (n, c))

    def seen(array):
        return array[None] if array.ndim == 1 else array.T if turned else array

    def spec(array):
        return by_row if array.ndim == 1 else by_number

    arrays = ids, squares, gradient, *changing
    shapes = [ShapeDtypeStruct(seen(array).shape, array.dtype) for array in changing]
    integers = jnp.concatenate([jax.lax.bitcast_convert_type(seed, jnp.int32), start])
    scalars = pl.BlockSpec(memory_space=pltpu.SMEM)
    changed = pl.pallas_call(
        functools.partial(_update, rule=rule, turned=turned, slots=slots), grid=grid,
        name='update_rows', interpret=interpret,
        in_specs=[scalars, scalars, *map(spec, arrays)],
        out_specs=[*map(spec, changing), by_row],
        out_shape=[*shapes, ShapeDtypeStruct((1, slots), jnp.float32)],
        input_output_aliases={5 + at: at for at in range(len(changing))},
        compiler_params=pltpu.CompilerParams(dimension_semantics=('parallel', 'arbitrary')),
        cost_estimate=_cost(arrays, changing),
    )(numbers, integers, *map(seen, arrays))
    return jnp.sqrt(jnp.sum(changed[-1], keepdims=True)), *(
        new[0] if old.ndim == 1 else new.T if turned else new
        for new, old in zip(changed, changing))


def _blocks(slots, width, turned):
    """The shape of a block, and how many there are along rows and along columns."""
    if turned:
        rows = max(BLOCK // width // LANES, 1) * LANES
        return (width, rows), (pl.cdiv(slots, rows), 1)
    lines = width // LANES
    columns = LANES * max(n for n in range(1, lines + 1)
                          if lines % n == 0 and n * LANES * ROWS <= BLOCK)
    return (ROWS, columns), (pl.cdiv(slots, ROWS), width // columns)


def _cost(arrays, changing):
    numbers = changing[0].size
    return pl.CostEstimate(
        flops=10 * numbers, transcendentals=numbers,
        bytes_accessed=sum(array.size * array.dtype.itemsize for array in (*arrays, *changing)))


def _update(numbers, integers, ids, squares, gradient, *refs, rule, turned, slots):
    """One program: see the module."""
    old, (*new, norms) = refs[:len(refs) // 2], refs[len(refs) // 2:]

    def wide(by_row):
        """Numbers of rows, as each column gets them."""
        return by_row if turned else jnp.broadcast_to(by_row, (8, by_row.shape[1])).T[:, :1]

    rate, correction, scale = Numbers(*(numbers[at] for at in range(3)))
    used = ids[...] < slots
    used_wide = wide(used.astype(jnp.float32)) > 0
    table, *moments = (ref[...] for ref in old)
    gradient = gradient[...] * scale
    moments = [jnp.where(used if by_row else used_wide, after, before) for before, after, by_row in
               zip(moments, rule.moments(gradient, squares[...], *moments), rule.per_row)]
    for at, (ref, by_row) in enumerate(zip(new[1:], rule.per_row)):
        if by_row and not turned:   # of a row's first block of columns: `old` may be `new` by then
            moments[at] = jnp.where(pl.program_id(1) == 0, moments[at], ref[...])
        ref[...] = moments[at]
    change = -rate * rule.step(gradient, *(
        wide(moment) if by_row else moment for moment, by_row in zip(moments, rule.per_row)),
        correction)
    before = table.astype(jnp.float32)
    rows = before + change
    if table.dtype == jnp.bfloat16:
        rows = rounded(rows, _noise(integers, rows.shape, turned))
    new[0][...] = jnp.where(used_wide, rows, before).astype(table.dtype)
    _add_squares(norms, jnp.where(used_wide, change, 0), turned)


def _noise(integers, shape, turned):
    """`rounding.noise` of a block."""
    row, column = (
        _numbers_along(axis, shape[axis]) + (pl.program_id(at) * shape[axis] + integers[2 + at])
        for at, axis in enumerate((1, 0) if turned else (0, 1)))
    return noise([integers[at].astype(jnp.uint32) for at in range(2)], row, column)


def _numbers_along(axis, size):
    """0, 1, … along one axis of two, the other of which has length 1."""
    shape = (size, 1) if axis == 0 else (1, size)
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def _add_squares(norms, change, turned):
    """To those of each row what this block of columns adds."""
    if turned:
        norms[...] = jnp.sum(change ** 2, axis=0, keepdims=True)
        return
    squares = jnp.sum(change ** 2, axis=1, keepdims=True)
    squares = jnp.broadcast_to(squares, (len(squares), LANES)).T[:1]
    norms[...] = jnp.where(pl.program_id(1) == 0, squares, norms[...] + squares)

"""How the kernels for TPUs see arrays: a table's rows as pieces of 128, tokens in whole tiles."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.layout import Layout, with_layout_constraint
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32, Shaped

LANES = 128
TURNED = 4_096      # pieces that a program turns, but where LANES rows have more or 512 fewer
Interpret = bool | pltpu.InterpretParams    # the latter: copies at other times than they start


def as_rows(
    table: Float[Array, 'S V'], interpret: Interpret,
) -> Float[Array, 'S pieces 128']:
    """The table with rows that a copy can fetch alone, V filled up with zeros to pieces of 128.

    A copy of the whole table in another layout. One whose V is no multiple of 128 is kept by XLA
    column after column, which wastes no room: a kernel turns it and fills it up at once.
    """
    if table.shape[1] % LANES == 0:
        return table.reshape(len(table), -1, LANES)
    slots, width = table.shape
    pieces = -(-width // LANES)
    turned = _turned(pieces)
    return pl.pallas_call(
        _turn, grid=(pl.cdiv(slots, turned),), name='as_rows', interpret=interpret,
        in_specs=[pl.BlockSpec((width, turned), lambda n: (0, n))],
        out_specs=pl.BlockSpec((turned, pieces, LANES), lambda n: (n, 0, 0)),
        out_shape=jax.ShapeDtypeStruct((slots, pieces, LANES), table.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=('parallel',)),
    )(table.T)


def _turned(pieces):
    """Rows that a program turns."""
    return max(min(TURNED // pieces, 512) // LANES, 1) * LANES


def _turn(columns, rows):
    """One program: columns [V, rows] as rows."""
    width = columns.shape[0]
    for piece in range(rows.shape[1]):
        of_piece = columns[piece * LANES:min((piece + 1) * LANES, width)].astype(jnp.float32)
        missing = LANES - len(of_piece)
        if missing:
            of_piece = jnp.concatenate([of_piece, jnp.zeros((missing, rows.shape[0]), jnp.float32)])
        rows[:, piece] = of_piece.T.astype(rows.dtype)


def as_table(
    rows: Float[Array, 'S pieces 128'], width: int, interpret: Interpret,
) -> Float[Array, 'S {width}']:
    """What `as_rows` made rows of: row after row where that wastes no room, else XLA may want
    columns together, and bring the table and its moments into that order too. Where it wastes
    room, column after column."""
    slots, pieces, _ = rows.shape
    turned = _turned(pieces)
    if width % LANES == 0:
        return with_layout_constraint(rows.reshape(slots, width), Layout((0, 1)))
    return pl.pallas_call(
        _turn_back, grid=(pl.cdiv(slots, turned),), name='as_table', interpret=interpret,
        in_specs=[pl.BlockSpec((turned, pieces, LANES), lambda n: (n, 0, 0))],
        out_specs=pl.BlockSpec((width, turned), lambda n: (0, n)),
        out_shape=jax.ShapeDtypeStruct((width, slots), rows.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=('parallel',)),
    )(rows).T


def _turn_back(rows, columns):
    """One program: rows as columns [V, rows]."""
    width = columns.shape[0]
    for start in range(0, width, LANES):
        of_piece = rows[:, start // LANES].astype(jnp.float32).T
        columns[start:start + LANES] = of_piece[:width - start].astype(columns.dtype)


def precision_of(dtype: DTypeLike) -> jax.lax.Precision:
    """Of matrix products in kernels, whatever jax's default is: the compiler has one for bfloat16
    alone, and refuses others."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT


def whole_pieces(array: Float[Array, '... n']) -> Float[Array, '... m']:
    """The array with zeros at the end of its last axis, up to a multiple of LANES."""
    return jnp.pad(array, (*((0, 0),) * (array.ndim - 1), (0, -array.shape[-1] % LANES)))


def padded_tokens(array: Shaped[Array, 'T ...'], tile: int, fill: int = 0) -> Array:
    """The array with a multiple of `tile` tokens."""
    padding = ((0, -len(array) % tile), *((0, 0) for _ in array.shape[1:]))
    return jnp.pad(array, padding, constant_values=fill)


def sum_lanes(
    products: Float[Array, 'reads pieces'], size: Int32[Array, ''] | int, lanes: int,
) -> Float[Array, 'rows {lanes}']:
    """The sum of each of the first `size` rows, zeros of the others, `lanes` of them to a row."""
    blocks = products.reshape(-1, lanes, products.shape[1])
    sums = jnp.concatenate([jnp.sum(block.T, axis=0, keepdims=True) for block in blocks])
    at = (jax.lax.broadcasted_iota(jnp.int32, sums.shape, 0) * lanes
          + jax.lax.broadcasted_iota(jnp.int32, sums.shape, 1))
    return jnp.where(at < size, sums, 0)

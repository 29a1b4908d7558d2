"""How the kernels for TPUs see arrays: a table's rows as pieces of 128, tokens in whole tiles."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.layout import Layout, with_layout_constraint
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32, Shaped

from pkm_jax.accelerators import LANES, SUBLANES

TURNED = 4_096      # pieces that a program takes at most, of 512 rows at most; of a tile at least
Interpret = bool | pltpu.InterpretParams    # the latter: copies at other times than they start


def as_rows(
    table: Float[Array, 'S V'], interpret: Interpret,
) -> Float[Array, 'S pieces 128']:
    """The table with rows that a copy can fetch alone, V filled up with zeros to pieces of 128.

    A copy of the whole table in another layout. One whose V is no multiple of 128 is kept by XLA
    column after column, which wastes no room: a kernel turns it and fills it up at once. Where rows
    are no whole tiles, XLA would copy the table twice, by way of columns: a kernel does so once. If
    the table is rounded before, that is part of either kernel.
    """
    slots, width = table.shape
    shape = slots, -(-width // LANES), LANES
    if _in_whole_tiles(width):
        return table.reshape(shape)
    if width % LANES == 0:
        return _relaid(_split, 'as_rows', table, 0, shape, 0, interpret)
    return _relaid(_turn, 'as_rows', table.T, 1, shape, 0, interpret)


def _in_whole_tiles(width):
    """Whether rows in pieces fill tiles, or are one line each."""
    return width == LANES or width % (SUBLANES * LANES) == 0


def _relaid(body, name, array, axis, shape, out_axis, interpret):
    """A result of this shape by `body(block, out)`, blocks being some rows, which are along `axis`
    of the array and along `out_axis` of the result; of one of these rows are in pieces."""
    pieces = (array.shape if array.ndim == 3 else shape)[1]
    # Rows that a program takes: whole tiles of them.
    tile = LANES if axis or out_axis else 2 * SUBLANES
    number = max(min(TURNED // pieces, 512) // tile, 1) * tile

    def block(shape, axis):
        return pl.BlockSpec(tuple(number if at == axis else size for at, size in enumerate(shape)),
                            lambda n: tuple(n if at == axis else 0 for at in range(len(shape))))

    return pl.pallas_call(
        body, grid=(pl.cdiv(array.shape[axis], number),), name=name, interpret=interpret,
        in_specs=[block(array.shape, axis)], out_specs=block(shape, out_axis),
        out_shape=jax.ShapeDtypeStruct(shape, array.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=('parallel',),
                                             allow_input_fusion=[True]))(array)


def _split(table, rows):
    """One program: rows [rows, V] as pieces."""
    for piece in range(rows.shape[1]):
        rows[:, piece] = table[:, piece * LANES:(piece + 1) * LANES]


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
    slots = len(rows)
    if _in_whole_tiles(width):
        return with_layout_constraint(rows.reshape(slots, width), Layout((0, 1)))
    if width % LANES == 0:
        return _relaid(_join, 'as_table', rows, 0, (slots, width), 0, interpret)
    return _relaid(_turn_back, 'as_table', rows, 0, (width, slots), 1, interpret).T


def _join(rows, table):
    """One program: pieces as rows [rows, V]."""
    for piece in range(rows.shape[1]):
        table[:, piece * LANES:(piece + 1) * LANES] = rows[:, piece]


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

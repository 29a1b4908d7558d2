"""The update of a table's rows on an NVIDIA GPU (Pallas, Triton backend), each touched once.

A program takes some tiles of the same places, side by side: a tile is some rows, and a power of two
of their columns. Of the rows in use it reads gradient, table and moments, and writes table and
moments where they were; of others it reads the id alone. Each number is one thread's, so that
nothing is read that was written. Moments of one number a row are gathered and scattered by XLA:
each would be of several programs. Sums of squares have one fixed order.

Bytes: the gradient is read, table and moments are read and written, of the rows in use alone: for
lazy Adam 22 a number of a bfloat16 table and gradient (`sharded.rows_dtype`), and 4 for each
program, the sum of its squares. Operations: those of the rule and, in bfloat16, some 20 for the
random bits of each number. Floor: the bytes over the memory bandwidth.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import ShapeDtypeStruct
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int32, UInt32

from pkm_jax.ops import gpu
from pkm_jax.ops.gpu import call
from pkm_jax.ops.gpu import triton as plt
from pkm_jax.optimizers.rounding import noise, rounded
from pkm_jax.optimizers.rules import Numbers, Rule, moments_of_rows

# Of the widest array a warp takes so many bytes of a tile, of one row or of several short ones: 16
# for a thread. So all arrays lie in registers alike, and no sector is asked for twice.
BYTES = 512
# Tiles of a program at most, and its warps, where all rows of the table have a place and otherwise:
# by what was tried on an H200 at 768 columns of bfloat16 (docs/results.md).
TILES, WARPS_IN_PLACE, WARPS = 3, 1, 4


def unsupported(
    ids: ShapeDtypeStruct, start: ShapeDtypeStruct, numbers: ShapeDtypeStruct,
    seed: ShapeDtypeStruct, gradient: ShapeDtypeStruct, squares: ShapeDtypeStruct,
    table: ShapeDtypeStruct, *_: ShapeDtypeStruct, rule: Any,
) -> str | None:
    """Why the kernel cannot update this table; None if it can."""
    if gpu.triton is None:
        return f'jax {jax.__version__}, which has no Triton backend'
    if not ids.size:
        return 'no rows at all'
    if table.dtype not in (jnp.float32, jnp.bfloat16):
        return f'a table of {table.dtype} (float32 or bfloat16)'
    return None


def update(
    ids: Int32[Array, 'rows'], start: Int32[Array, '2'], numbers: Float[Array, '3'],
    seed: UInt32[Array, '2'], gradient: Float[Array, 'rows V'], squares: Float[Array, 'rows'],
    table: Float[Array, 'S V'], *moments: Float[Array, 'S ...'], rule: Rule, interpret: bool,
) -> tuple[Array, ...]:
    """The norm of the change, the table changed, and its moments: see `rules.reference`."""
    by_row, moments = moments_of_rows(ids, gradient, squares, moments, rule)
    changing = [table, *(moment for moment in moments if moment.ndim == 2)]
    places, width = gradient.shape
    widest = max(array.dtype.itemsize for array in (gradient, *changing))
    tile, tiles, warps = tiles_of(places, width, len(table), widest)
    grid = pl.cdiv(width, tiles * tile[1]), pl.cdiv(places, tile[0])    # columns, then rows
    given = ids, start, numbers, seed, gradient, *by_row
    *changed, norms = call(
        functools.partial(_update, rule=rule, tile=tile, tiles=tiles), 'update_rows', grid,
        [*changing, ShapeDtypeStruct(grid, jnp.float32)], *given, *changing,
        aliases={len(given) + at: at for at in range(len(changing))}, warps=warps,
        interpret=interpret)
    table, *wide = changed
    return (jnp.sqrt(jnp.sum(norms, keepdims=True)), table,
            *(moment if one else wide.pop(0) for moment, one in zip(moments, rule.per_row)))


def tiles_of(
    places: int, width: int, slots: int, itemsize: int,
) -> tuple[tuple[int, int], int, int]:
    """Rows and columns of a tile, tiles side by side that a program takes, and its warps."""
    warps = WARPS_IN_PLACE if places == slots else WARPS
    columns = min(pl.next_power_of_2(width), BYTES // itemsize)
    rows = warps * BYTES // itemsize // columns
    return (rows, columns), min(TILES, pl.cdiv(width, columns)), warps


def _update(ids, start, numbers, seed, gradient, *refs, rule, tile, tiles):
    """One program: see the module."""
    of_rows = sum(rule.per_row)
    by_row, changing, norms = refs[:of_rows], refs[of_rows:-1], refs[-1]
    old, new = changing[:len(changing) // 2], changing[len(changing) // 2:]
    (rows, columns), (slots, width) = tile, new[0].shape
    across, down = pl.program_id(0), pl.program_id(1)
    at = down * rows + jnp.arange(rows, dtype=jnp.int32)
    row = plt.load(ids.at[at], mask=at < ids.shape[0], other=slots)
    any_used = jnp.max((row < slots).astype(jnp.int32)) == 1

    def spots(ref, row, column):
        return ref.at[jnp.broadcast_to(row[:, None], tile), jnp.broadcast_to(column, tile)]

    @pl.when(any_used)
    def _():
        scalars = Numbers(*(numbers[n] for n in range(3)))
        random = seed[0], seed[1]
        of_row = [plt.load(ref.at[at], mask=row < slots, other=0)[:, None] for ref in by_row]
        loaded = []
        for n in range(tiles):      # all on their way before the first is worked out
            column = (across * tiles + n) * columns + jnp.arange(columns, dtype=jnp.int32)[None]
            used = jnp.broadcast_to((row < slots)[:, None] & (column < width), tile)
            read = functools.partial(plt.load, mask=used, other=0)
            loaded.append((column, used, read(spots(gradient, at, column)),
                           [read(spots(ref, row, column)) for ref in old]))
        squares = jnp.zeros(tile, jnp.float32)
        for column, used, gradient_here, (before, *wide) in loaded:
            change, moments = _change(scalars, gradient_here.astype(jnp.float32), wide, of_row,
                                      rule)
            changed = before.astype(jnp.float32) + change
            if new[0].dtype == jnp.bfloat16:
                changed = rounded(changed, noise(random, row[:, None] + start[0],
                                                 column + start[1]))
            for ref, after in zip(new, (changed, *moments)):
                plt.store(spots(ref, row, column), after.astype(ref.dtype), mask=used)
            squares += jnp.where(used, change, 0) ** 2
        norms[across, down] = jnp.sum(squares)

    @pl.when(~any_used)
    def _():
        norms[across, down] = jnp.float32(0)


def _change(numbers, gradient, wide, by_row, rule):
    """By how much a tile changes, and its new moments of a number each; by those of its rows."""
    gradient, unused = gradient * numbers.scale, jnp.zeros_like(gradient)
    old, by_row = iter(wide), iter(by_row)
    new = rule.moments(gradient, unused, *(
        unused if one else next(old) for one in rule.per_row))
    new = [next(by_row) if one else moment for moment, one in zip(new, rule.per_row)]
    return (-numbers.rate * rule.step(gradient, *new, numbers.correction),
            [moment for moment, one in zip(new, rule.per_row) if not one])

"""The update of the few rows that a step touched, on a TPU (Pallas, Mosaic, TensorCore).

A program takes a tile of places. Of each place in use the row of the table and those of its
moments come from HBM by a copy each, all of a tile at once, change, and go back where they were. Of
a bfloat16 table the copies take pairs of rows, as HBM holds them, in words of 32 bits; where both
rows of a pair are in the tile, the words of both become the same. The next tile starts when all of
this one is written, since it may begin with the other row of a pair. Moments of one number a row
are too short to be copied: XLA gathers and scatters them.

Bytes: the gradient is read, rows of the table (pairs of them in bfloat16) and of moments are read
and written. Copies: two for each of these rows. Operations: those of the rule and, in bfloat16,
some 30 for each number. Floor: the bytes over the memory bandwidth; but no rate is published at
which copies start.
"""

import functools

import jax
import jax.numpy as jnp
from jax import ShapeDtypeStruct
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, BFloat16, Float, Int32, UInt32

from pkm_jax.accelerators import LANES, SUBLANES
from pkm_jax.memory.kernels.tpu.rows import Interpret, padded_tokens
from pkm_jax.optimizers.rounding import noise, rounded
from pkm_jax.optimizers.rules import Numbers, Rule, moments_of_rows

BLOCK = 65_536      # numbers of a tile at most, but where SUBLANES rows have more
ODD, PAIRED = 1, 2  # flags of a row: the second one of its pair; the other one is in the tile too


def unsupported(table: ShapeDtypeStruct) -> str | None:
    """Why the kernel cannot update rows of this table; None if it can."""
    slots, width = table.shape
    if width % LANES:
        return f'{width} columns of a table of which few rows change (a multiple of {LANES})'
    if table.dtype == jnp.bfloat16 and slots % 2:
        return f'an odd number of rows in bfloat16, of which few change ({slots})'
    return None


def update(
    ids: Int32[Array, 'rows'], start: Int32[Array, '2'], numbers: Float[Array, '3'],
    seed: UInt32[Array, '2'], gradient: Float[Array, 'rows V'], squares: Float[Array, 'rows'],
    table: Float[Array, 'S V'], *moments: Float[Array, 'S ...'], rule: Rule, interpret: Interpret,
) -> tuple[Array, ...]:
    """The norm of the change, the table changed, and its moments: see `rules.reference`."""
    by_row, moments = moments_of_rows(ids, gradient, squares, moments, rule)
    # Interpreted, a copy cannot write words into a table of another type.
    as_words = bool(interpret) and table.dtype == jnp.bfloat16
    changing = (words_of(table) if as_words else table,
                *(moment for moment in moments if moment.ndim == 2))
    width, tile = gradient.shape[1], tile_of(*gradient.shape)
    used = jnp.sum(ids < len(table), dtype=jnp.int32)[None]
    integers = jnp.concatenate([jax.lax.bitcast_convert_type(seed, jnp.int32), start, used])
    scalars = [padded_tokens(array, tile).reshape(-1, 1, tile) for array in (ids, *by_row)]
    in_scalars, any_memory = (pl.BlockSpec(memory_space=space) for space in (pltpu.SMEM, pl.ANY))
    norm = ShapeDtypeStruct((1, LANES), jnp.float32)
    changed = pl.pallas_call(
        functools.partial(_update, rule=rule), name='update_few_rows', interpret=interpret,
        grid=(len(scalars[0]),),
        in_specs=[in_scalars, in_scalars,
                  *(pl.BlockSpec((1, 1, tile), lambda n: (n, 0, 0), memory_space=pltpu.SMEM)
                    for _ in scalars),
                  pl.BlockSpec((tile, width), lambda n: (n, 0)), *(any_memory for _ in changing)],
        out_specs=[*(any_memory for _ in changing), pl.BlockSpec(norm.shape, lambda n: (0, 0))],
        out_shape=[*(ShapeDtypeStruct(array.shape, array.dtype) for array in changing), norm],
        input_output_aliases={3 + len(scalars) + at: at for at in range(len(changing))},
        scratch_shapes=[
            *(pltpu.VMEM((tile, width), _type_of_copies(array)) for array in changing),
            pltpu.VMEM((2, tile, LANES), jnp.int32),
            *(pltpu.VMEM((tile, LANES), jnp.float32) for _ in by_row),
            pltpu.SemaphoreType.DMA((len(changing),))],
        compiler_params=pltpu.CompilerParams(dimension_semantics=('arbitrary',)),
        cost_estimate=_cost(gradient, changing),
    )(numbers, integers, *scalars, gradient, *changing)
    table, *found, squares = changed
    return (jnp.sqrt(jnp.sum(squares, keepdims=True)), rows_of_words(table) if as_words else table,
            *(found.pop(0) if moment.ndim == 2 else moment for moment in moments))


def tile_of(places: int, width: int) -> int:
    """Places of a tile."""
    most = max(BLOCK // width // SUBLANES, 1)
    return min(SUBLANES * most, places)


def _type_of_copies(array):
    return jnp.float32 if array.dtype == jnp.float32 else jnp.int32


def words_of(table: BFloat16[Array, 'S V']) -> Int32[Array, 'pairs V']:
    """Pairs of rows as HBM holds them: the first one is the lower half of a word."""
    pairs = table.reshape(-1, 2, table.shape[1]).swapaxes(1, 2)
    return jax.lax.bitcast_convert_type(pairs, jnp.int32)


def rows_of_words(words: Int32[Array, 'pairs V']) -> BFloat16[Array, 'S V']:
    """The table that these are the `words_of`."""
    pairs = jax.lax.bitcast_convert_type(words, jnp.bfloat16)
    return pairs.swapaxes(1, 2).reshape(-1, words.shape[1])


def _cost(gradient, changing):
    return pl.CostEstimate(
        flops=10 * gradient.size, transcendentals=gradient.size,
        bytes_accessed=4 * gradient.size * (1 + 2 * len(changing)))


def _update(numbers, integers, ids, *refs, rule):
    """One program: see the module."""
    per_row, wide = sum(rule.per_row), 1 + len(rule.per_row) - sum(rule.per_row)
    by_row, (gradient, *rest) = refs[:per_row], refs[per_row:]
    changing, (norm, *rest) = rest[wide:2 * wide], rest[2 * wide:]      # as they are put out
    rows, (known, *of_rows, arrived) = rest[:wide], rest[wide:]
    first = pl.program_id(0) * ids.shape[2]
    size = jnp.clip(integers[4] - first, 0, ids.shape[2])

    def copy(at, place, out):
        """That of a row to its place in the tile, or back."""
        slot, array = ids[0, 0, place], changing[at]
        if array.dtype == jnp.bfloat16:
            array = array.bitcast(jnp.int32)
        row = slot if array.dtype == jnp.float32 else slot >> 1
        ends = rows[at].at[pl.ds(place, 1)], array.at[pl.ds(row, 1)]
        return pltpu.make_async_copy(*(ends if out else ends[::-1]), arrived.at[at])

    def each(action, out):
        def act(place, _):
            for at in range(wide):
                getattr(copy(at, place, out), action)()
        jax.lax.fori_loop(0, size, act, None)

    def describe(place, _):
        """What the tile needs of a row, in every lane."""
        for at, number in enumerate((ids[0, 0, place], _flags(ids, place, size))):
            known[at, pl.ds(place, 1)] = jnp.full((1, LANES), number)
        for column, number in zip(of_rows, by_row):
            column[pl.ds(place, 1)] = jnp.full((1, LANES), number[0, 0, place])

    @pl.when(first == 0)
    def _():
        norm[...] = jnp.zeros_like(norm)

    @pl.when(size > 0)
    def _():
        each('start', out=False)
        jax.lax.fori_loop(0, size, describe, None)
        each('wait', out=False)
        change = _change(numbers, integers, gradient[...], rows, known, of_rows, rule)
        in_use = jax.lax.broadcasted_iota(jnp.int32, change.shape, 0) < size
        squares = jnp.where(in_use, change ** 2, 0)
        norm[...] += sum(jnp.sum(squares[:, at:at + LANES], axis=0, keepdims=True)
                         for at in range(0, change.shape[1], LANES))
        each('start', out=True)
        each('wait', out=True)


def _flags(ids, place, size):
    """Of the row at a place of a tile."""
    slot, last = ids[0, 0, place], ids.shape[2] - 1
    before, after = ids[0, 0, jnp.maximum(place - 1, 0)], ids[0, 0, jnp.minimum(place + 1, last)]
    paired = jnp.where(slot & 1 == 1, (place > 0) & (before == slot - 1),
                       (place + 1 < size) & (after == slot + 1))
    return (slot & 1) * ODD + jnp.where(paired, PAIRED, 0)


def _change(numbers, integers, gradient, rows, known, of_rows, rule):
    """Changes the rows of a tile; by how much those of the table."""
    rate, correction, scale = Numbers(*(numbers[at] for at in range(3)))
    by_row, by_number = (column[:, :1] for column in of_rows), iter(rows[1:])
    places = [None if one else next(by_number) for one in rule.per_row]
    old = [next(by_row) if place is None else place[...] for place in places]
    gradient = gradient * scale
    new = rule.moments(gradient, jnp.zeros((len(gradient), 1)), *old)
    new = [before if place is None else after for before, after, place in zip(old, new, places)]
    for place, moment in zip(places, new):
        if place is not None:
            place[...] = moment
    change = -rate * rule.step(gradient, *new, correction)
    if rows[0].dtype == jnp.float32:
        rows[0][...] += change
    else:
        rows[0][...] = _changed_words(rows[0][...], change, known[0][:, :1], known[1][:, :1],
                                      integers)
    return change


def _changed_words(words, change, slot, flags, integers):
    """Pairs of bfloat16 rows with one of them, or both, changed."""
    odd, paired = flags & ODD != 0, flags & PAIRED != 0
    high = jnp.int32(-0x10000)
    before = jax.lax.bitcast_convert_type(jnp.where(odd, words & high, words << 16), jnp.float32)
    column = jax.lax.broadcasted_iota(jnp.int32, (1, words.shape[1]), 1) + integers[3]
    bits = noise([integers[at].astype(jnp.uint32) for at in range(2)], slot + integers[2], column)
    after = jax.lax.bitcast_convert_type(rounded(before + change, bits), jnp.int32) & high
    below = jnp.concatenate([after[1:], after[:1]])
    above = jnp.concatenate([after[-1:], after[:-1]])
    lower = jnp.where(odd, jnp.where(paired, above, words << 16), after)
    upper = jnp.where(odd, after, jnp.where(paired, below, words & high))
    return jax.lax.shift_right_logical(lower, 16) | upper

"""Weighted sum of value rows on a TPU (Pallas, Mosaic, TensorCore).

A program sums a tile of tokens. Their slots, weights and numbers of reads lie in scalar memory; the
rows of the table come from HBM one by one into a ring of IN_FLIGHT places, each on its way while as
many before it are added up. A token's own reads come first and are the only ones made.

Bytes: a row of the table for each read that is made, slots and weights of all, the sums once. A row
is a copy of its own, so the scalar unit has as many to start. Operations: for each read and 1,024
numbers of a row two vector instructions in float32, and those that widen bfloat16. Floor: the rows
over the memory bandwidth.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int32

from pkm_jax.accelerators import LANES
from pkm_jax.memory.kernels.tpu.rows import Interpret, as_rows, padded_tokens, sum_lanes

IN_FLIGHT = 64      # rows, a power of two: a latency of 1 µs at one copy started in 16 ns
READS = 8_192       # of a program: what scalar memory holds twice
FEWEST = 8          # tokens of a program


def tokens_of_program(reads: int) -> int:
    """Tokens of a tile, for so many reads each: a multiple of 8."""
    return max(READS // reads // FEWEST, 1) * FEWEST


def sum_rows(
    values: Float[Array, 'S V'], slots: Int32[Array, 'T R'], weights: Float[Array, 'T R'],
    counts: Int32[Array, 'T'], *, owners: int = 1, interpret: Interpret,
) -> Float[Array, 'T V']:
    """The sum over the first `counts[t]` reads of each token, 1 to R, in the dtype of `values`."""
    tokens, table = len(slots), as_rows(values, interpret)
    scalars, tile = _tiled(slots, counts, weights.astype(jnp.float32))
    tiles, row = len(scalars[0]), table.shape[1:]
    sums = pl.pallas_call(
        functools.partial(_sum_tile, reads=slots.shape[1]), grid=(tiles,), name='read_rows',
        interpret=interpret,
        in_specs=[*map(_in_scalar_memory, scalars), pl.BlockSpec(memory_space=pl.ANY)],
        out_specs=pl.BlockSpec((tile, *row), lambda n: (n, 0, 0)),
        out_shape=jax.ShapeDtypeStruct((tiles * tile, *row), values.dtype),
        scratch_shapes=_ring(table),
        compiler_params=pltpu.CompilerParams(dimension_semantics=('parallel',)),
        cost_estimate=_cost(slots, owners, scalars, table),
    )(*scalars, table)
    return sums.reshape(tiles * tile, -1)[:tokens, :values.shape[1]]


def weight_gradients(
    values: Float[Array, 'S V'], slots: Int32[Array, 'T R'], counts: Int32[Array, 'T'],
    gradient: Float[Array, 'T V'], *, owners: int = 1, interpret: Interpret,
) -> Float[Array, 'T R']:
    """values[slot] · gradient of each token's first `counts[t]` reads, float32; 0 of the others."""
    (tokens, reads), table = slots.shape, as_rows(values, interpret)
    scalars, tile = _tiled(slots, counts)
    gradient = as_rows(padded_tokens(gradient, tile), interpret)
    tiles, row = len(scalars[0]), table.shape[1:]
    places = -(-tile * reads // LANES) * LANES
    products = pl.pallas_call(
        functools.partial(_multiply_tile, reads=reads), grid=(tiles,), name='weight_gradients',
        interpret=interpret,
        in_specs=[*map(_in_scalar_memory, scalars), pl.BlockSpec((tile, *row), lambda n: (n, 0, 0)),
                  pl.BlockSpec(memory_space=pl.ANY)],
        out_specs=pl.BlockSpec((1, places // LANES, LANES), lambda n: (n, 0, 0)),
        out_shape=jax.ShapeDtypeStruct((tiles, places // LANES, LANES), jnp.float32),
        scratch_shapes=[*_ring(table), pltpu.VMEM((places, row[1]), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=('parallel',)),
        cost_estimate=_cost(slots, owners, scalars, table),
    )(*scalars, gradient, table)
    return products.reshape(tiles, places)[:, :tile * reads].reshape(-1, reads)[:tokens]


def _tiled(slots, counts, *more):
    """Slots, counts and what else scalar memory holds, a tile of tokens in each row; its tokens."""
    tile = tokens_of_program(slots.shape[1])
    return [padded_tokens(array, tile, fill).reshape(-(-len(slots) // tile), 1, -1)
            for array, fill in ((slots, 0), (counts, 1), *((one, 0) for one in more))], tile


def _in_scalar_memory(array):
    return pl.BlockSpec((1, *array.shape[1:]), lambda n: (n, 0, 0), memory_space=pltpu.SMEM)


def _ring(table):
    """Places for rows on their way, and the semaphores that say when they are there."""
    return [pltpu.VMEM((IN_FLIGHT, *table.shape[1:]), table.dtype),
            pltpu.SemaphoreType.DMA((IN_FLIGHT,))]


def _cost(slots, owners, scalars, table):
    """Of a table of which each of several owners has about as many reads."""
    row = math.prod(table.shape[1:])
    return pl.CostEstimate(
        flops=2 * slots.size // owners * row, transcendentals=0,
        bytes_accessed=(slots.size // owners + len(slots)) * row * table.dtype.itemsize
        + sum(array.size * 4 for array in scalars))


def _sum_tile(slots, counts, weights, table, sums, rows, arrived, *, reads):
    """One program: see the module."""
    def begin(_):
        return jnp.zeros(sums.shape[1:], jnp.float32)

    def add(at, total, row):
        return total + weights[0, 0, at] * row

    def end(token, total):
        sums[token] = total.astype(sums.dtype)

    _for_each_read(slots, counts, table, rows, arrived, sums.shape[0], reads, begin, add, end)


def _multiply_tile(slots, counts, gradient, table, sums, rows, arrived, products, *, reads):
    """One program: the sums of the products of every row with its token's gradient."""
    def begin(token):
        return gradient[token].astype(jnp.float32)

    def multiply(at, by_token, row):
        products[pl.ds(at, 1)] = jnp.sum(by_token * row, axis=0, keepdims=True)
        return by_token

    products[...] = jnp.zeros_like(products)
    _for_each_read(slots, counts, table, rows, arrived, gradient.shape[0], reads, begin, multiply,
                   lambda token, _: None)
    sums[0] = sum_lanes(products[...], products.shape[0], LANES)


def _for_each_read(slots, counts, table, rows, arrived, tokens, reads, begin, add, end):
    """`end(token, state)` for every token, of a state that `begin(token)` gives and that becomes
    `add(place, state, float32 row)` with each of its reads; rows come IN_FLIGHT ahead."""
    def copy(slot, place):
        return pltpu.make_async_copy(table.at[slot], rows.at[place], arrived.at[place])

    def start_next(ahead, place):
        """Starts the copy of the read `ahead`, (token, read), if there is one; the one after it."""
        token, read = ahead

        @pl.when(token < tokens)
        def _():
            copy(slots[0, 0, token * reads + read], place).start()

        last = read + 1 == counts[0, 0, jnp.minimum(token, tokens - 1)]
        return token + last.astype(jnp.int32), jnp.where(last, 0, read + 1)

    def add_read(token, read, carry):
        state, place, ahead = carry
        copy(0, place).wait()
        state = add(token * reads + read, state, rows[place].astype(jnp.float32))
        return state, (place + 1) & IN_FLIGHT - 1, start_next(ahead, place)

    def on_token(token, carry):
        state, *carry = jax.lax.fori_loop(
            0, counts[0, 0, token], lambda read, carry: add_read(token, read, carry),
            (begin(token), *carry))
        end(token, state)
        return tuple(carry)

    nothing = jnp.int32(0)
    ahead = jax.lax.fori_loop(0, IN_FLIGHT, lambda place, ahead: start_next(ahead, place),
                              (nothing, nothing))
    jax.lax.fori_loop(0, tokens, on_token, (nothing, ahead))

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

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int32

from pkm_jax.memory.kernels.tpu.rows import Interpret, as_rows, padded_tokens

IN_FLIGHT = 64      # rows, a power of two: a latency of 1 µs at one copy started in 16 ns
READS = 8_192       # of a program: what scalar memory holds twice
FEWEST = 8          # tokens of a program


def tokens_of_program(reads: int) -> int:
    """Tokens of a tile, for so many reads each: a multiple of 8."""
    return max(READS // reads // FEWEST, 1) * FEWEST


def sum_rows(
    values: Float[Array, 'S V'], slots: Int32[Array, 'T R'], weights: Float[Array, 'T R'],
    counts: Int32[Array, 'T'], *, interpret: Interpret,
) -> Float[Array, 'T V']:
    """The sum over the first `counts[t]` reads of each token, 1 to R, in the dtype of `values`."""
    tokens, reads = slots.shape
    tile = tokens_of_program(reads)
    table = as_rows(values)
    pieces, lanes = table.shape[1:]
    scalars = [padded_tokens(array, tile, fill).reshape(-(-tokens // tile), 1, -1)
               for array, fill in ((slots, 0), (weights.astype(jnp.float32), 0), (counts, 1))]
    tiles = len(scalars[0])
    sums = pl.pallas_call(
        functools.partial(_sum_tile, reads=reads), grid=(tiles,), name='read_rows',
        interpret=interpret,
        in_specs=[*(pl.BlockSpec((1, *array.shape[1:]), lambda n: (n, 0, 0),
                                 memory_space=pltpu.SMEM) for array in scalars),
                  pl.BlockSpec(memory_space=pl.ANY)],
        out_specs=pl.BlockSpec((tile, pieces, lanes), lambda n: (n, 0, 0)),
        out_shape=jax.ShapeDtypeStruct((tiles * tile, pieces, lanes), values.dtype),
        scratch_shapes=[pltpu.VMEM((IN_FLIGHT, pieces, lanes), values.dtype),
                        pltpu.SemaphoreType.DMA((IN_FLIGHT,))],
        compiler_params=pltpu.CompilerParams(dimension_semantics=('parallel',)),
    )(*scalars, table)
    return sums.reshape(tiles * tile, -1)[:tokens, :values.shape[1]]


def _sum_tile(slots, weights, counts, table, sums, rows, arrived, *, reads):
    """One program: see the module."""
    tokens = sums.shape[0]

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
        total, place, ahead = carry
        copy(0, place).wait()
        total += weights[0, 0, token * reads + read] * rows[place].astype(jnp.float32)
        return total, (place + 1) & IN_FLIGHT - 1, start_next(ahead, place)

    def sum_token(token, carry):
        total, *carry = jax.lax.fori_loop(
            0, counts[0, 0, token], lambda read, carry: add_read(token, read, carry),
            (jnp.zeros(sums.shape[1:], jnp.float32), *carry))
        sums[token] = total.astype(sums.dtype)
        return tuple(carry)

    nothing = jnp.int32(0)
    ahead = jax.lax.fori_loop(0, IN_FLIGHT, lambda place, ahead: start_next(ahead, place),
                              (nothing, nothing))
    jax.lax.fori_loop(0, tokens, sum_token, (nothing, ahead))

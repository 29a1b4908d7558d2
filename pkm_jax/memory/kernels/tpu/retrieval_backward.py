"""Gradients of the exact top-K retrieval on a TPU (Pallas, Mosaic, TensorCore).

A program has a tile of tokens, one head and one half. It makes the gradient of their scores
[N, tokens] on the chip, of each sub-key the sum over the chosen slots that it is part of, in
float32, rounded once to the dtype of the query; the matrix unit makes of that the queries' gradient
and adds to the codebooks', which stays on the chip in float32 from one tile to the next.

Bytes: queries and their gradient once, codebooks and their gradient once, slots and gradients
twice. Operations: for each token, head and half 4·N·half on the matrix unit, and three vector
instructions for K · N / 8 registers of 128 tokens. Floor: the vector instructions.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int32

from pkm_jax.memory.kernels.tpu.rows import (
    LANES,
    Interpret,
    padded_tokens,
    precision_of,
    whole_pieces,
)

TILE = LANES        # tokens of a program
KEYS = 64           # whose gradients are summed at a time, in registers


def query_and_codebook_gradients(
    query: Float[Array, 'T H 2 half'], codebooks: Float[Array, 'H 2 N half'],
    slots: Int32[Array, 'T H k'], gradient: Float[Array, 'T H k'], *, interpret: Interpret,
) -> tuple[Float[Array, 'T H 2 half'], Float[Array, 'H 2 N half']]:
    """Gradients of query and codebooks from those of the scores of the chosen slots."""
    tokens, heads, _, width = query.shape
    n_keys, k = codebooks.shape[2], slots.shape[2]
    query, codebooks = whole_pieces(query), whole_pieces(codebooks)
    half = query.shape[-1]
    query = padded_tokens(query.reshape(tokens, -1), TILE)
    chosen = jnp.stack([slots // n_keys, slots % n_keys])       # two, T, H, k
    keys = jnp.pad(jnp.moveaxis(chosen, 1, 3), ((0, 0),) * 3 + ((0, len(query) - tokens),))
    by_slot = jnp.moveaxis(padded_tokens(gradient.astype(jnp.float32), TILE), 0, 2)
    padding = (0, 0), (0, 0), (0, -n_keys % KEYS), (0, 0)
    codebooks = jnp.pad(codebooks, padding)

    half_of_query = pl.BlockSpec((TILE, half), lambda head, part, n: (n, head * 2 + part))
    codebook = pl.BlockSpec((1, 1, *codebooks.shape[2:]), lambda head, part, n: (head, part, 0, 0))
    by_query, by_codebook = pl.pallas_call(
        _add_tile, grid=(heads, 2, len(query) // TILE), name='retrieval_backward',
        interpret=interpret,
        in_specs=[half_of_query, codebook,
                  pl.BlockSpec((1, 1, k, TILE), lambda head, part, n: (part, head, 0, n)),
                  pl.BlockSpec((1, k, TILE), lambda head, part, n: (head, 0, n))],
        out_specs=[half_of_query, codebook],
        out_shape=[jax.ShapeDtypeStruct(query.shape, query.dtype),
                   jax.ShapeDtypeStruct(codebooks.shape, jnp.float32)],
        scratch_shapes=[pltpu.VMEM((codebooks.shape[2], TILE), query.dtype)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=('parallel', 'parallel', 'arbitrary')),
    )(query, codebooks, keys, by_slot)
    return (by_query[:tokens].reshape(tokens, heads, 2, half)[..., :width],
            by_codebook[:, :, :n_keys, :width].astype(codebooks.dtype))


def _add_tile(query, codebook, keys, by_slot, by_query, by_codebook, by_key):
    """One program: see the module."""
    precision = precision_of(query.dtype)

    def sum_keys(block, _):
        start = pl.multiple_of(block * KEYS, KEYS)
        key = jax.lax.broadcasted_iota(jnp.int32, (KEYS, TILE), 0) + start
        sums = jnp.zeros((KEYS, TILE), jnp.float32)
        for rank in range(keys.shape[2]):
            here = key == keys[0, 0, pl.ds(rank, 1)]
            sums += jnp.where(here, by_slot[0, pl.ds(rank, 1)], 0)
        by_key[pl.ds(start, KEYS)] = sums.astype(by_key.dtype)

    def product(a, b, along):
        return jax.lax.dot_general(a, b, (((along,), (0,)), ((), ())), precision=precision,
                                   preferred_element_type=jnp.float32)

    @pl.when(pl.program_id(2) == 0)
    def _():
        by_codebook[...] = jnp.zeros_like(by_codebook)

    jax.lax.fori_loop(0, len(by_key) // KEYS, sum_keys, None)
    by_query[...] = product(by_key[...], codebook[0, 0], 0).astype(by_query.dtype)
    by_codebook[0, 0] += product(by_key[...], query[...], 1)

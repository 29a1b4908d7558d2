"""Gradients of the exact top-K retrieval on an NVIDIA GPU (Pallas, Triton backend, and two GEMMs).

The scores' gradient with respect to the T·H·2·N sub-key scores has at most K entries a row. A
kernel sums the entries of one sub-key (one sub-key can appear in several pairs) in float32 and
writes them into rows of zeros, in the dtype of the query; two batched matrix products with
codebooks and queries follow. In bfloat16 this rounds each entry once, as the matrix unit would.

Bytes: the [H, 2, T, N] rows are written twice (zeros, entries) and read twice, 134 MB each in
bfloat16 at T = 16,384, H = 4, N = 512. Operations: 3·K² vector instructions a row, and
4·T·H·2·N·half on the matrix unit. Floor: three passes over the rows at the memory bandwidth,
0.1 ms. A tensor of float32 rows would double it.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int32

from pkm_jax.memory.kernels import call

TOKENS = 64     # of one program


def query_and_codebook_gradients(
    query: Float[Array, 'T H 2 half'], codebooks: Float[Array, 'H 2 N half'],
    slots: Int32[Array, 'T H k'], gradient: Float[Array, 'T H k'],
) -> tuple[Float[Array, 'T H 2 half'], Float[Array, 'H 2 N half']]:
    """Gradients of query and codebooks from those of the scores of the chosen slots."""
    by_key = _spread(slots, gradient, codebooks.shape[2], query.dtype)
    product = functools.partial(
        jnp.einsum, preferred_element_type=jnp.float32,
        precision=jax.lax.Precision.HIGHEST if query.dtype == jnp.float32 else None)
    return (product('hptn,hpnd->thpd', by_key, codebooks).astype(query.dtype),
            product('hptn,hptd->hpnd', by_key, jnp.moveaxis(query, 0, 2)).astype(codebooks.dtype))


def _spread(slots, gradient, n_keys, dtype):
    """Gradient of every sub-key score, [H, 2, T, N]: sums over the chosen slots of a sub-key."""
    tokens, heads, k = slots.shape
    tile, width = min(TOKENS, 1 << tokens.bit_length() - 1), pl.next_power_of_2(k)

    def kernel(slots, gradient, _zeros, by_key):
        # The last tile overlaps the one before: both write the same there.
        first = jnp.minimum(pl.program_id(0) * tile, tokens - tile)
        head, part = pl.program_id(1), pl.program_id(2)

        def sub_key(slot):
            return jnp.where(part == 0, slot // n_keys, slot % n_keys)

        at = pl.ds(first, tile)
        shape = (tile, width)
        token = jax.lax.broadcasted_iota(jnp.int32, shape, 0) + first
        rank = jnp.minimum(jax.lax.broadcasted_iota(jnp.int32, shape, 1), k - 1)
        keys = sub_key(slots[token, jnp.full(shape, head), rank])

        def add_rank(r, total):
            same = keys == sub_key(slots[at, head, r])[:, None]
            return total + jnp.where(same, gradient[at, head, r].astype(jnp.float32)[:, None], 0)

        total = jax.lax.fori_loop(0, k, add_rank, jnp.zeros(shape, jnp.float32))
        by_key[jnp.full(shape, head), jnp.full(shape, part), token, keys] = total.astype(dtype)

    zeros = jnp.zeros((heads, 2, tokens, n_keys), dtype)
    by_key, = call(kernel, 'spread_score_gradients', (pl.cdiv(tokens, tile), heads, 2), [zeros],
                   slots, gradient, zeros, aliases={2: 0}, warps=4)
    return by_key

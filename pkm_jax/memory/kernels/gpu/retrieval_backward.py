"""Gradients of the exact top-K retrieval on an NVIDIA GPU (Pallas, Triton backend, and two GEMMs).

The scores' gradient with respect to the T·H·2·N sub-key scores has at most K entries a row. A
kernel sums the entries of one sub-key (one sub-key can appear in several pairs) in float32 and
writes them over zeros that it wrote before, while these are in L2, in the dtype of the query; two
batched matrix products with codebooks and queries follow. In bfloat16 this rounds each entry once,
as the matrix unit would.

Bytes: the [H, 2, T, N] rows are written once and read twice, 134 MB each in bfloat16 at T = 16,384,
H = 4, N = 512. Operations: 3·K² vector instructions a row, and 4·T·H·2·N·half on the matrix unit.
Floor: three passes over the rows at the memory bandwidth, 0.1 ms. A tensor of float32 rows would
double it.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int32

from pkm_jax.ops.gpu import call, column_blocks
from pkm_jax.ops.gpu import triton as plt

TOKENS = 2      # of one program: one a warp


def query_and_codebook_gradients(
    query: Float[Array, 'T H 2 half'], codebooks: Float[Array, 'H 2 N half'],
    slots: Int32[Array, 'T H k'], gradient: Float[Array, 'T H k'], *, mosaic: bool = False,
    interpret: bool,
) -> tuple[Float[Array, 'T H 2 half'], Float[Array, 'H 2 N half']]:
    """Gradients of query and codebooks from those of the scores of the chosen slots; `mosaic` has
    Mosaic GPU spread them instead of Triton."""
    of_scores = slots, gradient, codebooks.shape[2], query.dtype
    if mosaic:
        from pkm_jax.memory.kernels.gpu import mosaic_retrieval
        by_key = mosaic_retrieval.spread(*of_scores, interpret=interpret)
    else:
        by_key = _spread(*of_scores, interpret)
    product = functools.partial(
        jnp.einsum, preferred_element_type=jnp.float32,
        precision=jax.lax.Precision.HIGHEST if query.dtype == jnp.float32 else None)
    return (product('hptn,hpnd->thpd', by_key, codebooks).astype(query.dtype),
            product('hptn,hptd->hpnd', by_key, jnp.moveaxis(query, 0, 2)).astype(codebooks.dtype))


def _spread(slots, gradient, n_keys, dtype, interpret):
    """Gradient of every sub-key score, [H, 2, T, N]: sums over the chosen slots of a sub-key."""
    tokens, heads, k = slots.shape
    width = pl.next_power_of_2(k)

    def kernel(slots, gradient, by_key):
        # The last tile overlaps the one before: both write zeros there, and the same over them.
        first = jnp.minimum(pl.program_id(0) * TOKENS, tokens - TOKENS)
        head, part = pl.program_id(1), pl.program_id(2)
        for block in column_blocks(n_keys):
            zeros = jnp.zeros((TOKENS, block.size), dtype)
            by_key[head, part, pl.ds(first, TOKENS), block] = zeros

        shape = (TOKENS, width)
        token = jax.lax.broadcasted_iota(jnp.int32, shape, 0) + first
        rank = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
        chosen = token, jnp.full(shape, head), jnp.minimum(rank, k - 1)
        slot = slots[chosen].astype(jnp.uint32)
        key = jnp.where(part == 0, slot // n_keys, slot % n_keys).astype(jnp.int32)
        by_rank = jnp.where(rank < k, gradient[chosen].astype(jnp.float32), 0)
        same = key[:, :, None] == key[:, None, :]
        total = jnp.sum(jnp.where(same, by_rank[:, :, None], 0), axis=1)
        if not interpret:           # then a program is one thread
            plt.debug_barrier()     # the zeros come from other threads than the sums
        by_key[jnp.full(shape, head), jnp.full(shape, part), token, key] = total.astype(dtype)

    by_key, = call(kernel, 'spread_score_gradients', (pl.cdiv(tokens, TOKENS), heads, 2),
                   [jax.ShapeDtypeStruct((heads, 2, tokens, n_keys), dtype)],
                   slots, gradient, warps=TOKENS, interpret=interpret)
    return by_key

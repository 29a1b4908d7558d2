"""Exact top-K over N² slots and its derivative on an NVIDIA GPU, in the place of the reference."""

import jax.numpy as jnp
from jax import ShapeDtypeStruct
from jaxtyping import Array, Float, Int32

from pkm_jax.memory.kernels.gpu.backend import search_lacks, searches_by_mosaic
from pkm_jax.memory.kernels.gpu.retrieval_backward import query_and_codebook_gradients
from pkm_jax.memory.kernels.gpu.retrieval_forward import best_slots

DTYPES = (jnp.float32, jnp.bfloat16)
TOP_K = 32          # what the registers of a thread hold twice
FEWEST = 16         # tokens, sub-keys and query width of the smallest matrix product


def unsupported(
    query: ShapeDtypeStruct, codebooks: ShapeDtypeStruct, *_: ShapeDtypeStruct, k: int,
) -> str | None:
    """Why the kernels cannot search these codebooks for these queries; None if they can."""
    tokens, _, _, half = query.shape
    n_keys = codebooks.shape[2]
    block = max(FEWEST, 1 << (k - 1).bit_length())
    if query.dtype not in DTYPES or codebooks.dtype != query.dtype:
        return f'{query.dtype} queries and {codebooks.dtype} codebooks (both float32 or bfloat16)'
    if k > TOP_K:
        return f'top_k = {k} (at most {TOP_K})'
    if tokens < FEWEST or half < FEWEST or half & (half - 1):
        return f'{tokens} tokens of {half} (at least 16; the width a power of two)'
    if n_keys % block:
        return f'{n_keys} sub-keys (a multiple of {block})'
    return search_lacks(query, codebooks)


def forward(
    query: Float[Array, 'T H 2 half'], codebooks: Float[Array, 'H 2 N half'], *, k: int,
    interpret: bool,
) -> tuple[Float[Array, 'T H {k}'], Int32[Array, 'T H {k}']]:
    """Scores and slots, see `best_slots`."""
    if searches_by_mosaic(query, codebooks, interpret=interpret):
        from pkm_jax.memory.kernels.gpu import mosaic_retrieval
        return mosaic_retrieval.best_slots(query, codebooks, k, interpret=interpret)
    return best_slots(query, codebooks, k, interpret=interpret)


def backward(
    query: Float[Array, 'T H 2 half'], codebooks: Float[Array, 'H 2 N half'],
    slots: Int32[Array, 'T H {k}'], gradient: Float[Array, 'T H {k}'], *, k: int, interpret: bool,
) -> tuple[Float[Array, 'T H 2 half'], Float[Array, 'H 2 N half']]:
    """Gradients of query and codebooks, see `query_and_codebook_gradients`."""
    return query_and_codebook_gradients(
        query, codebooks, slots, gradient, interpret=interpret,
        mosaic=searches_by_mosaic(query, codebooks, interpret=interpret))

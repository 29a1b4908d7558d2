"""Exact top-K over N² slots and its derivative on a TPU, in the place of the reference."""

import jax.numpy as jnp
from jax import ShapeDtypeStruct
from jaxtyping import Array, Float, Int32

from pkm_jax.memory.kernels.tpu.retrieval_backward import query_and_codebook_gradients
from pkm_jax.memory.kernels.tpu.retrieval_forward import best_slots
from pkm_jax.memory.kernels.tpu.rows import Interpret

DTYPES = (jnp.float32, jnp.bfloat16)
TOP_K = 32          # of the lists that the vector registers hold
MOST_KEYS = 4096    # of which scores and a codebook lie beside each other on the chip


def unsupported(
    query: ShapeDtypeStruct, codebooks: ShapeDtypeStruct, *_: ShapeDtypeStruct, k: int,
) -> str | None:
    """Why the kernels cannot search these codebooks for these queries; None if they can."""
    n_keys = codebooks.shape[2]
    if query.dtype not in DTYPES or codebooks.dtype != query.dtype:
        return f'{query.dtype} queries and {codebooks.dtype} codebooks (both float32 or bfloat16)'
    if k > TOP_K:
        return f'top_k = {k} (at most {TOP_K})'
    if n_keys > MOST_KEYS:
        return f'{n_keys} sub-keys (at most {MOST_KEYS})'
    return None


def forward(
    query: Float[Array, 'T H 2 half'], codebooks: Float[Array, 'H 2 N half'], *, k: int,
    interpret: Interpret,
) -> tuple[Float[Array, 'T H {k}'], Int32[Array, 'T H {k}']]:
    """Scores and slots, see `best_slots`."""
    return best_slots(query, codebooks, k, interpret=interpret)


def backward(
    query: Float[Array, 'T H 2 half'], codebooks: Float[Array, 'H 2 N half'],
    slots: Int32[Array, 'T H {k}'], gradient: Float[Array, 'T H {k}'], *, k: int,
    interpret: Interpret,
) -> tuple[Float[Array, 'T H 2 half'], Float[Array, 'H 2 N half']]:
    """Gradients of query and codebooks, see `query_and_codebook_gradients`."""
    return query_and_codebook_gradients(query, codebooks, slots, gradient, interpret=interpret)

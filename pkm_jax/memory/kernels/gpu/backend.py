"""Which backend of Pallas a memory's kernels for NVIDIA GPUs use.

Triton, unless Mosaic GPU is asked for; and Mosaic GPU where jax has no Triton backend any more.
"""

import functools
import logging

import jax
import jax.numpy as jnp
from jax import ShapeDtypeStruct
from jaxtyping import Array

from pkm_jax.memory.kernels.settings import is_on
from pkm_jax.ops import gpu

# Rows on their way to a program of the streaming pass, which has most of them; bytes of shared
# memory for them.
ROWS, SHARED = 32, 208 * 1024
TOKENS, BLOCK = 128, 64     # of a program of the search, one a thread; sub-keys of a matrix product
SETTING = 'PKM_JAX_MOSAIC_GPU'      # of the environment; '1': Mosaic GPU (Hopper and later)


def uses_mosaic(values: Array | ShapeDtypeStruct, slots: Array | ShapeDtypeStruct) -> bool:
    """Whether Mosaic GPU makes these reads instead of Triton. That SETTING asks for it, and it
    cannot, is logged once for each reason.

    Raises:
      Refusal: SETTING is neither '1' nor '0'.
    """
    return _chosen(_reads_lack(values, slots))


def searches_by_mosaic(
    query: Array | ShapeDtypeStruct, codebooks: Array | ShapeDtypeStruct,
) -> bool:
    """The same of a search [T, H, 2, half] in codebooks [H, 2, N, half], and of its gradients.

    Raises:
      Refusal: SETTING is neither '1' nor '0'.
    """
    return _chosen(_search_lacks(query, codebooks))


def no_reads(values: ShapeDtypeStruct, slots: ShapeDtypeStruct) -> str | None:
    """Why no backend that this jax has can make these reads; None if one can."""
    return _without_triton(_reads_lack(values, slots))


def no_search(query: ShapeDtypeStruct, codebooks: ShapeDtypeStruct) -> str | None:
    """The same of a search and of its gradients."""
    return _without_triton(_search_lacks(query, codebooks))


def _without_triton(reason):
    return reason and f'{reason} by jax {jax.__version__}' if gpu.triton is None else None


def _chosen(reason):
    if not is_on(SETTING, 'Mosaic GPU search and read', 'Triton'):
        return gpu.triton is None
    if jax.__version_info__ < (0, 11):
        reason = f'Mosaic GPU by jax {jax.__version__} (0.11 or later)'
    if reason:
        _say_once(reason)
    return reason is None


@functools.cache
def _say_once(reason):
    logging.getLogger(__name__).warning('%s=1 is not for %s: Triton has them.', SETTING, reason)


def _search_lacks(query, codebooks):
    """Why Mosaic GPU cannot search in these codebooks; None if it can."""
    dtype, n_keys = query.dtype, codebooks.shape[2]
    if dtype != jnp.bfloat16:
        return f'searches in {dtype} (bfloat16)'
    if n_keys % BLOCK:
        return f'searches of {n_keys} sub-keys (a multiple of {BLOCK})'
    return None


def _reads_lack(values, slots):
    """Why Mosaic GPU cannot make these reads; None if it can."""
    (tokens, reads), row_bytes = slots.shape, values.shape[1] * values.dtype.itemsize
    if tokens < 4:
        return f'{tokens} tokens (at least 4, one a warp)'
    if tokens % 4 and reads % 4:    # the last four tokens' slots would not begin at 16 bytes
        return f'{tokens} tokens of {reads} reads (one of them a multiple of 4)'
    if ROWS * row_bytes > SHARED:
        return f'rows of {row_bytes} bytes (at most {SHARED // ROWS})'
    return None

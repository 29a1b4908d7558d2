"""Which backend of Pallas a memory's kernels for NVIDIA GPUs use."""

import functools
import logging

import jax
import jax.numpy as jnp
from jax import ShapeDtypeStruct
from jaxtyping import Array

from pkm_jax.memory.kernels.settings import is_on

# Rows on their way to a program of the streaming pass, which has most of them; bytes of shared
# memory for them.
ROWS, SHARED = 32, 208 * 1024
TOKENS, BLOCK = 128, 64     # of a program of the search, one a thread; sub-keys of a matrix product
SETTING = 'PKM_JAX_MOSAIC_GPU'      # of the environment; '1': Mosaic GPU (Hopper and later)


def uses_mosaic(values: Array | ShapeDtypeStruct, slots: Array | ShapeDtypeStruct) -> bool:
    """Whether SETTING asks for Mosaic GPU instead of Triton, and it can make these reads; that it
    cannot is logged once for each reason.

    Raises:
      Refusal: SETTING is neither '1' nor '0'.
    """
    tokens, reads = slots.shape
    return _asked(_reads_lack(tokens, reads, values.shape[1] * values.dtype.itemsize))


def searches_by_mosaic(
    query: Array | ShapeDtypeStruct, codebooks: Array | ShapeDtypeStruct,
) -> bool:
    """The same of a search [T, H, 2, half] in codebooks [H, 2, N, half], and of its gradients.

    Raises:
      Refusal: SETTING is neither '1' nor '0'.
    """
    return _asked(_search_lacks(codebooks.shape[2], query.dtype))


def _asked(reason):
    if not is_on(SETTING, 'Mosaic GPU search and read', 'Triton'):
        return False
    if jax.__version_info__ < (0, 11):
        reason = f'Mosaic GPU by jax {jax.__version__} (0.11 or later)'
    if reason:
        _say_once(reason)
    return reason is None


@functools.cache
def _say_once(reason):
    logging.getLogger(__name__).warning('%s=1 is not for %s: Triton has them.', SETTING, reason)


def _search_lacks(n_keys, dtype):
    """Why Mosaic GPU cannot search for tokens in codebooks of so many sub-keys; None if it can."""
    if dtype != jnp.bfloat16:
        return f'searches in {dtype} (bfloat16)'
    if n_keys % BLOCK:
        return f'searches of {n_keys} sub-keys (a multiple of {BLOCK})'
    return None


def _reads_lack(tokens, reads, row_bytes):
    """Why Mosaic GPU cannot make so many reads of each of so many tokens, in rows of so many bytes;
    None if it can."""
    if tokens < 4:
        return f'{tokens} tokens (at least 4, one a warp)'
    if tokens % 4 and reads % 4:    # the last four tokens' slots would not begin at 16 bytes
        return f'{tokens} tokens of {reads} reads (one of them a multiple of 4)'
    if ROWS * row_bytes > SHARED:
        return f'rows of {row_bytes} bytes (at most {SHARED // ROWS})'
    return None

"""Which backend of Pallas the read's kernels for NVIDIA GPUs use."""

import functools
import logging

import jax
from jax import ShapeDtypeStruct
from jaxtyping import Array

from pkm_jax.memory.kernels.settings import is_on

# Rows on their way to a program of the streaming pass, which has most of them; bytes of shared
# memory for them.
ROWS, SHARED = 32, 208 * 1024
SETTING = 'PKM_JAX_MOSAIC_GPU'      # of the environment; '1': Mosaic GPU (Hopper and later)


def uses_mosaic(values: Array | ShapeDtypeStruct, slots: Array | ShapeDtypeStruct) -> bool:
    """Whether SETTING asks for Mosaic GPU instead of Triton, and it can make these reads; that it
    cannot is logged once for each reason.

    Raises:
      Refusal: SETTING is neither '1' nor '0'.
    """
    if not is_on(SETTING, 'Mosaic GPU make the reads', 'Triton'):
        return False
    tokens, reads = slots.shape
    reason = mosaic_lacks(tokens, reads, values.shape[1] * values.dtype.itemsize)
    if reason:
        _say_once(reason)
    return reason is None


@functools.cache
def _say_once(reason):
    logging.getLogger(__name__).warning('%s=1 is not for %s: Triton reads.', SETTING, reason)


def mosaic_lacks(tokens: int, reads: int, row_bytes: int) -> str | None:
    """Why Mosaic GPU cannot make so many reads of each of so many tokens, in rows of so many bytes;
    None if it can."""
    if jax.__version_info__ < (0, 11):
        return f'Mosaic GPU by jax {jax.__version__} (0.11 or later)'
    if tokens < 4:
        return f'{tokens} tokens (at least 4, one a warp)'
    if tokens % 4 and reads % 4:    # the last four tokens' slots would not begin at 16 bytes
        return f'{tokens} tokens of {reads} reads (one of them a multiple of 4)'
    if ROWS * row_bytes > SHARED:
        return f'rows of {row_bytes} bytes (at most {SHARED // ROWS})'
    return None

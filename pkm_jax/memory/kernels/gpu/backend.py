"""Which backend of Pallas the read's kernels for NVIDIA GPUs use."""

import os

import jax

from pkm_jax.refusal import Refusal

SETTING = 'PKM_JAX_MOSAIC_GPU'      # of the environment; '1': Mosaic GPU (Hopper and later)


def is_mosaic() -> bool:
    """Whether SETTING asks for Mosaic GPU instead of Triton.

    Raises:
      Refusal: SETTING is neither '1' nor '0'.
    """
    asked = os.environ.get(SETTING) or '0'
    if asked not in ('0', '1'):
        raise Refusal(f'{SETTING}={asked}: 1 has Mosaic GPU make the reads, 0 Triton.')
    return asked == '1'


def mosaic_lacks(tokens: int, reads: int) -> str | None:
    """Why Mosaic GPU cannot make so many reads of each of so many tokens; None if it can."""
    if jax.__version_info__ < (0, 11):
        return f'Mosaic GPU by jax {jax.__version__} (0.11 or later)'
    if tokens < 4:
        return f'{tokens} tokens (at least 4, one a warp)'
    if tokens % 4 and reads % 4:    # the last four tokens' slots would not begin at 16 bytes
        return f'{tokens} tokens of {reads} reads (one of them a multiple of 4)'
    return None

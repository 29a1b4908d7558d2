"""Which backend of Pallas the read's kernels for NVIDIA GPUs use."""

import os

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

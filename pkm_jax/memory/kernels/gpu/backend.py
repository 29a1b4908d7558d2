"""Which backend of Pallas a memory's kernels for NVIDIA GPUs use.

Triton, unless Mosaic GPU is asked for; and Mosaic GPU where jax has no Triton backend any more.
"""

import jax
import jax.extend
import jax.numpy as jnp
from jax import ShapeDtypeStruct
from jaxtyping import Array

from pkm_jax.console import warn_once
from pkm_jax.memory.kernels.settings import is_on
from pkm_jax.ops import gpu
from pkm_jax.refusal import Refusal

SHARED = 227 * 1024     # bytes of shared memory that a program of Mosaic GPU has at most
ROWS, ROWS_SHARED = 32, 208 * 1024      # on their way to one of the streaming pass; bytes for them
TOKENS, BLOCK = 128, 64     # of a program of the search, one a thread; sub-keys of a matrix product
ROW = TOKENS + 8    # of scores in shared memory: rows that a warp writes at once are in other banks
SETTING = 'PKM_JAX_MOSAIC_GPU'      # of the environment; '1': Mosaic GPU (run on Hopper alone)


def uses_mosaic(
    values: Array | ShapeDtypeStruct, slots: Array | ShapeDtypeStruct, *, interpret: bool,
) -> bool:
    """Whether Mosaic GPU makes these reads instead of Triton. That SETTING asks for it, and it
    cannot, is logged once for each reason.

    Raises:
      Refusal: SETTING is neither '1' nor '0'; or without Triton nothing can be interpreted.
    """
    return _chosen(interpret, _reads_lack, values, slots)


def searches_by_mosaic(
    query: Array | ShapeDtypeStruct, codebooks: Array | ShapeDtypeStruct, *, interpret: bool,
) -> bool:
    """The same of a search [T, H, 2, half] in codebooks [H, 2, N, half], and of its gradients.

    Raises:
      Refusal: as of reads.
    """
    return _chosen(interpret, _search_lacks, query, codebooks)


def reads_lack(values: ShapeDtypeStruct, slots: ShapeDtypeStruct) -> str | None:
    """Why no backend that this jax has can make these reads; None if one can."""
    return _without_triton(_reads_lack, values, slots)


def search_lacks(query: ShapeDtypeStruct, codebooks: ShapeDtypeStruct) -> str | None:
    """The same of a search and of its gradients."""
    return _without_triton(_search_lacks, query, codebooks)


def _without_triton(lacks, *arrays):
    reason = lacks(*arrays) if gpu.triton is None else None
    return reason and f'{reason} by jax {jax.__version__}'


def _chosen(interpret, lacks, *arrays):
    if gpu.triton is None:      # then what Mosaic GPU lacks is unsupported
        if interpret:           # its interpreter has effects, which a choice of kernels has not
            raise Refusal(
                f"implementation = 'gpu' where there is no GPU: jax {jax.__version__} has no "
                'Triton backend to interpret. Leave it None for plain jnp there.')
        warn_once(__name__, 'jax %s has no Triton backend: kernels are by Mosaic GPU.',
                  jax.__version__)
        return True
    if interpret or not is_on(SETTING, 'Mosaic GPU search and read', 'Triton'):
        return False
    reason = lacks(*arrays)
    if reason:
        warn_once(__name__, '%s=1 is not for %s: Triton has them.', SETTING, reason)
    return reason is None


def _capability():
    """Major compute capability of the GPUs that programs are lowered for; without one Hopper's."""
    device = jax.extend.backend.get_default_device()
    return int(getattr(device, 'compute_capability', '9.0').split('.')[0])


def _mosaic_lacks(newest):
    """Why there is no Mosaic GPU for these GPUs, the newest of which have that capability."""
    if jax.__version_info__ < (0, 11):
        return f'Mosaic GPU by jax {jax.__version__} (0.11 or later)'
    if not 9 <= _capability() <= newest:
        return f'GPUs of compute capability {_capability()} (9, Hopper, or later)' if (
            newest > 9) else f'searches on GPUs of compute capability {_capability()} (9, Hopper)'
    return None


def _search_lacks(query, codebooks):
    """Why Mosaic GPU cannot search in these codebooks; None if it can."""
    half, n_keys = codebooks.shape[3], codebooks.shape[2]
    if query.dtype != jnp.bfloat16:
        return f'searches in {query.dtype} (bfloat16)'
    if n_keys % BLOCK:
        return f'searches of {n_keys} sub-keys (a multiple of {BLOCK})'
    if 2 * half * (TOKENS + BLOCK) + 4 * BLOCK * ROW > SHARED:
        return f'searches with queries of {2 * half} (at most 1024)'
    return _mosaic_lacks(newest=9)      # later ones have other matrix products


def _reads_lack(values, slots):
    """Why Mosaic GPU cannot make these reads; None if it can."""
    (tokens, reads), row_bytes = slots.shape, values.shape[1] * values.dtype.itemsize
    if tokens < 4:
        return f'{tokens} tokens (at least 4, one a warp)'
    if tokens % 4 and reads % 4:    # the last four tokens' slots would not begin at 16 bytes
        return f'{tokens} tokens of {reads} reads (one of them a multiple of 4)'
    if ROWS * row_bytes > ROWS_SHARED:
        return f'rows of {row_bytes} bytes (at most {ROWS_SHARED // ROWS})'
    return _mosaic_lacks(newest=99)

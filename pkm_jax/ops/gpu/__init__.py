"""Kernels of the backbone for NVIDIA GPUs (Pallas, Triton backend), and how kernels are called.

To be imported where a kernel is used, not with the package. A jax release can lack the backend:
then `triton` is None, and what has no other kernel says so as unsupported.
"""

from collections.abc import Callable, Sequence

import jax
from jax.experimental import pallas as pl

try:
    from jax.experimental.pallas import triton
except ImportError:
    triton = None


def column_blocks(width: int) -> list:
    """Column ranges of a power-of-two size, as the Triton backend wants them, that cover a row."""
    size = min(width & -width, 256)
    return [pl.ds(first, size) for first in range(0, width, size)]


def call(
    kernel: Callable, name: str, grid: tuple[int, ...], out: Sequence, *inputs: jax.Array,
    interpret: bool, aliases: dict[int, int] | None = None, warps: int = 1,
) -> Sequence[jax.Array]:
    """A kernel on whole arrays, with results like `out`; `interpret`: by XLA, on any device."""
    return pl.pallas_call(
        kernel, grid=grid, out_shape=[jax.ShapeDtypeStruct(o.shape, o.dtype) for o in out],
        input_output_aliases=aliases or {}, name=name,
        compiler_params=triton.CompilerParams(num_warps=warps, num_stages=1), interpret=interpret,
    )(*inputs)

"""Kernels, each in the place of a reference and with its signature, and how they are called."""

from collections.abc import Sequence

import jax
from absl import logging
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt


def chosen(operation: str, reason_against: str | None) -> bool:
    """Whether `operation` runs as a kernel: on NVIDIA GPUs, unless there is a reason against.

    A reason is logged once for each operation and text.
    """
    if jax.default_backend() != 'gpu' or 'NVIDIA' not in jax.devices()[0].device_kind:
        return False
    if reason_against and (operation, reason_against) not in _logged:
        _logged.add((operation, reason_against))
        logging.warning('The kernel of the %s does not support %s: plain jnp instead, slower.',
                        operation, reason_against)
    return reason_against is None


_logged: set[tuple[str, str]] = set()


def column_blocks(width: int) -> list:
    """Column ranges of a power-of-two size, as the Triton backend wants them, that cover a row."""
    size = min(width & -width, 256)
    return [pl.ds(first, size) for first in range(0, width, size)]


def call(kernel, name: str, grid: tuple[int, ...], out: Sequence, *inputs,
         aliases: dict = {}, warps: int = 1) -> Sequence[jax.Array]:
    """A kernel on whole arrays, with results like `out`; interpreted where there is no GPU."""
    return pl.pallas_call(
        kernel, grid=grid, out_shape=[jax.ShapeDtypeStruct(o.shape, o.dtype) for o in out],
        input_output_aliases=aliases, name=name,
        compiler_params=plt.CompilerParams(num_warps=warps, num_stages=1),
        interpret=jax.default_backend() != 'gpu',
    )(*inputs)

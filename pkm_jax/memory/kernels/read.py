"""Weighted sum of value rows and its derivative on an NVIDIA GPU, in the place of `value_bag`."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pkm_jax.memory.kernels.read_backward import dense_gradients
from pkm_jax.memory.kernels.read_forward import read_rows

DTYPES = (jnp.float32, jnp.bfloat16)


def unsupported(values: Array, slots: Array) -> str | None:
    """Why the kernels cannot read this table with these slots; None if they can."""
    if values.dtype not in DTYPES:
        return f'values of {values.dtype} (float32 or bfloat16)'
    if values.shape[1] % 128:
        return f'a value width of {values.shape[1]} (a multiple of 128)'
    if slots.size >= 2**31:
        return f'{slots.size} reads (fewer than 2^31)'
    return None


@jax.custom_vjp
def value_bag(
    values: Float[Array, 'S V'], slots: Int32[Array, 'T R'], weights: Float[Array, 'T R'],
) -> Float[Array, 'T V']:
    """`pkm_jax.memory.value_bag.value_bag` by kernels; its gradient is deterministic.

    The gradient of `values` is dense and in their dtype, each row summed in float32.
    """
    if slots.shape[1] == 1:     # a gather
        return (values[slots[:, 0]] * weights.astype(jnp.float32)).astype(values.dtype)
    return read_rows(values, slots, weights)


def _forward(values, slots, weights):
    return value_bag(values, slots, weights), (values, slots, weights)


def _backward(residuals, gradient):
    values, slots, weights = residuals
    rows, by_read = dense_gradients(values, slots, weights, gradient)
    return rows, None, by_read


value_bag.defvjp(_forward, _backward)

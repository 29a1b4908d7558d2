"""The end of a post-norm block: dropout of a branch, the residual sum, layer norm."""

import functools

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, Int32, Key, UInt32

from pkm_jax.memory import kernels, sharding
from pkm_jax.memory.dropout import drop, words_of
from pkm_jax.models import add_norm_kernel


def add_norm(
    norm: nnx.LayerNorm, residual: Float[Array, 'B L D'], projection: nnx.Linear,
    inputs: Float[Array, 'B L width'], rate: float, key: Key[Array, ''] | None,
) -> Float[Array, 'B L D']:
    """norm(residual + dropout(projection(inputs))), in the dtype of `inputs`.

    Summed and normed in float32. No dropout without a key; its mask is `keep_mask`'s, whichever
    device a token is on.
    """
    rate = rate if key is not None else 0.
    words = words_of(key) if rate else jnp.zeros(2, jnp.uint32)
    branch = inputs @ projection.kernel[...].astype(inputs.dtype)
    normed = sharding.over_tokens(functools.partial(_add_norm, rate=rate, epsilon=norm.epsilon), 2)(
        rearrange(residual, 'b l d -> (b l) d'), rearrange(branch, 'b l d -> (b l) d'),
        projection.bias[...], norm.scale[...], norm.bias[...], words)
    return normed.reshape(residual.shape)


def _add_norm(residual, branch, branch_bias, scale, bias, words, *, rate, epsilon):
    first = sharding.device_index() * len(branch)
    run = (add_norm_kernel.add_norm
           if kernels.chosen('add_norm', add_norm_kernel.unsupported(branch)) else reference)
    return run(residual, branch, branch_bias, scale, bias, words, first, rate, epsilon)


def reference(
    residual: Float[Array, 'T D'], branch: Float[Array, 'T D'], branch_bias: Float[Array, 'D'],
    scale: Float[Array, 'D'], bias: Float[Array, 'D'], words: UInt32[Array, '2'],
    first: Int32[Array, ''] | int, rate: float, epsilon: float,
) -> Float[Array, 'T D']:
    """`add_norm` in plain jnp, of tokens that begin with number `first`."""
    total = branch.astype(jnp.float32) + branch_bias[None]
    if rate:
        total = drop(total, words, first, rate)
    total += residual.astype(jnp.float32)
    centred = total - total.mean(axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
    return (centred * jax.lax.rsqrt(variance + epsilon) * scale[None] + bias[None]
            ).astype(branch.dtype)

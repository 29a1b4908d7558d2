"""The end of a post-norm block: dropout of a branch, the residual sum, layer norm."""

import functools

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, Int32, Key, UInt8, UInt32

from pkm_jax.dispatch import Choice, Implementation, Kernel
from pkm_jax.mesh import OWN, Axes, device_index, over_tokens
from pkm_jax.ops.dropout import DRAWS, drop, words_of


def add_norm(
    norm: nnx.LayerNorm, residual: Float[Array, 'B L D'], projection: nnx.Linear,
    inputs: Float[Array, 'B L width'], rate: float, key: Key[Array, ''] | None, *,
    axes: Axes = OWN, implementation: Implementation | None = None,
) -> Float[Array, 'B L D']:
    """norm(residual + dropout(projection(inputs))), in the dtype of `inputs`.

    Summed and normed in float32. No dropout without a key; its mask is `keep_mask`'s, whichever
    device a token is on.
    """
    rate = rate if key is not None else 0.
    words = words_of(key) if rate else jnp.zeros(2, jnp.uint32)
    branch = inputs @ projection.kernel[...].astype(inputs.dtype)

    def run(*arrays):
        return add_norm_of_part(*arrays, jnp.int32(device_index(axes)), rate, norm.epsilon,
                                implementation)

    normed = over_tokens(run, 2, axes)(
        rearrange(residual, 'b l d -> (b l) d'), rearrange(branch, 'b l d -> (b l) d'),
        projection.bias[...], norm.scale[...], norm.bias[...], words)
    return normed.reshape(residual.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(7, 8, 9))
def add_norm_of_part(
    residual: Float[Array, 'T D'], branch: Float[Array, 'T D'], branch_bias: Float[Array, 'D'],
    scale: Float[Array, 'D'], bias: Float[Array, 'D'], words: UInt32[Array, '2'],
    part: Int32[Array, ''], rate: float, epsilon: float,
    implementation: Implementation | None = None,
) -> Float[Array, 'T D']:
    """`add_norm` of a branch's product, for part number `part` of all tokens (`keep_mask`)."""
    return _forward_choice(implementation, residual, branch, branch_bias, scale, bias, words, part,
                           rate=rate, epsilon=epsilon)[0]


def reference(
    residual: Float[Array, 'T D'], branch: Float[Array, 'T D'], branch_bias: Float[Array, 'D'],
    scale: Float[Array, 'D'], bias: Float[Array, 'D'], words: UInt32[Array, '2'],
    part: Int32[Array, ''], *, rate: float, epsilon: float,
) -> Float[Array, 'T D']:
    """`add_norm_of_part` in plain jnp, for any device."""
    total = branch.astype(jnp.float32) + branch_bias[None]
    if rate:
        total = drop(total, words, part, rate)
    total += residual.astype(jnp.float32)
    centred = total - total.mean(axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
    return (centred * jax.lax.rsqrt(variance + epsilon) * scale[None] + bias[None]
            ).astype(branch.dtype)


def _reference_forward(
    residual: Array, branch: Array, *others: Array, rate: float, epsilon: float,
) -> tuple[Float[Array, 'T D'], Float[Array, 'T D'], UInt8[Array, 'groups D']]:
    """The result, and zeros for what the kernel keeps for its backward pass."""
    tokens, width = branch.shape
    return (reference(residual, branch, *others, rate=rate, epsilon=epsilon),
            jnp.zeros_like(branch), jnp.zeros((tokens // DRAWS, width), jnp.uint8))


def _reference_backward(
    gradient: Array, total: Array, kept: Array, residual: Array, branch: Array,
    branch_bias: Array, scale: Array, bias: Array, words: Array, part: Array, *,
    rate: float, epsilon: float,
) -> tuple[Array, ...]:
    """By the reference's derivative, whose forward pass XLA finds in the program already."""
    return jax.vjp(
        lambda residual, branch, branch_bias, scale, bias: reference(
            residual, branch, branch_bias, scale, bias, words, part, rate=rate, epsilon=epsilon),
        residual, branch, branch_bias, scale, bias)[1](gradient)


def _load_forward():
    from pkm_jax.ops.gpu import add_norm as kernel
    return Kernel(kernel.forward, kernel.unsupported)


def _load_backward():
    from pkm_jax.ops.gpu import add_norm as kernel
    return Kernel(kernel.backward, lambda gradient, total, kept, *arrays, **settings:
                  kernel.unsupported(*arrays, **settings))


_forward_choice = Choice('add_norm', _reference_forward, _load_forward)
_backward_choice = Choice('add_norm', _reference_backward, _load_backward)


def _forward(residual, branch, branch_bias, scale, bias, words, part, rate, epsilon,
             implementation):
    arrays = residual, branch, branch_bias, scale, bias, words, part
    normed, *kept = _forward_choice(implementation, *arrays, rate=rate, epsilon=epsilon)
    return normed, (*kept, *arrays)


def _backward(rate, epsilon, implementation, residuals, gradient):
    return *_backward_choice(implementation, gradient, *residuals, rate=rate, epsilon=epsilon
                             ), None, None


add_norm_of_part.defvjp(_forward, _backward)

"""Operations whose derivatives are written by hand: fewer bytes, faster products."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@jax.custom_vjp
def gelu(x: Float[Array, '...']) -> Float[Array, '...']:
    """The exact (erf) GELU, computed in float32. Its derivative keeps `x` and nothing else."""
    wide = x.astype(jnp.float32)
    return (wide * _normal_cdf(wide)).astype(x.dtype)


def _gelu_forward(x):
    return gelu(x), x


def _gelu_backward(x, gradient):
    wide = x.astype(jnp.float32)
    density = jnp.exp(-.5 * jnp.square(wide)) / math.sqrt(2 * math.pi)
    slope = _normal_cdf(wide) + wide * density
    return (slope * gradient.astype(jnp.float32)).astype(x.dtype),


gelu.defvjp(_gelu_forward, _gelu_backward)


def _normal_cdf(x):
    return .5 + .5 * jax.lax.erf(x * math.sqrt(.5))


@jax.custom_vjp
def split_qkv(x: Float[Array, 'B L width']) -> list[Float[Array, 'B L third']]:
    """Queries, keys and values: equal parts of the last axis, whose derivatives XLA joins once."""
    return jnp.split(x, 3, axis=-1)


def _split_qkv_forward(x):
    return split_qkv(x), None


def _split_qkv_backward(_, gradients):
    return jax.lax.optimization_barrier(jnp.concatenate(gradients, axis=-1)),


split_qkv.defvjp(_split_qkv_forward, _split_qkv_backward)


@jax.custom_vjp
def logits(
    states: Float[Array, 'B P D'], decoder: Float[Array, 'vocab D'], bias: Float[Array, 'vocab'],
) -> Float[Array, 'B P vocab']:
    """Float32 products of every state with every row of the decoder, plus the bias.

    The vocabulary is padded for the matrix unit. In the derivative the logits' gradient is rounded
    to the dtype of the states before it is multiplied and summed, as that of any other layer is.
    """
    products = jnp.einsum('bpd,vd->bpv', states, _padded(decoder, 0),
                          preferred_element_type=jnp.float32)
    return products[..., :len(decoder)] + bias[None, None]


def _logits_forward(states, decoder, bias):
    return logits(states, decoder, bias), (states, decoder)


def _logits_backward(residuals, gradient):
    states, decoder = residuals
    words, gradient = len(decoder), _padded(gradient.astype(states.dtype), 2)
    by_states = jnp.einsum('bpv,vd->bpd', gradient, _padded(decoder, 0))
    by_decoder = jnp.einsum('bpv,bpd->vd', gradient, states)
    by_bias = jnp.sum(gradient, axis=(0, 1), dtype=jnp.float32)
    return by_states, by_decoder[:words], by_bias[:words]


logits.defvjp(_logits_forward, _logits_backward)


def _padded(array, axis):
    """With zeros up to a multiple of 128 words."""
    return jnp.pad(array, [(0, -size % 128 if n == axis else 0)
                           for n, size in enumerate(array.shape)])

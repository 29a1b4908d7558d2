"""The norm of queries before they search (docs/method.md, section 1, step 1)."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float


class QueryNorm(nnx.Module):
    """Layer norm over each half of a query, or batch norm over the real tokens of the batch.

    Batch norm follows Lample et al. 2019 (momentum 0.1, unbiased running variance); it hands its
    new running statistics back instead of writing them, so that it can be rematerialised.
    """
    epsilon = 1e-5
    momentum = 0.1

    def __init__(self, kind: str, shape: tuple[int, ...]):
        self.kind = kind
        self.scale = nnx.Param(jnp.ones(shape))
        self.bias = nnx.Param(jnp.zeros(shape))
        if kind == 'batch':
            self.mean = nnx.BatchStat(jnp.zeros(shape))
            self.var = nnx.BatchStat(jnp.ones(shape))

    def __call__(
        self, query: Float[Array, 'T H 2 half'], real: Bool[Array, 'T'], training: bool,
    ) -> tuple[Float[Array, 'T H 2 half'], dict]:
        if self.kind == 'batch' and training:
            normed, mean, var = batch_normed(query, real, self.scale[...], self.bias[...],
                                             self.epsilon)
            count = _count(real)
            unbiased = var * count / jnp.maximum(count - 1, 1)
            return normed, {'mean': _towards(self.mean[...], mean, self.momentum),
                            'var': _towards(self.var[...], unbiased, self.momentum)}
        wide = query.astype(jnp.float32)
        if self.kind == 'layer':
            mean, var = wide.mean(-1, keepdims=True), wide.var(-1, keepdims=True)
        else:
            mean, var = self.mean[None], self.var[None]
        normed = (wide - mean) * jax.lax.rsqrt(var + self.epsilon)
        return (normed * self.scale[None] + self.bias[None]).astype(query.dtype), {}


def _towards(running, new, momentum):
    return running + momentum * (jax.lax.stop_gradient(new) - running)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def batch_normed(
    query: Float[Array, 'T H 2 half'], real: Bool[Array, 'T'], scale: Float[Array, 'H 2 half'],
    bias: Float[Array, 'H 2 half'], epsilon: float,
) -> tuple[Float[Array, 'T H 2 half'], Float[Array, 'H 2 half'], Float[Array, 'H 2 half']]:
    """Queries normed over the real tokens, and the float32 mean and (biased) variance of those.

    No gradient comes from the statistics that are returned. The derivative is written by hand: two
    sums over the tokens and one more pass, where the derivative of each sum would take one.
    """
    wide = query.astype(jnp.float32)
    mean = _real_mean(wide, real)
    var = _real_mean(jnp.square(wide - mean[None]), real)
    factor = scale * jax.lax.rsqrt(var + epsilon)
    normed = (wide - mean[None]) * factor[None] + bias[None]
    return normed.astype(query.dtype), mean, var


def _forward(query, real, scale, bias, epsilon):
    normed, mean, var = batch_normed(query, real, scale, bias, epsilon)
    return (normed, mean, var), (query, real, scale, mean, jax.lax.rsqrt(var + epsilon))


def _backward(epsilon, residuals, gradients):
    query, real, scale, mean, inverse_std = residuals
    # The barrier has XLA lay the gradient out like the queries once, for the sums and the rest.
    gradient = jax.lax.optimization_barrier(gradients[0]).astype(jnp.float32)
    normed = (query.astype(jnp.float32) - mean[None]) * inverse_std[None]
    by_bias, by_scale = jnp.sum(gradient, axis=0), jnp.sum(gradient * normed, axis=0)
    through_statistics = (by_bias[None] + normed * by_scale[None]) / _count(real)
    by_query = (gradient - jnp.where(real[:, None, None, None], through_statistics, 0)
                ) * (inverse_std * scale)[None]
    return by_query.astype(query.dtype), None, by_scale, by_bias


batch_normed.defvjp(_forward, _backward)


def _real_mean(query, real):
    return jnp.sum(jnp.where(real[:, None, None, None], query, 0), axis=0) / _count(real)


def _count(real):
    return jnp.maximum(jnp.sum(real, dtype=jnp.float32), 1)

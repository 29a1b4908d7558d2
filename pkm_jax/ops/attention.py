"""Scaled dot-product attention, fused where the device has it."""

import functools
import logging
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from pkm_jax.ops.dropout import dropout
from pkm_jax.xla_flags import xla_flags

DETERMINISTIC = 'xla_gpu_deterministic_ops', 'xla_gpu_exclude_nondeterministic_ops'


def attend(
    query: Float[Array, 'B L H d'],
    key: Float[Array, 'B L H d'],
    value: Float[Array, 'B L H d'],
    lengths: Int[Array, 'B'],
    rate: float,
    dropout_key: Key[Array, ''] | None,
    *,
    causal: bool = False,
) -> Float[Array, 'B L H d']:
    """softmax(QKᵀ/√d)·V over the first `lengths` tokens of each row; softmax in float32.

    `causal`: of these a token attends to itself and those before it only. With dropout of the
    attention weights (`rate` and a key) the weights are materialised, [B, H, L, L], since no public
    fused implementation has it; otherwise cuDNN's is used for bfloat16 on a GPU, and XLA's
    elsewhere and under `deterministic_flag`. A row of length 0 attends to its first token.
    """
    lengths = jnp.maximum(lengths, 1).astype(jnp.int32)
    if rate and dropout_key is not None:
        return _with_dropout(query, key, value, lengths, rate, dropout_key, causal)
    plain, fused = (functools.partial(_attend, causal=causal, implementation=implementation)
                    for implementation in ('xla', 'cudnn'))
    # By the platform of the lowering, but cuDNN's can be traced only where there are GPUs.
    if jax.default_backend() != 'gpu' or query.dtype != jnp.bfloat16 or deterministic_flag():
        return plain(query, key, value, lengths)
    return jax.lax.platform_dependent(query, key, value, lengths, cuda=fused, default=plain)


def deterministic_flag() -> str:
    """The flag in XLA_FLAGS that asks for the same bits in every run on a GPU; '' without one.

    With it XLA looks for cuDNN's attention under another name than it has compiled it under, and
    the first step ends in an IndexError (github.com/openxla/xla/pull/46500).
    """
    return next((f'--{name}' for name, value in xla_flags().items()
                 if name in DETERMINISTIC and value.lower() not in ('false', '0')), '')


def _attend(query, key, value, lengths, *, causal, implementation):
    return jax.nn.dot_product_attention(query, key, value, key_value_seq_lengths=lengths,
                                        is_causal=causal, implementation=implementation)


def attend_to_cache(
    query: Float[Array, 'B L H d'],
    keys: Float[Array, 'B M H d'],
    values: Float[Array, 'B M H d'],
    positions: Int[Array, 'B L'],
) -> Float[Array, 'B L H d']:
    """softmax(QKᵀ/√d)·V of queries at `positions` over what a cache holds up to there."""
    seen = jnp.arange(keys.shape[1])[None, None] <= positions[..., None]
    return jax.nn.dot_product_attention(query, keys, values, mask=seen[:, None])


def _with_dropout(query, key, value, lengths, rate, dropout_key, causal):
    logging.getLogger(__name__).info('Attention with dropout %s: not fused.', rate)
    scores = jnp.einsum('bqhd,bkhd->bhqk', query, key, preferred_element_type=jnp.float32)
    position = jnp.arange(key.shape[1])
    seen = (position[None] < lengths[:, None])[:, None, None]
    if causal:
        seen = seen & (position[None] <= position[:, None])[None, None]
    scores = jnp.where(seen, scores / math.sqrt(query.shape[-1]), -jnp.inf)
    weights = dropout(jax.nn.softmax(scores).astype(value.dtype), rate, dropout_key)
    return jnp.einsum('bhqk,bkhd->bqhd', weights, value)

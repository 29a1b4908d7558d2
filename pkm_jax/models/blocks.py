"""What the transformers here are built of alike: initialised layers, and a stack of blocks."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from pkm_jax.memory.layer import MemoryReads, ProductKeyMemory
from pkm_jax.models.transformer import TransformerConfig
from pkm_jax.ops.elementwise import gelu
from pkm_jax.refusal import Refusal

normal = nnx.initializers.truncated_normal(0.02)


def linear(config: TransformerConfig, rngs: nnx.Rngs, inputs: int, outputs: int) -> nnx.Linear:
    """A projection in the compute dtype."""
    return nnx.Linear(inputs, outputs, kernel_init=normal, dtype=config.dtype, rngs=rngs)


def layer_norm(config: TransformerConfig, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """Of the features of a token."""
    return nnx.LayerNorm(config.width, epsilon=config.norm_epsilon, dtype=config.dtype,
                         use_fast_variance=False, rngs=rngs)


def stack(config: TransformerConfig, block: Callable[..., Any], rngs: nnx.Rngs) -> list[Any]:
    """The blocks of a model, `block(config, layer, values, rngs)` each, in order.

    With shared values all memories read the table of the first.
    """
    blocks, values = [], None
    for layer in range(config.layers):
        blocks.append(block(config, layer, values, rngs))
        if config.shared_values and layer in config.memory_layers:
            values = blocks[-1].memory.values
    return blocks


def through(
    blocks: Sequence[Any], config: TransformerConfig, states: Float[Array, 'B L D'], *arrays: Any,
    keys: Any, deltas: dict[int, Float[Array, 'rows V']] | None, deterministic: bool,
) -> tuple[Float[Array, 'B L D'], dict[int, MemoryReads]]:
    """States after all blocks, `block(states, *arrays, key, delta)` each, and by layer what its
    memory read; the running statistics of memories are updated. `keys` are one for each block."""
    reads, deltas = {}, deltas or {}
    for layer, block in enumerate(blocks):
        run: Callable = functools.partial(block, deterministic=deterministic)
        run = jax.checkpoint(run) if config.remat else run
        states, read = run(states, *arrays, keys[layer], deltas.get(layer))
        if read is not None:
            reads[layer] = read
            block.memory.update_batch_stats(read.batch_stats)
    return states, reads


def check_length(config: TransformerConfig, tokens: Int[Array, 'B L']) -> None:
    """Refuses sequences that are longer than the model takes.

    Raises:
      Refusal: they are.
    """
    if tokens.shape[1] > config.max_length:
        raise Refusal(f'Sequences of {tokens.shape[1]} tokens, but model.max_length = '
                      f'{config.max_length}: shorten them or enlarge it.')


class FeedForward(nnx.Module):
    """Two projections with a GELU between them; a call returns what the second, `down`, takes."""

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
        self.up = linear(config, rngs, config.width, config.feed_forward_width)
        self.down = linear(config, rngs, config.feed_forward_width, config.width)

    def __call__(self, states: Float[Array, 'B L D']) -> Float[Array, 'B L F']:
        return gelu(self.up(states))


def memory_of(
    config: TransformerConfig, layer: int, values: nnx.Param | None, rngs: nnx.Rngs,
) -> ProductKeyMemory | None:
    """The memory of a layer that has one; `values` is the table that it shares."""
    if layer not in config.memory_layers:
        return None
    return ProductKeyMemory(config.memory, config.width, dtype=config.dtype, values=values,
                            rngs=rngs)


def scale_of(config: TransformerConfig, memory: ProductKeyMemory | None) -> nnx.Param | None:
    """What a memory that starts at zero is multiplied with."""
    return nnx.Param(jnp.zeros(())) if memory and config.zero_start else None


def read_scaled(
    memory: ProductKeyMemory, scale: nnx.Param | None, states: Float[Array, 'B L D'],
    real: Bool[Array, 'B L'] | None, key: Key[Array, ''] | None,
    delta: Float[Array, 'rows V'] | None, deterministic: bool,
) -> tuple[Float[Array, 'B L D'], MemoryReads]:
    """What a memory read in float32, scaled, to be summed so: a memory scaled by zero then changes
    no bit in any dtype."""
    read, reads = memory.read(states, real, deterministic=deterministic, rngs=key, delta=delta)
    read = read.astype(jnp.float32)
    return read if scale is None else read * scale[...], reads

"""A causal decoder whose feed-forward layers can have, or be, a product-key memory.

Pre-norm blocks as in GPT-2 (Radford et al. 2019), tied head; a memory as in Lample et al. 2019:

    h' = h + Attention(LN(h))
    none     h'' = h' + FFN(LN(h'))
    replace  h'' = h' + PKM(LN(h'))
    add      h'' = h' + FFN(LN(h')) + PKM(LN(h'))
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from pkm_jax.fields import setting
from pkm_jax.memory.layer import MemoryReads
from pkm_jax.memory.sharded import embedding_lookup
from pkm_jax.models.blocks import (
    FeedForward,
    check_length,
    layer_norm,
    linear,
    memory_of,
    normal,
    read_scaled,
    scale_of,
    stack,
    through,
)
from pkm_jax.models.transformer import TransformerConfig
from pkm_jax.ops.attention import attend, attend_to_cache
from pkm_jax.ops.dropout import dropout, split_key
from pkm_jax.ops.elementwise import logits, split_qkv
from pkm_jax.refusal import Refusal


@dataclasses.dataclass(frozen=True)
class CausalConfig(TransformerConfig):
    """Sizes of a decoder and its memories.

    Raises:
      Refusal: a size or name is impossible; the message names it, its value and the remedy.
    """
    positions: str = setting('rotary', "how a token knows where it is: 'rotary' (queries and keys "
                             "turned by it) or 'learned' (an embedding)",
                             choices=('rotary', 'learned'))
    rotary_base: float = setting(10_000., 'of the wave lengths of rotary positions', above=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.positions == 'rotary' and self.width // self.attention_heads % 2:
            raise Refusal(f'model.positions = {self.positions!r} turns pairs of features: '
                          f'model.width = {self.width} / model.attention_heads = '
                          f'{self.attention_heads} must be even.')

    def build(self, rngs: nnx.Rngs) -> 'Causal':
        """A decoder with fresh parameters."""
        return Causal(self, rngs)

    def unseen(self) -> dict[str, Any]:
        """Settings that weights were trained with and that their shapes do not tell."""
        return super().unseen() | {'positions': self.positions, 'rotary_base': self.rotary_base}


class Past(NamedTuple):
    """Keys and values of the tokens that one layer has read, with room for M tokens a row."""
    keys: Float[Array, 'B M H d']
    values: Float[Array, 'B M H d']


class Causal(nnx.Module):
    """The decoder. A call encodes tokens [B, L], of which the first `lengths` of each row are real.

    It returns the normed states [B, L, D], each of them made of its own token and those before it,
    and by layer what each memory read; see `Bert` for `deterministic`, `rngs` and `deltas`.
    """

    def __init__(self, config: CausalConfig, rngs: nnx.Rngs):
        self.config = config
        self.embeddings = Embeddings(config, rngs)
        self.layers = nnx.List(stack(config, Block, rngs))
        self.norm = layer_norm(config, rngs)

    def __call__(
        self, tokens: Int[Array, 'B L'], lengths: Int[Array, 'B'], *, deterministic: bool = True,
        rngs: Key[Array, ''] | None = None, deltas: dict[int, Float[Array, 'rows V']] | None = None,
    ) -> tuple[Float[Array, 'B L D'], dict[int, MemoryReads]]:
        config = self.config
        check_length(config, tokens)
        keys = split_key(config.key_of_call(deterministic, rngs), config.layers + 1)
        positions = jnp.arange(tokens.shape[1])[None]
        states = self.embeddings(tokens, positions, keys[0])
        states, reads = through(self.layers, config, states, positions, lengths, keys=keys[1:],
                                deltas=deltas, deterministic=deterministic)
        return self.norm(states), reads

    def empty_past(self, rows: int) -> list[Past]:
        """A cache of `rows` rows of max_length tokens, by layer, before the first token."""
        config = self.config
        shape = rows, config.max_length, config.attention_heads, (
            config.width // config.attention_heads)
        return [Past(*(jnp.zeros(shape, config.dtype) for _ in Past._fields))
                for _ in range(config.layers)]

    def extend(
        self, tokens: Int[Array, 'B L'], positions: Int[Array, 'B L'], past: list[Past],
    ) -> tuple[Float[Array, 'B L D'], list[Past]]:
        """What a call returns as states, of L tokens after those of the cache `past`, and the
        cache with them.

        `positions` are theirs, each row's one after the other. What the cache holds at a position
        is written over. Deterministic.
        """
        states, extended = self.embeddings(tokens, positions, None), []
        for block, own in zip(self.layers, past):
            states, own = block.extend(states, positions, own)
            extended.append(own)
        return self.norm(states), extended

    def logits(self, states: Float[Array, 'B L D']) -> Float[Array, 'B L vocab']:
        """Float32 logits of the token after each, with the word embedding."""
        embedding = self.embeddings.word.embedding[...]
        return logits(states, embedding.astype(self.config.dtype), jnp.zeros(len(embedding)))


class Embeddings(nnx.Module):
    """Words, and where they are learnt their positions."""

    def __init__(self, config: CausalConfig, rngs: nnx.Rngs):
        embed = functools.partial(nnx.Embed, features=config.width, rngs=rngs,
                                  embedding_init=normal)
        self.word = embed(config.vocab_size)
        self.position = embed(config.max_length) if config.positions == 'learned' else None
        self.rate, self.dtype = config.dropout, config.dtype

    def __call__(
        self, tokens: Int[Array, 'B L'], positions: Int[Array, '#B L'], key: Key[Array, ''] | None,
    ) -> Float[Array, 'B L D']:
        words = embedding_lookup(self.word.embedding[...].astype(self.dtype), tokens.reshape(-1))
        states = words.reshape(*tokens.shape, -1)
        if self.position is not None:
            states = states.astype(jnp.float32) + self.position.embedding[...][positions]
        return dropout(states.astype(self.dtype), self.rate, key)


class Block(nnx.Module):
    """Self-attention, then the feed-forward layer and the memory of one layer, pre-norm."""

    def __init__(self, config: CausalConfig, layer: int, values: nnx.Param | None, rngs: nnx.Rngs):
        self.rate = config.dropout
        self.attention_norm = layer_norm(config, rngs)
        self.attention = Attention(config, rngs)
        self.norm = layer_norm(config, rngs)
        self.feed_forward = FeedForward(config, rngs) if config.has_feed_forward(layer) else None
        self.memory = memory_of(config, layer, values, rngs)
        self.memory_scale = scale_of(config, self.memory)

    def __call__(
        self, states: Float[Array, 'B L D'], positions: Int[Array, '#B L'],
        lengths: Int[Array, 'B'], key: Key[Array, ''] | None,
        delta: Float[Array, 'rows V'] | None = None, *, deterministic: bool = True,
    ) -> tuple[Float[Array, 'B L D'], MemoryReads | None]:
        keys = split_key(key, 4)
        attended = self.attention(self.attention_norm(states), positions, lengths, keys[0])
        states += dropout(attended, self.rate, keys[1])
        real = jnp.arange(states.shape[1])[None] < lengths[:, None]
        return self._after_attention(states, real, keys[2:], delta, deterministic)

    def extend(
        self, states: Float[Array, 'B L D'], positions: Int[Array, 'B L'], past: Past,
    ) -> tuple[Float[Array, 'B L D'], Past]:
        """See `Causal.extend`."""
        attended, past = self.attention.extend(self.attention_norm(states), positions, past)
        return self._after_attention(states + attended, None, (None, None), None, True)[0], past

    def _after_attention(self, states, real, keys, delta, deterministic):
        normed, total, reads = self.norm(states), states.astype(jnp.float32), None
        if self.memory is not None:
            read, reads = read_scaled(self.memory, self.memory_scale, normed, real, keys[1], delta,
                                      deterministic)
            total += read
        if self.feed_forward is not None:
            fed = self.feed_forward.down(self.feed_forward(normed))
            total += dropout(fed, self.rate, keys[0]).astype(jnp.float32)
        return total.astype(states.dtype), reads


class Attention(nnx.Module):
    """Multi-head attention of every token to itself and those before it."""

    def __init__(self, config: CausalConfig, rngs: nnx.Rngs):
        self.config = config
        self.qkv = linear(config, rngs, config.width, 3 * config.width)
        self.output = linear(config, rngs, config.width, config.width)

    def __call__(
        self, states: Float[Array, 'B L D'], positions: Int[Array, '#B L'],
        lengths: Int[Array, 'B'], key: Key[Array, ''] | None,
    ) -> Float[Array, 'B L D']:
        query, keys, values = self.heads(states, positions)
        attended = attend(query, keys, values, lengths, self.config.attention_dropout, key,
                          causal=True)
        return self.output(rearrange(attended, 'b l h d -> b l (h d)'))

    def extend(
        self, states: Float[Array, 'B L D'], positions: Int[Array, 'B L'], past: Past,
    ) -> tuple[Float[Array, 'B L D'], Past]:
        """The same for tokens after those of a cache, and the cache with them."""
        query, *new = self.heads(states, positions)
        rows = jnp.arange(len(positions))[:, None]
        past = Past(*(held.at[rows, positions].set(part) for held, part in zip(past, new)))
        attended = attend_to_cache(query, *past, positions)
        return self.output(rearrange(attended, 'b l h d -> b l (h d)')), past

    def heads(
        self, states: Float[Array, 'B L D'], positions: Int[Array, '#B L'],
    ) -> tuple[Float[Array, 'B L H d'], ...]:
        """Queries, keys and values of tokens at these positions."""
        query, keys, values = (
            rearrange(part, 'b l (h d) -> b l h d', h=self.config.attention_heads)
            for part in split_qkv(self.qkv(states)))
        if self.config.positions == 'rotary':
            query, keys = (rotated(part, positions, self.config.rotary_base)
                           for part in (query, keys))
        return query, keys, values


def rotated(
    x: Float[Array, 'B L H d'], positions: Int[Array, '#B L'], base: float,
) -> Float[Array, 'B L H d']:
    """Pairs of features (i, i + d / 2) turned by position · base^(−2i / d), in float32.

    Inner products of two turned vectors depend on how far apart they are (Su et al. 2021).
    """
    half = x.shape[-1] // 2
    rates = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions.astype(jnp.float32)[..., None] * rates[None, None]
    cos, sin = (function(angles)[:, :, None] for function in (jnp.cos, jnp.sin))
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)

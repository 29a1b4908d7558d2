"""BERT (Devlin et al. 2019) whose feed-forward layers can have, or be, a product-key memory."""

import dataclasses
import functools
from typing import Any

import jax
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
from pkm_jax.ops.add_norm import add_norm
from pkm_jax.ops.attention import attend
from pkm_jax.ops.dropout import dropout, split_key
from pkm_jax.ops.elementwise import gelu, logits, split_qkv
from pkm_jax.refusal import Refusal

HEADS = ('mlm', 'pooler', 'nsp', 'classifier', 'span', 'token_classifier')
FINE_TUNED = ('pooler', 'classifier', 'span', 'token_classifier')      # beside a frozen backbone


@dataclasses.dataclass(frozen=True)
class BertConfig(TransformerConfig):
    """Sizes of a BERT and its memories; the defaults are BERT-base, uncased, without memory.

    Raises:
      Refusal: a size or name is impossible; the message names it, its value and the remedy.
    """
    segments: int = setting(2, 'kinds of sentence that a token can belong to', least=1)
    output_heads: tuple[str, ...] = setting(('mlm',), f'outputs, of {", ".join(HEADS)}')
    classes: int = setting(2, 'outputs of the classifier, of texts or of tokens; 1 for regression',
                           least=1)
    tied: bool = setting(True, 'the MLM head predicts with the word embedding')

    def __post_init__(self) -> None:
        super().__post_init__()
        if unknown := sorted(set(self.output_heads) - set(HEADS)):
            raise Refusal(f'output_heads {unknown} are none of {HEADS}.')
        if {'nsp', 'classifier'} & set(self.output_heads) and 'pooler' not in self.output_heads:
            raise Refusal(f"output_heads = {self.output_heads}: 'nsp' and 'classifier' read the "
                          f"'pooler'.")
        if {'classifier', 'token_classifier'} <= set(self.output_heads):
            raise Refusal(f"output_heads = {self.output_heads}: 'classifier' is of texts, "
                          f"'token_classifier' of tokens; a model has one of them.")

    def build(self, rngs: nnx.Rngs) -> 'Bert':
        """A BERT with fresh parameters."""
        return Bert(self, rngs)

    def is_backbone(self, path: str) -> bool:
        """Whether a parameter is part neither of a memory nor of a head for fine-tuning."""
        return super().is_backbone(path) and path.partition('/')[0] not in FINE_TUNED

    def unseen(self) -> dict[str, Any]:
        """Settings that weights were trained with and that their shapes do not tell."""
        return super().unseen() | {'tied': self.tied}

    def head_products(self) -> int:
        """Multiplications for one masked token: the head's transform, then the vocabulary."""
        return self.width ** 2 + super().head_products()


class Bert(nnx.Module):
    """The encoder and the heads named in the configuration.

    A call encodes tokens [B, L] with their segments, of which the first `lengths` of each row are
    real. It returns the states [B, L, D] in the compute dtype and, by layer, what each memory read
    over the B·L tokens. Heads are methods over states. Unless `deterministic`, there is dropout,
    by the key `rngs`, and the memories' running statistics are updated. `deltas`
    stand for the value rows that a sparse update is to change.
    """

    def __init__(self, config: BertConfig, rngs: nnx.Rngs):
        self.config = config
        self.embeddings = Embeddings(config, rngs)
        self.layers = nnx.List(stack(config, Block, rngs))
        head = functools.partial(linear, config, rngs)
        if 'mlm' in config.output_heads:
            self.mlm = MaskedLMHead(config, rngs)
        if 'pooler' in config.output_heads:
            self.pooler = head(config.width, config.width)
        if 'nsp' in config.output_heads:
            self.nsp = head(config.width, 2)
        if 'classifier' in config.output_heads:
            self.classifier = head(config.width, config.classes)
        if 'span' in config.output_heads:
            self.span = head(config.width, 2)
        if 'token_classifier' in config.output_heads:
            self.token_classifier = head(config.width, config.classes)

    def __call__(
        self, tokens: Int[Array, 'B L'], segments: Int[Array, 'B L'], lengths: Int[Array, 'B'],
        *, deterministic: bool = True, rngs: Key[Array, ''] | None = None,
        deltas: dict[int, Float[Array, 'rows V']] | None = None,
    ) -> tuple[Float[Array, 'B L D'], dict[int, MemoryReads]]:
        check_length(self.config, tokens)
        keys = split_key(self.config.key_of_call(deterministic, rngs), self.config.layers + 1)
        states = self.embeddings(tokens, segments, keys[0])
        return through(self.layers, self.config, states, lengths, keys=keys[1:], deltas=deltas,
                       deterministic=deterministic)

    def mlm_logits(
        self, states: Float[Array, 'B L D'], positions: Int[Array, 'B P'],
    ) -> Float[Array, 'B P vocab']:
        """Float32 logits of the words at the given positions only."""
        one_hot = jax.nn.one_hot(positions, states.shape[1], dtype=states.dtype)
        chosen = jnp.einsum('bpl,bld->bpd', one_hot, states)
        return self.mlm(chosen, self.embeddings.word)

    def pooled(self, states: Float[Array, 'B L D']) -> Float[Array, 'B D']:
        """tanh of a projection of the first token."""
        return jnp.tanh(self.pooler(states[:, 0]))

    def nsp_logits(self, states: Float[Array, 'B L D']) -> Float[Array, 'B 2']:
        """Float32 logits of (is next, is random) for sentence pairs."""
        return self.nsp(self.pooled(states)).astype(jnp.float32)

    def class_logits(
        self, states: Float[Array, 'B L D'], key: Key[Array, ''] | None = None,
    ) -> Float[Array, 'B classes']:
        """Float32 class logits, or the estimate of a regression (classes = 1)."""
        pooled = dropout(self.pooled(states), self.config.dropout, key)
        return self.classifier(pooled).astype(jnp.float32)

    def span_logits(self, states: Float[Array, 'B L D']) -> Float[Array, 'B L 2']:
        """Float32 logits of being the first and the last token of an answer."""
        return self.span(states).astype(jnp.float32)

    def token_logits(
        self, states: Float[Array, 'B L D'], key: Key[Array, ''] | None = None,
    ) -> Float[Array, 'B L classes']:
        """Float32 class logits of each token."""
        dropped = dropout(states, self.config.dropout, key)
        return self.token_classifier(dropped).astype(jnp.float32)


class Embeddings(nnx.Module):
    """LN(word + position + segment)."""

    def __init__(self, config: BertConfig, rngs: nnx.Rngs):
        embed = functools.partial(nnx.Embed, features=config.width, rngs=rngs,
                                  embedding_init=normal)
        self.word = embed(config.vocab_size)
        self.position = embed(config.max_length)
        self.segment = embed(config.segments)
        self.norm = layer_norm(config, rngs)
        self.rate, self.dtype = config.dropout, config.dtype

    def __call__(
        self, tokens: Int[Array, 'B L'], segments: Int[Array, 'B L'], key: Key[Array, ''] | None,
    ) -> Float[Array, 'B L D']:
        # A gather's gradient is a scatter-add: slow where most tokens share a row, and on a GPU
        # different each time. The memory's read is neither, and one-hot products are none.
        words = embedding_lookup(self.word.embedding[...].astype(self.dtype), tokens.reshape(-1))
        table = self.segment.embedding[...]
        segment = jax.nn.one_hot(segments, len(table)) @ table
        total = words.reshape(segment.shape).astype(jnp.float32) + segment
        total += self.position.embedding[None, :tokens.shape[1]]
        return dropout(self.norm(total), self.rate, key)


class Block(nnx.Module):
    """Self-attention, then the feed-forward layer and the memory of one layer, post-norm."""

    def __init__(self, config: BertConfig, layer: int, values: nnx.Param | None, rngs: nnx.Rngs):
        self.config = config
        self.attention = Attention(config, rngs)
        self.attention_norm = layer_norm(config, rngs)
        self.feed_forward = FeedForward(config, rngs) if config.has_feed_forward(layer) else None
        self.memory = memory_of(config, layer, values, rngs)
        self.memory_scale = scale_of(config, self.memory)
        self.output_norm = layer_norm(config, rngs)

    def __call__(
        self, states: Float[Array, 'B L D'], lengths: Int[Array, 'B'], key: Key[Array, ''] | None,
        delta: Float[Array, 'rows V'] | None = None, *, deterministic: bool = True,
    ) -> tuple[Float[Array, 'B L D'], MemoryReads | None]:
        rate, keys = self.config.dropout, split_key(key, 4)
        attended = self.attention(states, lengths, keys[0])
        states = add_norm(self.attention_norm, states, self.attention.output, attended, rate,
                          keys[1])
        residual, reads = states, None
        if self.memory is not None:
            real = jnp.arange(states.shape[1])[None] < lengths[:, None]
            read, reads = read_scaled(self.memory, self.memory_scale, states, real, keys[3], delta,
                                      deterministic)
            residual = states.astype(jnp.float32) + read
        if self.feed_forward is None:
            return self.output_norm(residual), reads
        states = add_norm(self.output_norm, residual, self.feed_forward.down,
                          self.feed_forward(states), rate, keys[2])
        return states, reads


class Attention(nnx.Module):
    """Multi-head self-attention over the real tokens of each row, up to its output projection."""

    def __init__(self, config: BertConfig, rngs: nnx.Rngs):
        self.config = config
        self.query, self.key, self.value, self.output = (
            linear(config, rngs, config.width, config.width) for _ in range(4))

    def __call__(
        self, states: Float[Array, 'B L D'], lengths: Int[Array, 'B'], key: Key[Array, ''] | None,
    ) -> Float[Array, 'B L D']:
        # One product instead of three: more work for the matrix unit at a time, forward and back.
        projections = self.query, self.key, self.value
        kernel, bias = (jnp.concatenate(parts, axis=-1).astype(states.dtype) for parts in zip(
            *((projection.kernel[...], projection.bias[...]) for projection in projections)))
        query, keys, value = (
            rearrange(part, 'b l (h d) -> b l h d', h=self.config.attention_heads)
            for part in split_qkv(states @ kernel + bias[None, None]))
        attended = attend(query, keys, value, lengths, self.config.attention_dropout, key)
        return rearrange(attended, 'b l h d -> b l (h d)')


class MaskedLMHead(nnx.Module):
    """Transform, then logits over the vocabulary with the word embedding (or an untied decoder)."""

    def __init__(self, config: BertConfig, rngs: nnx.Rngs):
        self.transform = linear(config, rngs, config.width, config.width)
        self.norm = layer_norm(config, rngs)
        self.bias = nnx.Param(jnp.zeros(config.vocab_size))
        self.decoder = None if config.tied else nnx.Param(
            normal(rngs.params(), (config.vocab_size, config.width)))
        self.dtype = config.dtype

    def __call__(
        self, states: Float[Array, 'B P D'], word_embedding: nnx.Embed,
    ) -> Float[Array, 'B P vocab']:
        states = self.norm(gelu(self.transform(states)))
        decoder = word_embedding.embedding if self.decoder is None else self.decoder
        return logits(states, decoder[...].astype(self.dtype), self.bias[...])

"""What the configurations of all transformers here have in common: sizes, memories, costs.

Placement of a memory in a post-norm block (docs/method.md, section 2), LN being its output norm:

    none     h' = LN(h + FFN(h))
    replace  h' = LN(h + PKM(h))                 Lample et al. 2019
    add      h' = LN(h + FFN(h) + PKM(h))        Kim & Jung 2020
"""

import dataclasses
import re
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Key

from pkm_jax.fields import check_settings, setting
from pkm_jax.memory.layer import MemoryConfig
from pkm_jax.models.interface import MemorySite, Path, Saving
from pkm_jax.ops.attention import deterministic_flag
from pkm_jax.ops.dropout import HIGHEST_RATE
from pkm_jax.refusal import Refusal

PLACEMENTS = ('none', 'replace', 'add')


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Sizes of a transformer and of its memories; the defaults are BERT-base's, without memory.

    Raises:
      Refusal: a size or name is impossible; the message names it, its value and the remedy.
    """
    vocab_size: int = setting(0, 'rows of the word embedding; 0: one for each word', least=0)
    layers: int = setting(12, 'blocks', least=1)
    width: int = setting(768, 'D, features of a token', least=1)
    attention_heads: int = setting(12, 'attention heads of a block', least=1)
    feed_forward_width: int = setting(3072, 'features inside a feed-forward layer', least=1)
    max_length: int = setting(512, 'tokens of the longest sequence', least=1)
    dropout: float = setting(0.1, 'share of features dropped', least=0, most=HIGHEST_RATE)
    attention_dropout: float = setting(
        0.1, 'share of attention weights dropped; 0 makes attention fused on GPUs: faster',
        least=0, most=HIGHEST_RATE)
    norm_epsilon: float = setting(1e-12, 'added to the variance in a layer norm', least=0)
    dtype: str = setting('float32', 'of the computation; parameters are float32',
                         choices=('float32', 'bfloat16'))
    remat: bool = setting(
        False, 'recompute each block in the backward pass: less memory, about a third more time')
    memory: MemoryConfig = MemoryConfig()
    memory_layers: tuple[int, ...] = setting((), 'layers that have a memory, counted from 0')
    placement: str = setting('none', 'of the memory in each of these layers', choices=PLACEMENTS)
    zero_start: bool = setting(
        False, 'scale memories by a learnt scalar that starts at 0: it begins as the model '
        'without, to the bit in evaluation')
    shared_values: bool = setting(False, 'one value table for all memory layers')

    def __post_init__(self) -> None:
        if self.placement not in PLACEMENTS:
            raise Refusal(f'memory.placement = {self.placement!r} is none of {PLACEMENTS}.')
        if not all(isinstance(layer, int) for layer in self.memory_layers):
            raise Refusal(f'memory.layers = {self.memory_layers}: each must be an int.')
        check_settings(self, 'model')
        if self.width % self.attention_heads:
            raise Refusal(f'model.width = {self.width} does not divide into '
                          f'model.attention_heads = {self.attention_heads}.')
        if bool(self.memory_layers) != (self.placement != 'none'):
            raise Refusal(f'memory.placement = {self.placement!r} with memory.layers = '
                          f'{self.memory_layers}: give both a placement and layers, or neither.')
        outside = [i for i in self.memory_layers if not 0 <= i < self.layers]
        if outside or len(set(self.memory_layers)) < len(self.memory_layers):
            raise Refusal(f'memory.layers = {self.memory_layers}: every layer must be given once '
                          f'and lie within 0..{self.layers - 1} (model.layers = {self.layers}).')

    def with_vocabulary(self, words: int) -> Any:
        """The same with an embedding for that many words, where its rows were not given.

        Raises:
          Refusal: they were, and are fewer.
        """
        if self.vocab_size and self.vocab_size < words:
            raise Refusal(f'model.vocab_size = {self.vocab_size:,} rows of the word embedding, but '
                          f'the vocabulary has {words:,} words: set it to 0 or to more.')
        return dataclasses.replace(self, vocab_size=self.vocab_size or words)

    @property
    def word_embedding(self) -> Path:
        """Where it is among the parameters."""
        return 'embeddings', 'word', 'embedding'

    def is_backbone(self, path: str) -> bool:
        """Whether a parameter is part neither of a memory nor of a head for fine-tuning."""
        return not re.match(r'layers/\d+/memory', path)

    def unseen(self) -> dict[str, Any]:
        """Settings that weights were trained with and that their shapes do not tell."""
        return {'attention_heads': self.attention_heads, 'norm_epsilon': self.norm_epsilon}

    def fast_paths(self, platform: str) -> list[str]:
        """Whether attention is fused in training, and why not."""
        if platform != 'gpu':
            return ["attention: XLA's (a fused one exists for GPUs)"]
        if self.attention_dropout:
            return [f'attention: NOT FUSED, since model.attention_dropout = '
                    f'{self.attention_dropout} drops its weights; 0 makes a step of BERT-base 1.6 '
                    f'times as fast']
        if self.dtype != 'bfloat16':
            return [f'attention: NOT FUSED, since model.dtype = {self.dtype!r} is not bfloat16']
        if flag := deterministic_flag():
            return [f'attention: NOT FUSED, since XLA cannot run cuDNN\'s under {flag}']
        return ['attention: fused (cuDNN)']

    @property
    def has_dropout(self) -> bool:
        """Whether a model in training needs a key."""
        return bool(self.dropout or self.attention_dropout
                    or self.memory_layers and self.memory.has_dropout)

    def key_of_call(
        self, deterministic: bool, rngs: Key[Array, ''] | None,
    ) -> Key[Array, ''] | None:
        """The key that a call drops by: none where it is deterministic.

        Raises:
          Refusal: it is not, the model has dropout, and there is no key.
        """
        if deterministic:
            return None
        if rngs is None and self.has_dropout:
            raise Refusal('A model with dropout needs a key, rngs, where it is not deterministic.')
        return rngs

    def has_feed_forward(self, layer: int) -> bool:
        return not (self.placement == 'replace' and layer in self.memory_layers)

    @property
    def value_width(self) -> int:
        """V of the memories."""
        return self.memory.value_width or self.width

    @property
    def memories(self) -> dict[int, MemorySite]:
        """The memories by layer."""
        def path(layer):
            return 'layers', layer, 'memory'

        # The first block built owns a shared table.
        owner = {layer: min(self.memory_layers) if self.shared_values else layer
                 for layer in self.memory_layers}
        return {layer: MemorySite(self.memory, path(layer), (*path(owner[layer]), 'values'),
                                  self.value_width, f'layer {layer}')
                for layer in sorted(self.memory_layers)}

    def savings(self) -> list[Saving]:
        """Rematerialisation, and attention whose weights are never made, where they are not set."""
        remat, dropout = Saving('remat', True, True), Saving('attention_dropout', 0., False)
        return [remat] * (not self.remat) + [dropout] * bool(self.attention_dropout)

    def forward_flops(self, length: int, predictions: int) -> int:
        """Operations of one sequence's forward pass: matrix products alone, 2 per multiplication
        and addition; of a memory the query, the sub-key scores, the read and the projection of it.

        `predictions` tokens pass the head's transform and are compared with the vocabulary.
        """
        width, memory = self.width, self.memory
        token = 0
        for layer in range(self.layers):
            token += 4 * width ** 2 + 2 * length * width
            if self.has_feed_forward(layer):
                token += 2 * width * self.feed_forward_width
            if layer in self.memory_layers:
                token += memory.heads * (
                    width * memory.query_width + memory.sub_keys * memory.query_width
                    + memory.top_k * self.value_width)
                if self.value_width != width:
                    token += self.value_width * width
        return 2 * (length * token + predictions * self.head_products())

    def head_products(self) -> int:
        """Multiplications for one token that is compared with the vocabulary."""
        return self.width * self.vocab_size

    def activation_bytes(self, sequences: int, length: int, predictions: int) -> int:
        """Bytes kept between the forward and the backward pass, on one device.

        Per token and block, in numbers of the compute dtype: input, query, key, value, context and
        attention's output of D, two of the feed-forward width F; the float32 sums before both
        norms; a byte for each dropped number. Attention that drops weights keeps them before and
        after, [heads, L, L]. With rematerialisation a block's input and the inside of one block.
        """
        item = jnp.dtype(self.dtype).itemsize
        block = 6 * item * self.width + 8 * self.width + 2 * item * self.feed_forward_width
        block += 2 * self.width * bool(self.dropout)
        if self.attention_dropout:
            block += self.attention_heads * length * 2 * item
        blocks = self.layers * item * self.width + block if self.remat else self.layers * block
        memory = self.memory
        reads = memory.heads * (memory.top_k * 8 + memory.query_width * (4 + item)
                                + 2 * memory.sub_keys * 4)
        logits = 2 * 4 * self.vocab_size * predictions // length
        return int(sequences * length * (blocks + len(self.memory_layers) * reads + logits))

"""The product-key memory layer (METHOD.md section 1): query, retrieval, weights, read."""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Bool, Float, Int32, Key

from pkm_jax.memory import sharding
from pkm_jax.memory.dropout import dropout
from pkm_jax.memory.query_norm import QueryNorm

QUERY_NORMS = ('none', 'layer', 'batch')


@dataclasses.dataclass(frozen=True)
class MemoryConfig:
    """Sizes of one memory; the defaults are the paper's.

    Raises:
      ValueError: a size is out of range; the message names it and its value.
    """
    sub_keys: int = 512         # N sub-keys per codebook: N² slots
    heads: int = 4              # H: every head has a query and codebooks of its own
    top_k: int = 32             # K slots read per head
    query_width: int = 512      # Q, split into two halves
    value_width: int = 0        # V; 0: the width of the model. Else an output projection follows
    query_norm: str = 'batch'   # 'none', 'layer' (over each half) or 'batch' (over real tokens)
    input_dropout: float = 0.0
    query_dropout: float = 0.0
    value_dropout: float = 0.0  # on the sum that was read
    values_dtype: str = 'float32'   # of the table; 'bfloat16' needs sparse updates
    weights_dtype: str = 'float32'  # of the reads' weights, also where devices exchange them

    def __post_init__(self):
        if not 1 <= self.top_k <= self.sub_keys:
            raise ValueError(f'memory.top_k = {self.top_k} must lie within 1..sub_keys, and '
                             f'sub_keys is {self.sub_keys}.')
        if self.query_width < 2 or self.query_width % 2:
            raise ValueError(f'memory.query_width = {self.query_width} must be even and positive: '
                             f'each half of a query searches one codebook.')
        if self.query_norm not in QUERY_NORMS:
            raise ValueError(f'memory.query_norm = {self.query_norm!r} is none of {QUERY_NORMS}.')
        if self.heads < 1 or self.value_width < 0:
            raise ValueError(f'memory.heads = {self.heads} must be 1 or more, '
                             f'memory.value_width = {self.value_width} 0 or more.')
        for name in ('input_dropout', 'query_dropout', 'value_dropout'):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f'memory.{name} = {getattr(self, name)} must lie within [0, 1).')
        for name in ('values_dtype', 'weights_dtype'):
            if getattr(self, name) not in ('float32', 'bfloat16'):
                raise ValueError(f'memory.{name} = {getattr(self, name)!r} is neither '
                                 f"'float32' nor 'bfloat16'.")

    @property
    def slots(self) -> int:
        return self.sub_keys ** 2


class MemoryReads(NamedTuple):
    """What one call of a memory read; padding has weight 0."""
    slots: Int32[Array, 'T H K']    # in descending order of score
    weights: Float[Array, 'T H K']  # float32, of each real token and head summing to 1
    statistics: dict                # new running statistics of the query norm, {} without any
    touched: tuple = ()             # ids and count of the rows that `delta` stands for, if given


class ProductKeyMemory(nnx.Module):
    """A memory of N² value rows that every token reads H·K of (Lample et al. 2019, section 3).

    Arguments of a call are the tokens' states [T, D], which of them are real, and a dropout key
    (None: no dropout, and running instead of batch statistics). Returns the read, [T, D], and the
    `MemoryReads`. `values` can be the table of another memory of the same size. With a `delta` of
    zeros (`no_delta`) the gradient of the table is that of `delta` alone, a row for each touched.
    """

    def __init__(self, config: MemoryConfig, width: int, *, dtype=jnp.float32,
                 values: nnx.Param | None = None, rngs: nnx.Rngs):
        self.config = config
        half = config.query_width // 2
        value_width = config.value_width or width
        self.query = nnx.Linear(width, config.heads * config.query_width, dtype=dtype,
                                kernel_init=nnx.initializers.xavier_uniform(), rngs=rngs)
        if config.query_norm != 'none':
            self.query_norm = QueryNorm(config.query_norm, (config.heads, 2, half))
        bound = 1 / math.sqrt(half)
        self.codebooks = nnx.Param(jax.random.uniform(
            rngs.params(), (config.heads, 2, config.sub_keys, half), minval=-bound, maxval=bound))
        self.values = values if values is not None else nnx.Param(
            _normal_values(rngs.params(), (config.slots, value_width), config.values_dtype))
        self.output = (nnx.Linear(value_width, width, use_bias=False, dtype=dtype, rngs=rngs)
                       if value_width != width else None)
        self.dtype = dtype

    def __call__(
        self, states: Float[Array, 'T D'], real: Bool[Array, 'T'], key: Key[Array, ''] | None,
        delta: Float[Array, 'rows V'] | None = None,
    ) -> tuple[Float[Array, 'T D'], MemoryReads]:
        config, training = self.config, key is not None
        keys = jax.random.split(key, 3) if training else (None, None, None)

        states = dropout(states, config.input_dropout, keys[0])
        query = rearrange(self.query(states), 't (h two half) -> t h two half',
                          h=config.heads, two=2)
        statistics = {}
        if config.query_norm != 'none':
            query, statistics = self.query_norm(query, real, training)
        query = dropout(query, config.query_dropout, keys[1])

        scores, slots = sharding.top_k_product_keys(
            query, self.codebooks[...].astype(self.dtype), config.top_k)
        weights = jnp.where(real[:, None, None], jax.nn.softmax(scores, axis=-1), 0)
        read, touched = self._read(slots.reshape(len(slots), -1),
                                   weights.reshape(len(weights), -1), delta, training)
        read = dropout(read, config.value_dropout, keys[2]).astype(self.dtype)
        return (self.output(read) if self.output else read,
                MemoryReads(slots, weights, statistics, touched))

    def _read(self, slots, weights, delta, training):
        values, weights = self.values[...], weights.astype(self.config.weights_dtype)
        if delta is None:
            # A step with dense updates reads about every row: to round all of them once takes less
            # than to read them wider twice. An evaluation has no second read, nor memory to spare.
            dtype = self.dtype if training else values.dtype
            return sharding.value_bag(values, slots, weights, dtype), ()
        return (sharding.sparse_value_bag(values, delta, slots, weights),
                sharding.touched_rows(slots, weights, len(values)))

    def no_delta(self, tokens: int) -> Float[Array, 'rows V']:
        """A delta for a call with that many tokens."""
        reads = tokens * self.config.heads * self.config.top_k
        return sharding.no_rows(*self.values.shape, reads)


def _normal_values(key, shape, dtype):
    return (jax.random.normal(key, shape) / math.sqrt(shape[1])).astype(dtype)

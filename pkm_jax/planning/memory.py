"""What a training step keeps in the memory of one device, by kind."""

import math
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections

from pkm_jax.models.bert import BertConfig
from pkm_jax.training.plan import Plan, compact_bytes, tables_of

# The first pattern found in an array's path within (state, batch) names its kind.
KINDS = (
    (r'^0/params/.*memory/values$', 'value tables'),
    (r'^0/params/', 'backbone parameters'),
    (r'^0/optimizer/.*memory/values$', 'optimizer state of value tables'),
    (r'^0/optimizer/', 'optimizer state of the backbone'),
    (r'^1/', 'batch'),
    (r'', 'statistics and marks'),
)
TEMPORARY = 'temporaries: activations, gradients'
PROGRAM = 'program and padding of arrays'


class Memory(NamedTuple):
    """Bytes on one device; what there is to fill."""
    bytes: dict[str, int]
    available: int

    @property
    def total(self) -> int:
        return sum(self.bytes.values())

    @property
    def fits(self) -> bool:
        return self.total <= self.available


def arguments(state, batch) -> dict[str, int]:
    """Bytes per device of the arrays that a step is given, by kind; it returns as much."""
    by_kind = dict.fromkeys(sorted({kind for _, kind in KINDS}, key=[k for _, k in KINDS].index), 0)
    for path, leaf in jax.tree_util.tree_leaves_with_path((state, batch)):
        name = jax.tree_util.keystr(path, simple=True, separator='/')
        kind = next(kind for pattern, kind in KINDS if re.search(pattern, name))
        by_kind[kind] += math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    return by_kind


def of_compiled(given: dict[str, int], compiled: jax.stages.Compiled) -> dict[str, int]:
    """All of a step's memory, from what its compiler says."""
    said = compiled.memory_analysis()
    returned = said.output_size_in_bytes - said.alias_size_in_bytes
    return {**given, TEMPORARY: said.temp_size_in_bytes,
            PROGRAM: said.argument_size_in_bytes - sum(given.values()) + returned
            + said.generated_code_size_in_bytes}


def estimated(
    given: dict[str, int], config: ml_collections.ConfigDict, model: BertConfig, plan: Plan,
) -> dict[str, int]:
    """All of a step's memory where it cannot be compiled: see `activations` and `gradients`."""
    return {**given, TEMPORARY: activations(config, model, plan)
            + gradients(given, config, model, plan)}


def activations(config: ml_collections.ConfigDict, model: BertConfig, plan: Plan) -> int:
    """Bytes kept between the forward and the backward pass of a part of a step, on one device.

    Per token and block, in numbers of the compute dtype: input, query, key, value, context and
    attention's output of D, two of the feed-forward width F; the float32 sums before both norms;
    a byte for each dropped number. Attention that drops weights keeps them before and after,
    [heads, L, L]. With rematerialisation a block's input and the inside of one block.
    """
    rows = config.train.batch // config.train.accumulate // math.prod(plan.shards)
    tokens, item = rows * config.data.length, jnp.dtype(model.dtype).itemsize
    block = 6 * item * model.width + 8 * model.width + 2 * item * model.feed_forward_width
    block += 2 * model.width * bool(model.dropout)
    if model.attention_dropout:
        block += model.attention_heads * config.data.length * 2 * item
    blocks = (model.layers * item * model.width + block) if model.remat else model.layers * block
    memory = model.memory
    reads = memory.heads * (memory.top_k * 8 + memory.query_width * (4 + item)
                            + 2 * memory.sub_keys * 4)
    logits = 2 * 4 * model.vocab_size * config.data.max_predictions // config.data.length
    return tokens * (blocks + len(model.memory_layers) * reads + logits)


def gradients(
    given: dict[str, int], config: ml_collections.ConfigDict, model: BertConfig, plan: Plan,
) -> int:
    """Bytes of all gradients on one device, float32: of a table dense, or compact.

    For compact rows every device sorts the reads of the whole part: slots and weights as gathered
    and as sorted, 16 bytes a read.
    """
    dense = given['backbone parameters']
    if not model.memory_layers:
        return dense
    if not plan.sparse:
        return dense + given['value tables']
    reads = config.data.length * model.memory.heads * model.memory.top_k * (
        config.train.batch // config.train.accumulate)
    return dense + 16 * reads + compact_bytes(plan.shards, tables_of(model), reads,
                                              config.train.accumulate)

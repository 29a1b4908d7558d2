"""Every term of a model's operations against XLA's count of its compiled forward pass."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from pkm_jax.memory.layer import MemoryConfig
from pkm_jax.models.bert import BertConfig
from pkm_jax.models.causal import CausalConfig
from pkm_jax.models.interface import abstract_model

LENGTH, BATCH, PREDICTIONS = 64, 2, 16
SIZES = dict(vocab_size=1000, layers=2, width=128, attention_heads=2, feed_forward_width=512,
             max_length=LENGTH, dropout=0., attention_dropout=0.)
MEMORY = MemoryConfig(sub_keys=64, heads=2, top_k=8, query_width=256, query_norm='none')
PLAIN = {'bert': BertConfig(**SIZES), 'causal': CausalConfig(**SIZES)}


def counted(config):
    """Of the whole forward pass, elementwise work and comparisons included."""
    graph, params, rest = nnx.split(
        abstract_model(config), nnx.Param, ...)
    tokens, lengths = jnp.zeros((BATCH, LENGTH), jnp.int32), jnp.full(BATCH, LENGTH)

    def forward(params, rest):
        model = nnx.merge(graph, params, rest)
        if isinstance(config, CausalConfig):
            return model.logits(model(tokens, lengths)[0])
        return model.mlm_logits(model(tokens, tokens, lengths)[0],
                                jnp.zeros((BATCH, PREDICTIONS), jnp.int32))

    return jax.jit(forward).lower(params, rest).compile().cost_analysis()['flops']


def ours(config):
    predictions = LENGTH if isinstance(config, CausalConfig) else PREDICTIONS
    return BATCH * config.forward_flops(LENGTH, predictions)


@pytest.mark.parametrize('family', ['bert', 'causal'])
def test_a_plain_model(family):
    """XLA also counts elementwise work, a few per cent."""
    assert ours(PLAIN[family]) < counted(PLAIN[family]) < 1.1 * ours(PLAIN[family])


@pytest.mark.parametrize('family', ['bert', 'causal'])
@pytest.mark.parametrize('field, more', [
    ('layers', 4), ('width', 256), ('feed_forward_width', 1024), ('vocab_size', 4000)])
def test_what_a_larger_size_adds(family, field, more):
    larger = dataclasses.replace(PLAIN[family], **{field: more})
    added = ours(larger) - ours(PLAIN[family])
    assert added < counted(larger) - counted(PLAIN[family]) < 1.12 * added


@pytest.mark.parametrize('family', ['bert', 'causal'])
@pytest.mark.parametrize('value_width', [0, 384, 64])
@pytest.mark.parametrize('placement', ['add', 'replace'])
def test_what_a_memory_adds(family, value_width, placement):
    """Without its read, which XLA counts once for all of the loop that reads."""
    memory = dataclasses.replace(MEMORY, value_width=value_width)
    config = dataclasses.replace(PLAIN[family], memory=memory, memory_layers=(1,),
                                 placement=placement)
    read = 2 * BATCH * LENGTH * memory.heads * memory.top_k * config.value_width
    products = ours(config) - read
    once = 2 * BATCH * LENGTH * config.value_width
    assert products < counted(config) < 1.1 * products + once
    if value_width:
        without = ours(dataclasses.replace(config, memory=MEMORY)) - read * 128 // value_width
        assert products - without == 2 * BATCH * LENGTH * value_width * 128

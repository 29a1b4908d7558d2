"""What every model has alike."""

import jax
import numpy as np
import pytest
from flax import nnx

from pkm_jax.memory.layer import MemoryConfig
from pkm_jax.models.bert import BertConfig
from pkm_jax.models.causal import CausalConfig
from pkm_jax.models.interface import TracedRngs

SIZES = dict(vocab_size=12, layers=2, width=8, attention_heads=2, feed_forward_width=12,
             max_length=6, memory_layers=(1,), placement='add',
             memory=MemoryConfig(sub_keys=4, heads=2, top_k=2, query_width=4))


@pytest.mark.parametrize('config', [BertConfig(**SIZES), CausalConfig(**SIZES)])
def test_a_model_built_while_traced_has_the_parameters_of_one_that_is_not(config):
    def params(rngs):
        return nnx.to_pure_dict(nnx.state(config.build(rngs), nnx.Param))

    jax.tree.map(np.testing.assert_array_equal,
                 jax.jit(lambda key: params(TracedRngs(key)))(jax.random.key(3)),
                 jax.jit(lambda: params(nnx.Rngs(3)))())

"""Weights written as checkpoints so that training reads them; read without reading all."""

import jax
import numpy as np
from flax import nnx

from pkm_jax.checkpoints import arrays
from pkm_jax.checkpoints.store import newest, read_weights
from pkm_jax.memory.layer import MemoryConfig
from pkm_jax.models.bert import BertConfig
from pkm_jax.models.interface import flatten

SMALL = BertConfig(
    vocab_size=30, layers=3, width=8, attention_heads=2, feed_forward_width=12, max_length=9,
    memory=MemoryConfig(sub_keys=4, heads=2, top_k=3, query_width=4), memory_layers=(1,),
    placement='add')


def test_training_reads_what_is_written_and_slices_are_read_alone(tmp_path):
    model, random = SMALL.build(nnx.Rngs(0)), np.random.default_rng(0)
    written = {stored: jax.tree.map(
        lambda leaf: random.normal(size=leaf.shape).astype(leaf.dtype),
        nnx.to_pure_dict(nnx.state(model, kind)))
        for stored, kind in (('params', nnx.Param), ('statistics', nnx.BatchStat))}
    arrays.write(tmp_path / 'checkpoints', written)
    found = arrays.open_model(newest(tmp_path))
    by_training = read_weights(newest(tmp_path))
    assert by_training.keys() == flatten(written).keys() == flatten(found).keys()
    for path, array in flatten(written).items():
        stored = flatten(found)[path]
        assert stored.shape == array.shape and stored.dtype == array.dtype
        np.testing.assert_array_equal(by_training[path], array)
        np.testing.assert_array_equal(np.asarray(stored), array)
        np.testing.assert_array_equal(stored[1:2], array[1:2])

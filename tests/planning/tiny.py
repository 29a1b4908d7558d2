"""The tiny run that planning is tested with."""

import importlib.util
import os

import ml_collections
import pytest

from pkm_jax.configuration.resolve import runs_of
from pkm_jax.configuration.run import Run

needs_tpu_compiler = pytest.mark.skipif(
    importlib.util.find_spec('libtpu') is None and 'TPU_LIBRARY_PATH' not in os.environ,
    reason="the TPU compiler is not installed: pip install 'jax[tpu]'")
SLOTS, WIDTH = 64, 128


def shrunk(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """One layer, its memory split by rows and by columns, no text."""
    config.model.update(layers=1, width=WIDTH, attention_heads=1, feed_forward_width=48,
                        dropout=0., attention_dropout=0.)
    config.memory.update(layers=(0,), sub_keys=8, top_k=2, updates='sparse')
    config.memory.shards.update(rows=2, columns=2)
    config.data.update(corpus='', vocab_size=128)
    return config


def run_of(config: ml_collections.ConfigDict) -> Run:
    """The only run of a configuration."""
    run, = runs_of(config)
    return run

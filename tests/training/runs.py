"""Runs of a configuration, as the entry point takes them."""

from pathlib import Path

import jax
import ml_collections

from pkm_jax.configuration.resolve import runs_of
from pkm_jax.training import loop
from pkm_jax.training.layout import lay_out


def train(config: ml_collections.ConfigDict) -> Path:
    """Trains the only run of a configuration over all devices; returns its folder."""
    run, = runs_of(config)
    return loop.train(run, lay_out(run, jax.device_count(), jax.process_count()))

"""Runs of a configuration, as the entry point takes them; and what ends one like a kill."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ml_collections
import pytest

from pkm_jax.configuration.resolve import runs_of
from pkm_jax.data.loader import BatchStream
from pkm_jax.training import loop
from pkm_jax.training.layout import lay_out_here


class Killed(Exception):
    """The run ends as if its process had been killed."""


def train(config: ml_collections.ConfigDict) -> Path:
    """Trains the only run of a configuration over all devices; returns its folder."""
    run, = runs_of(config)
    return loop.train(run, lay_out_here(run))


@contextmanager
def killed_after(batches: int) -> Iterator[None]:
    """What is trained within takes so many batches, and is Killed when it asks for the next."""
    real, taken = BatchStream.__next__, iter(range(batches))

    def limited(stream):
        if next(taken, None) is None:
            raise Killed
        return real(stream)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(BatchStream, '__next__', limited)
        yield

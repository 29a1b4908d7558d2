"""Several processes, one program: each computes on its devices, the first one writes."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from pkm_jax.configuration.run import Distributed

SILENT = 30     # seconds without a sign of life after which a process is taken for dead


def join(distributed: Distributed) -> None:
    """Connects this process with the others, if configured; before anything else asks for devices.

    On TPU pods, Slurm and the like the addresses are found; elsewhere the configuration gives them.

    Raises:
      ValueError, RuntimeError: they are not found, or the others are not reached.
    """
    if distributed.enabled:
        jax.config.update('jax_enable_preemption_service', False)   # preemption.py hears signals
        jax.distributed.initialize(
            distributed.coordinator or None,
            distributed.processes or None,
            distributed.process if distributed.process >= 0 else None,
            heartbeat_timeout_seconds=SILENT)


@contextmanager
def first_process_first(what: str) -> Iterator[None]:
    """The first process does what follows before the others do, and find it done."""
    if jax.process_index() > 0:
        multihost_utils.sync_global_devices(what)
    yield
    if jax.process_index() == 0:
        multihost_utils.sync_global_devices(what)


def all_say(mine: Any) -> list[Any]:
    """What each process says, JSON-able, in their order: the same list for all, who all call it."""
    if jax.process_count() == 1:
        return [json.loads(json.dumps(mine))]
    text = np.frombuffer(json.dumps(mine).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.int32(len(text)))
    padded = np.pad(text, (0, int(lengths.max()) - len(text)))
    return [json.loads(row[:length].tobytes())
            for row, length in zip(multihost_utils.process_allgather(padded), lengths)]

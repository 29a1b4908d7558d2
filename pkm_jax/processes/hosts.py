"""Several processes, one program: each computes on its devices, the first one writes."""

import json
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from pkm_jax.configuration.run import Distributed

LINGER = 30     # seconds that a failed process may take to end


def join(distributed: Distributed) -> None:
    """Connects this process with the others, if configured; before anything else asks for devices.

    On TPU pods, Slurm and the like the addresses are found; elsewhere the configuration gives them.
    One that is silent for `distributed.heartbeat_timeout` seconds is taken for dead: JAX ends the
    others, saying its number.
    Where not all have begun within `distributed.initialization_timeout` seconds it ends those that
    have.

    Raises:
      ValueError, RuntimeError: they are not found.
    """
    if distributed.enabled:
        jax.config.update('jax_enable_preemption_service', False)   # preemption.py hears signals
        jax.distributed.initialize(
            distributed.coordinator or None,
            distributed.processes or None,
            distributed.process if distributed.process >= 0 else None,
            initialization_timeout=distributed.initialization_timeout,
            heartbeat_timeout_seconds=distributed.heartbeat_timeout)
        # JAX calls one that dies by its number.
        print(f'process {jax.process_index()} of {jax.process_count()}: {socket.gethostname()}, '
              f'pid {os.getpid()}', flush=True)


def end_soon(status: int) -> None:
    """Ends this process after LINGER seconds, should it not have ended before; for one that fails
    beside others.

    On its way out JAX waits for the others, minutes long, and they may be waiting for it. Once it
    has ended they miss its signs of life.
    """
    if jax.distributed.is_initialized():
        ending = threading.Timer(LINGER, os._exit, (status,))
        ending.daemon = True
        ending.start()


def say(text: str) -> None:
    """Prints what all processes would print alike: the first one does."""
    if jax.process_index() == 0:
        print(text, flush=True)


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

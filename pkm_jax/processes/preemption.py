"""A run that is asked to stop does so between two steps: all its processes at the same one."""

import os
import signal
import time
from types import FrameType

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

# What clusters, terminals (Ctrl-C, or closed) and Slurm's --signal=USR1 send.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
ONE_REQUEST = 1.    # seconds: launchers signal a process directly and through its parent


class Stopped(Exception):
    """A run has stopped because a signal asked for it, and what it needs to go on is written.

    `status` is what its process should exit with: 143 after SIGTERM, 130 after Ctrl-C, as a shell
    reports processes that these signals end.
    """

    def __init__(self, number: int, step: int):
        super().__init__(f'stopped after step {step:,} by {signal.Signals(number).name}; its '
                         f'checkpoint is written, and the same command goes on from there')
        self.status = 128 + number


class StopRequests:
    """Hears the first of SIGNALS while it is entered; a second one ends the process.

    docs/design.md says why JAX's own preemption service is not used.
    """

    def __init__(self, mesh: Mesh):
        self.heard, self._heard_at = 0, 0.
        self._one_a_device = NamedSharding(mesh, P(mesh.axis_names))
        self._greatest = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, P()))
        self._asked: jax.Array | None = None

    def __enter__(self) -> 'StopRequests':
        self._before = {number: signal.signal(number, self._hear) for number in SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler or signal.SIG_DFL)    # None: one not of Python's

    def _hear(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if not self.heard:
            self.heard, self._heard_at = number, now
            # Not by print(), which the signal may have interrupted.
            os.write(2, b'\nstopping after the steps under way; once more to stop at once\n')
        elif now - self._heard_at > ONE_REQUEST:
            self.__exit__()
            signal.raise_signal(number)

    def agreed(self) -> int:
        """The signal that asks all processes to stop now, or 0; to be called after every step.

        Each process says what it has heard, and reads what all had said after the step before: the
        same for all, and known by now, so that the devices are not left waiting.
        """
        before = self._asked
        heard = np.full(len(self._one_a_device.addressable_devices), self.heard, np.int32)
        self._asked = self._greatest(
            jax.make_array_from_process_local_data(self._one_a_device, heard))
        return 0 if before is None else int(before)

"""Of several processes one is killed: the others stop within a stated time, and say which."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pkm_jax.configuration.run import Distributed
from tests.processes.started import ROOT, finish, start, wait_for_step
from tests.processes.test_preemption import assert_same_run

SOON = Distributed().heartbeat_timeout + 15    # seconds, of which JAX looks every few


def names(output, process):
    """Whether JAX says which process is gone."""
    return re.search(rf'stopped sending heartbeats\):\s+{process}\b', output)


@pytest.mark.slow
@pytest.mark.parametrize('processes, victim', [(2, 1), (2, 0), (4, 2)])
def test_the_others_stop_and_the_next_start_goes_on(config, tmp_path, processes, victim):
    config.train.steps = 60
    config.log.update(every=1, eval_every=60, checkpoint_every=10)
    config.workdir = str(tmp_path / 'killed')
    started = start(config, processes)
    wait_for_step(Path(config.workdir), 25, started)
    started[victim].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    started[victim].communicate()       # a launcher asks too: it is no zombie
    others = [process for process in started if process is not started[victim]]
    printed = [process.communicate(timeout=300)[0] for process in others]
    assert time.monotonic() - killed < SOON
    for process, output in zip(others, printed):
        assert process.returncode not in (0, None)
        # In the first process is the service that the others give signs of life to.
        assert names(output, victim) if victim else 'coordination service' in output, output[-9000:]
    finish(start(config, processes))
    config.workdir = str(tmp_path / 'straight')
    finish(start(config, processes))
    assert_same_run(tmp_path / 'killed', tmp_path / 'straight', 'train', 'eval')


ALONE = """
import sys
from pkm_jax.configuration.run import Distributed
from pkm_jax.processes import hosts
hosts.join(Distributed(True, f'127.0.0.1:{sys.argv[1]}', 2, int(sys.argv[2]), 3))
"""


@pytest.mark.slow
@pytest.mark.parametrize('index', [0, 1])
def test_who_waits_for_one_that_never_begins_ends(index):
    """As one does that was killed before it had met the others; aborted by JAX."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    began = time.monotonic()
    ran = subprocess.run([sys.executable, '-c', ALONE, str(port), str(index)], cwd=ROOT, text=True,
                         env={**os.environ, 'PYTHONPATH': str(ROOT)}, capture_output=True, check=False)
    assert ran.returncode == -signal.SIGABRT and 'DEADLINE_EXCEEDED' in ran.stderr, ran.stderr
    assert time.monotonic() - began < 60


FAILS = """
import sys, time
from pkm_jax.configuration.run import Distributed
from pkm_jax.processes import hosts
hosts.LINGER, index = 5, int(sys.argv[2])
hosts.join(Distributed(True, f'127.0.0.1:{sys.argv[1]}', 2, index, heartbeat_timeout=5))
if index == 0:
    time.sleep(100)     # as in a collective
hosts.end_soon(7)
raise ValueError('mine')
"""


@pytest.mark.slow
def test_one_that_fails_does_not_wait_for_those_that_wait_for_it():
    """Left to JAX, it would wait for 5 minutes, and the others with it."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = str(free.getsockname()[1])
    started = [subprocess.Popen([sys.executable, '-c', FAILS, port, str(index)], cwd=ROOT, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                env={**os.environ, 'PYTHONPATH': str(ROOT)}) for index in (0, 1)]
    began = time.monotonic()
    waiting, failed = (process.communicate(timeout=90)[0] for process in started)
    assert time.monotonic() - began < 60
    assert started[1].returncode == 7 and 'ValueError: mine' in failed
    assert started[0].returncode not in (0, None) and names(waiting, 1)

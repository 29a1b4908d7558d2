"""Runs that are asked to stop: all processes at one step, and nothing of the run is lost."""

import itertools
import os
import signal
from pathlib import Path

import numpy as np
import pytest

from pkm_jax.checkpoints import store
from pkm_jax.mesh import Shards, make_mesh
from pkm_jax.processes import preemption
from pkm_jax.processes.preemption import Stopped, StopRequests
from pkm_jax.training import loop
from tests.processes.started import finish, lines, start, wait_for_step
from tests.training.runs import train

SIGNALS = signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1


@pytest.fixture
def reached():
    """The signals that got past, to the handlers of before."""
    signals = []
    before = {number: signal.signal(number, lambda number, _: signals.append(number))
              for number in SIGNALS}
    yield signals
    for number, handler in before.items():
        signal.signal(number, handler)


def assert_same_run(folder, other, *kinds):
    one, two = (store.read_weights(store.newest(run)) for run in (folder, other))
    assert one.keys() == two.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], two[name], err_msg=name)
    assert lines(folder, *kinds) == lines(other, *kinds)


@pytest.mark.parametrize('number', SIGNALS)
def test_the_first_signal_is_heard_and_the_next_acts_as_before(reached, monkeypatch, number):
    with StopRequests(make_mesh(Shards(2, 2, 2))) as requests:
        assert [requests.agreed() for _ in range(3)] == [0, 0, 0]
        signal.raise_signal(number)
        assert [requests.agreed(), requests.agreed()] == [0, number]    # said, then read
        signal.raise_signal(number)
        assert reached == []                    # delivered twice is one request
        monkeypatch.setattr(preemption, 'ONE_REQUEST', 0)
        signal.raise_signal(number)
        assert reached == [number]
    signal.raise_signal(number)
    assert reached == [number, number]


@pytest.mark.slow     # tests/faults, which are not, stop runs by SIGTERM too
@pytest.mark.parametrize('workers', [0, 2])
def test_a_stopped_run_goes_on_as_if_it_had_not_been(config, monkeypatch, tmp_path, workers):
    """Metrics too: every line, as each is of one step."""
    config.log.every = 1
    straight = train(config)
    config.workdir, config.data.workers = str(tmp_path / 'stopped'), workers
    real, batches = loop.loader.BatchStream.__next__, itertools.count(1)

    def signalled(self):
        if next(batches) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self)

    with monkeypatch.context() as patch:
        patch.setattr(loop.loader.BatchStream, '__next__', signalled)
        with pytest.raises(Stopped, match='after step 4 by SIGTERM') as stopped:
            train(config)
    assert stopped.value.status == 143
    assert store.newest(tmp_path / 'stopped').name == '4'
    assert_same_run(train(config), straight, 'start', 'train', 'eval')


@pytest.mark.slow
def test_a_signal_during_the_last_step_stops_before_another_run(config, monkeypatch):
    config.log.eval_every = config.train.steps
    real = loop.save_counts

    def signalled(*arguments):      # by the evaluation after the last step
        signal.raise_signal(signal.SIGINT)
        real(*arguments)

    monkeypatch.setattr(loop, 'save_counts', signalled)
    with pytest.raises(Stopped, match='after step 6 by SIGINT') as stopped:
        train(config)
    assert stopped.value.status == 130
    assert store.newest(Path(config.workdir)).name == '6'


@pytest.mark.slow
@pytest.mark.parametrize('processes', [1, 2])
def test_processes_stop_together_and_go_on(config, tmp_path, processes):
    """Only the last one is signalled; all stop at the same step, and the same command goes on."""
    config.train.steps = 80
    config.log.update(every=1, eval_every=40, checkpoint_every=1000)
    finish(start(config, processes))
    straight = Path(config.workdir)
    config.workdir = str(tmp_path / 'stopped')
    started = start(config, processes)
    wait_for_step(Path(config.workdir), 10, started)
    started[-1].send_signal(signal.SIGTERM)
    printed = finish(started, status=143)
    step = int(store.newest(Path(config.workdir)).name)
    assert 10 < step < 80
    for output in printed:
        assert f'stopped after step {step} by SIGTERM' in output
    assert sum('once more to stop at once' in output for output in printed) == 1
    finish(start(config, processes))
    assert_same_run(Path(config.workdir), straight, 'start', 'train', 'eval')

"""A run that hangs says where; one that is slow, or pauses, does not."""

import itertools
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pkm_jax.processes import watch
from pkm_jax.processes.watch import Watch
from pkm_jax.refusal import ExitStatus
from pkm_jax.training import loop
from tests.training.runs import train


@pytest.fixture
def quick(monkeypatch):
    for name, seconds in (('LEAST', .3), ('BEFORE_FIRST', .6), ('LEAST_APART', 2.),
                          ('PERIOD', .02)):
        monkeypatch.setattr(watch, name, seconds)


def stacks(folder):
    return [path.read_text() for path in folder.glob('stacks-*.txt')]


def hang_here(seconds):
    time.sleep(seconds)


def test_a_step_that_hangs_is_said_once_with_all_stacks(quick, tmp_path, capfd):
    with Watch(tmp_path, 3) as watched:
        for _ in range(5):
            watched.step_done()
        hang_here(1.)
        said, = stacks(tmp_path)
        assert said.count('No progress for') == 1 and 'in a step; steps took 0.00 s' in said
        assert 'hang_here' in said and said.count('hread 0x') >= 2
        assert (tmp_path / 'stacks-3.txt').exists()
        watched.step_done()
        hang_here(.6)                   # another hang is said anew
    assert stacks(tmp_path)[0].count('No progress for') == 2
    assert 'hang_here' in capfd.readouterr().err


def test_the_loader_is_named(quick, tmp_path):
    with Watch(tmp_path) as watched, watched.waiting_for('the loader'):
        hang_here(1.)
    assert 'in the loader; the first' in stacks(tmp_path)[0]


def test_slow_peers_pauses_and_the_first_step_are_no_hang(quick, tmp_path):
    with Watch(tmp_path) as watched:
        hang_here(.4)                   # the first step
        watched.step_done()
        hang_here(.5)                   # more than LEAST, less than 20 × the median
        watched.step_done()
        with watched.apart('an evaluation'):
            hang_here(1.5)
        hang_here(.1)
    assert not stacks(tmp_path)


def test_an_evaluation_that_hangs_is_said_by_a_limit_of_its_own(quick, monkeypatch, tmp_path):
    monkeypatch.setattr(watch, 'LEAST_APART', .6)
    with Watch(tmp_path) as watched:
        for seconds in .1, .4, .8:      # .8: less than 20 × the longest
            with watched.apart('an evaluation'):
                hang_here(seconds)
        watched.step_done()
        assert not stacks(tmp_path)
        with watched.apart('a save'):
            hang_here(1.)
        said, = stacks(tmp_path)
        assert 'in a save; the first' in said and 'hang_here' in said
        watched.step_done()
        hang_here(.6)                   # steps are watched again, by their own limit
    assert 'in a step; steps took' in stacks(tmp_path)[0]
    monkeypatch.setattr(watch, 'PEERS', 2)
    with Watch(tmp_path / 'other') as watched:
        (tmp_path / 'other').mkdir()
        for seconds in .2, .9:
            with watched.apart('an evaluation'):
                hang_here(seconds)
    assert 'in an evaluation; the longest before took 0.2' in stacks(tmp_path / 'other')[0]


def test_it_ends_a_process_that_asks_for_it(tmp_path):
    program = ('import time; from pathlib import Path; from pkm_jax.processes import watch; '
               'watch.BEFORE_FIRST = watch.PERIOD = .1; '
               f'watch.Watch(Path({str(tmp_path)!r}), exits=True).__enter__(); time.sleep(60)')
    done = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True,
                          timeout=30, cwd=Path(__file__).parents[2])
    assert done.returncode == ExitStatus.HUNG and 'No progress' in done.stderr and stacks(tmp_path)


@pytest.mark.slow
def test_a_run_whose_loader_delivers_nothing_is_reported(config, monkeypatch, capfd):
    monkeypatch.setattr(watch, 'LEAST', .5)
    monkeypatch.setattr(watch, 'PEERS', 0)
    monkeypatch.setattr(watch, 'PERIOD', .05)
    real, batches = loop.loader.BatchStream.__next__, itertools.count(1)

    def stuck(stream):
        if next(batches) == 5:
            hang_here(1.5)
        return real(stream)

    monkeypatch.setattr(loop.loader.BatchStream, '__next__', stuck)
    folder = train(config)
    said, = stacks(folder)
    assert 'in the loader, which makes batches' in said and 'hang_here' in said
    assert 'hang_here' in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize('place, name, what', [
    (loop, 'evaluate', 'in an evaluation; '), (loop.Checkpoints, 'save', 'in a save; ')])
def test_a_run_that_hangs_outside_its_steps_is_reported(place, name, what, config, monkeypatch):
    for limit, seconds in (('LEAST', 100.), ('LEAST_APART', .5), ('PEERS', 0), ('PERIOD', .05)):
        monkeypatch.setattr(watch, limit, seconds)
    real = getattr(place, name)

    def stuck(*arguments, **others):
        hang_here(1.)
        return real(*arguments, **others)

    monkeypatch.setattr(place, name, stuck)
    said, = stacks(train(config))
    assert f's, {what}' in said and 'hang_here' in said

"""Runs with steps that are not finite: skipped, counted, and stopped where they do not end."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from pkm_jax import replay
from pkm_jax.checkpoints import store
from pkm_jax.configuration import resolve
from pkm_jax.training import loop
from pkm_jax.training.divergence import Diverged, Skips
from tests.training.runs import train
from tests.training.test_loop import lines, weights


def spoil(monkeypatch, batches):
    """Makes the batches of these numbers, from 1, have no finite loss, each time that they are read."""
    stream = loop.loader.BatchStream
    real, real_at = stream.__next__, stream.at

    def spoilt(batch, number):
        if number in batches:
            batch['mlm_weights'] = batch['mlm_weights'] * np.float32(np.nan)
        return batch

    def at(stream, number):
        batch, *records = real_at(stream, number)
        return spoilt(batch, number + 1), *records

    monkeypatch.setattr(stream, '__next__', lambda stream: spoilt(
        real(stream), stream.get_state()['batches']))
    monkeypatch.setattr(stream, 'at', at)


@pytest.mark.parametrize('updates', ['dense', pytest.param('sparse', marks=pytest.mark.slow)])
def test_bad_steps_are_skipped_and_counted(config, monkeypatch, updates, capsys):
    config.memory.updates = updates
    spoil(monkeypatch, (3, 4, 5))
    folder = train(config)
    kept = weights(folder)
    assert all(np.isfinite(array).all() for array in kept.values())
    assert [(line['step'], line['skipped']) for line in lines(folder, 'train')] == [(2, 0), (6, 0)]
    assert [(line['step'], line['skipped']) for line in lines(folder, 'skipped')] == [
        (3, 1), (4, 1), (5, 1)]
    assert all(np.isfinite(line['loss']) for line in lines(folder, 'train'))
    assert '1 of 1 steps up to 3 skipped: step 3 gave the loss nan' in capsys.readouterr().out
    # That of step 3 had to wait: the steps went on being skipped.
    assert [int(path.name) for path in (folder / 'checkpoints').iterdir()] == [6]


def test_a_run_that_diverges_stops_with_what_was_good(config):
    config.train.update(learning_rate=1e30, values_learning_rate=1e30, clip=0., warmup=4, steps=20,
                        max_skipped_steps=3)
    config.log.update(every=5, checkpoint_every=2, eval_every=50, keep=2)
    with pytest.raises(Diverged, match='steps in a row were skipped .*step 3 gave the loss'):
        train(config)
    folder = Path(config.workdir)
    assert store.newest(folder).name == '2'
    assert all(np.isfinite(array).all() for array in weights(folder).values())
    assert all(np.isfinite(line['loss']) for line in lines(folder, 'train'))


@pytest.mark.slow
def test_what_diverged_is_kept_to_be_replayed(config, monkeypatch, tmp_path):
    """The state before the first bad step, as a run that stops there has it, and its batch."""
    config.train.max_skipped_steps = 2
    config.log.update(every=3, checkpoint_every=6)
    spoil(monkeypatch, (4, 5, 6, 7))
    config.train.steps, config.log.eval_every = 12, 12
    with pytest.raises(Diverged, match=r'step 4 gave the loss nan.* values nan.*pkm_jax.replay'):
        train(config)
    kept = Path(config.workdir) / 'diverged'
    assert store.newest(kept).name == '3'
    told = json.loads((kept / 'diagnosis.json').read_text())
    assert told['step'] == 4 and np.isnan(told['norms']['grad_norm']['values'])
    told = replay.replay(resolve.runs_of(config)[0])
    assert 'step 4 gave the loss nan' in told and 'invalid value (nan) encountered' in told
    ours = weights(kept)
    config.update(workdir=str(tmp_path / 'until_then'))
    config.log.checkpoint_every = 3
    with pytest.raises(Diverged):
        train(config)
    theirs = weights(Path(config.workdir))
    assert store.newest(Path(config.workdir)).name == '3' and ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
    seen = {}
    real = loop.to_devices

    def note(batch, mesh):
        seen[len(seen) + 1] = batch
        return real(batch, mesh)

    monkeypatch.setattr(loop, 'to_devices', note)
    config.update(workdir=str(tmp_path / 'noted'))
    with pytest.raises(Diverged):
        train(config)
    with np.load(kept / 'batch-0.npz') as batch:
        assert set(batch['epochs']) == {0} and len(set(batch['records'])) == config.train.batch
        np.testing.assert_array_equal(batch['tokens'], seen[4]['tokens'])
        np.testing.assert_array_equal(batch['mlm_labels'], seen[4]['mlm_labels'])


def test_skips_are_counted_once_and_end_with_a_step_that_is_taken():
    skips, bad, good = Skips(), {'skipped': 1}, {'skipped': 0}
    skips.see(1, [good, bad, bad])
    assert (skips.in_a_row, skips.first[0]) == (2, 2)
    skips.see(2, [bad, bad, bad])       # two were seen
    assert (skips.in_a_row, skips.first[0]) == (3, 2)
    skips.see(5, [good])
    assert skips.in_a_row == 0
    skips.see(6, itertools.repeat(bad, 3))
    assert (skips.in_a_row, skips.first[0]) == (3, 6)

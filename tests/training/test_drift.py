"""Drift during training: kept at each evaluation, the same where a run was killed."""

import json

import numpy as np
import pytest

from pkm_jax.configuration.resolve import runs_of
from pkm_jax.refusal import Refusal
from pkm_jax.training import loop
from pkm_jax.training.layout import lay_out_here
from pkm_jax.training.refresh import _best_step, refresh
from tests.training.runs import killed_after, train

pytestmark = pytest.mark.usefixtures('compile_once')


def evaluations(folder):
    lines = map(json.loads, (folder / 'metrics.jsonl').read_text().splitlines())
    return [line['memory']['1'] for line in lines if line['kind'] == 'eval']


@pytest.mark.slow
def test_a_run_tells_the_drift_of_its_slots_and_a_resumed_one_the_same(config, tmp_path):
    config.memory.update(drift_tokens=40, sub_keys=12, top_k=1, heads=1)
    config.log.eval_at_start = True
    config.train.learning_rate = .1
    straight = train(config)
    found = evaluations(straight)
    assert [one['drift'] for one in found[:1]] == [0] and found[-1]['drift'] > 0
    slots = np.load(straight / 'slot_drift_1.npy')
    assert slots.shape == (144,) and found[-1]['drift'] == pytest.approx(slots.mean())
    assert found[-1]['outdated'] == np.mean(slots > .5)
    scores = np.load(straight / 'scores/1-3.npy')
    assert scores.shape == (40, 1, 2, 12)

    config.workdir = str(tmp_path / 'killed')
    with killed_after(5):
        train(config)
    killed = train(config)
    assert evaluations(killed) == found
    np.testing.assert_array_equal(np.load(killed / 'slot_drift_1.npy'), slots)


def test_drift_needs_to_know_when_slots_were_read(config):
    config.memory.update(drift_tokens=40, dead_after=0)
    with pytest.raises(Refusal, match='Set memory.dead_after'):
        train(config)


@pytest.mark.slow
def test_refreshing_values_takes_off_loss_and_zeros_add_to_it(config, tmp_path):
    """What the slots took off adds up to the fall, here of a loss that is near quadratic; with zeros
    for values the loss is that of a model without the memory."""
    config.memory.update(drift_tokens=40)
    config.train.learning_rate = .003
    run, = runs_of(config)
    layout = lay_out_here(run)
    folder = loop.train(run, layout)
    found = refresh(run, layout, batches=20)
    last = [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()][-1]
    assert found['before'] == pytest.approx(last['loss'], rel=1e-5)
    fall = found['before'] - found['after']
    assert found['step'] > 0 and fall > .01
    slots = np.load(folder / 'slot_fall_1.npy')
    assert slots.shape == (36,)
    assert found['memories']['1']['fall'] == pytest.approx(slots.sum()) == pytest.approx(fall, rel=.1)
    outdated = np.load(folder / 'slot_drift_1.npy') > .5
    assert found['memories']['1']['outdated'] == pytest.approx(slots[outdated].sum(), abs=1e-7)
    assert found['memories']['1']['rise'] == found['rise'] > 0

    config.init_from, config.workdir = str(folder), str(tmp_path / 'plain')     # of the same weights
    config.memory.update(placement='none', layers=(), drift_tokens=0, dead_after=0)
    config.log.eval_at_start = True
    lines = map(json.loads, (train(config) / 'metrics.jsonl').read_text().splitlines())
    unread = next(line['loss'] for line in lines if line['kind'] == 'eval')
    assert found['rise'] == pytest.approx(unread - found['before'], rel=1e-3, abs=1e-5)


def test_the_step_is_where_the_loss_is_least():
    assert _best_step(lambda step: (step - 3) ** 2) == 2    # 1 there, and at 4, which is later
    assert _best_step(lambda step: 9 + step) == 0

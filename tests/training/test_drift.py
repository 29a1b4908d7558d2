"""Drift during training: kept at each evaluation, the same where a run was killed."""

import json

import numpy as np
import pytest

from pkm_jax.refusal import Refusal
from pkm_jax.training import loop
from tests.training.runs import train

pytestmark = pytest.mark.usefixtures('compile_once')


def evaluations(folder):
    lines = map(json.loads, (folder / 'metrics.jsonl').read_text().splitlines())
    return [line['memory']['1'] for line in lines if line['kind'] == 'eval']


def test_a_run_tells_the_drift_of_its_slots_and_a_resumed_one_the_same(config, tmp_path, monkeypatch):
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

    taken, real = iter(range(5)), loop.loader.BatchStream.__next__

    def limited(stream):
        if next(taken, None) is None:
            raise InterruptedError
        return real(stream)

    config.workdir = str(tmp_path / 'killed')
    with monkeypatch.context() as patch:
        patch.setattr(loop.loader.BatchStream, '__next__', limited)
        with pytest.raises(InterruptedError):
            train(config)
    killed = train(config)
    assert evaluations(killed) == found
    np.testing.assert_array_equal(np.load(killed / 'slot_drift_1.npy'), slots)


def test_drift_needs_to_know_when_slots_were_read(config):
    config.memory.update(drift_tokens=40, dead_after=0)
    with pytest.raises(Refusal, match='Set memory.dead_after'):
        train(config)

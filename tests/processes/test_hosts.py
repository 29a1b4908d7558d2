"""A run by 2 and by 4 processes of this machine against the same run by one."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from pkm_jax.checkpoints import store
from pkm_jax.configuration.run import Distributed
from pkm_jax.processes import hosts
from tests.processes.started import finish, start
from tests.training.runs import train


def results(folder):
    lines = map(json.loads, (folder / 'metrics.jsonl').read_text().splitlines())
    stored = store.read_weights(store.newest(folder))
    return ({name: np.asarray(array) for name, array in stored.items()},
            [line for line in lines if line['kind'] == 'eval'])


@pytest.mark.slow
@pytest.mark.parametrize('processes, rows, columns', [(2, 2, 2), (4, 1, 4)])
def test_several_processes_train_the_model_of_one(config, tmp_path, processes, rows, columns):
    """Sparse updates, with dropout; tables in parts on several hosts."""
    config.model.update(dropout=0.1, attention_dropout=0.1)
    config.memory.updates = 'sparse'
    config.memory.shards.update(rows=rows, columns=columns)
    config.train.steps = 6
    alone = train(config)
    weights, evaluations = results(alone)
    config.workdir = str(tmp_path / 'several')
    printed = finish(start(config, processes))
    ours, same = results(Path(config.workdir))
    assert ours.keys() == weights.keys()
    for name, array in ours.items():
        np.testing.assert_allclose(array, weights[name], atol=2e-5, err_msg=name)
    for line, other in zip(same, evaluations, strict=True):
        np.testing.assert_allclose(line['loss'], other['loss'], rtol=1e-5)
        assert line['memory']['1']['dead'] == pytest.approx(other['memory']['1']['dead'])
    assert sum('step 6/6' in output for output in printed) == 1     # one writes
    counts, whole = (np.load(Path(folder) / 'slot_counts_1.npz') for folder in (config.workdir, alone))
    assert counts['count'].shape == whole['count'].shape
    assert counts['count'].sum() == whole['count'].sum() > 0


@pytest.mark.slow
def test_processes_agree_on_which_checkpoint_is_damaged(config, tmp_path):
    """Each reads a share of the files; one of them finds the damage."""
    config.train.steps = 6
    finish(start(config, 2))
    folder = Path(config.workdir)
    weights, _ = results(folder)
    path = max((folder / 'checkpoints/6').rglob('ocdbt.process_1/d/*'),
               key=lambda path: path.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 8
    path.write_bytes(content)
    for output in finish(start(config, 2)):
        assert f'{path.relative_to(folder / "checkpoints/6")} is not what was written' in output
    assert sorted(path.name for path in (folder / 'checkpoints').iterdir()) == [
        '3', '6', 'damaged-6']
    for name, array in results(folder)[0].items():
        np.testing.assert_array_equal(array, weights[name], err_msg=name)


def test_one_process_joins_nobody():
    hosts.join(Distributed())
    assert jax.process_count() == 1


def test_a_coordinator_that_is_missing_is_an_error():
    several = Distributed(enabled=True, processes=2, process=1)
    with pytest.raises((ValueError, RuntimeError), match='[Cc]oordinator|before any JAX'):
        hosts.join(several)

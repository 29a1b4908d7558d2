"""SIGKILL at any moment of an asynchronous save costs nothing that was finished."""

import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from pkm_jax.checkpoints import checksums
from pkm_jax.checkpoints.store import Checkpoints
from tests.checkpoints.test_damage import tiny

SAVES_FOR_EVER = '''
import itertools, pathlib, sys
from pkm_jax.checkpoints.store import Checkpoints
from tests.checkpoints.test_damage import PROGRESS, tiny

checkpoints = Checkpoints(pathlib.Path(sys.argv[1]), 1)
newest = checkpoints.newest()
for step in itertools.count(newest[0] + 1 if newest else 1):
    checkpoints.save(tiny(step), PROGRESS | {'step': step})
    if step > 1:
        print(step - 1, flush=True)     # finished
'''


@pytest.mark.parametrize('kills', [2, pytest.param(50, marks=pytest.mark.slow)])
def test_kills_while_saving(tmp_path, kills):
    """The newest that was finished, or one begun since, is there and whole; others never are
    believed. A single one is kept, so that each is deleted while the next is written."""
    random = np.random.default_rng(0)
    for _ in range(kills):
        saving = subprocess.Popen([sys.executable, '-c', SAVES_FOR_EVER, str(tmp_path)],
                                  stdout=subprocess.PIPE, text=True)
        said = [saving.stdout.readline()]
        time.sleep(random.uniform(0, .3))
        saving.kill()
        said += saving.communicate()[0].splitlines()
        finished = int([line for line in said if line.strip()][-1])
        checkpoints = Checkpoints(tmp_path, 1)
        step, progress = checkpoints.newest()
        state = checkpoints.restore(step, jax.eval_shape(tiny, 0))
        checkpoints.close()
        assert finished <= step == progress['step'] == int(state.step)
        np.testing.assert_array_equal(state.params['table'], float(step))
        for path in tmp_path.iterdir():     # what is left is whole or was never finished
            assert 'tmp' not in path.name and 'deleted' not in path.name
            if path.name.isdigit() and path.name != str(step):
                assert not checksums.damage(path)

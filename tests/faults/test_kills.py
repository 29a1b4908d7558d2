"""A few kills of real runs, a minute or more each; `make test-faults` has the many."""

import math
import subprocess
import sys

import numpy as np
import pytest

from tests.faults.kills import check, killed, tiny


@pytest.mark.parametrize('updates, processes, kills', [
    pytest.param('dense', 1, 1, marks=pytest.mark.slow),
    pytest.param('sparse', 1, 4, marks=pytest.mark.slow),
    pytest.param('sparse', 2, 4, marks=pytest.mark.slow)])
def test_a_killed_run_ends_as_one_never_killed(updates, processes, kills):
    said = check(updates, processes, kills, seed=1)
    assert f' {kills} kills ' in said and 'equal to the bit' in said


@pytest.mark.parametrize('seed', [0, 3])    # to be killed after some steps, before the first
def test_a_run_that_is_through_is_not_started_again(tmp_path, monkeypatch, seed):
    starts = []

    def ends(config, processes):
        starts.append(processes)
        return [subprocess.Popen([sys.executable, '-c', ''], stdout=subprocess.PIPE, text=True)]

    monkeypatch.setattr('tests.faults.kills.start', ends)
    config = tiny(tmp_path / 'run', 'dense', steps=60)
    assert killed(config, 1, 3, math.inf, 600, np.random.default_rng(seed)) == {}
    assert starts == [1]

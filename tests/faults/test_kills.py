"""A few kills of real runs; `make test-faults` has the many."""

import pytest

from tests.faults.kills import check


@pytest.mark.parametrize('updates, processes, kills', [
    ('dense', 1, 1), pytest.param('sparse', 1, 4, marks=pytest.mark.slow),
    pytest.param('sparse', 2, 4, marks=pytest.mark.slow)])
def test_a_killed_run_ends_as_one_never_killed(updates, processes, kills):
    said = check(updates, processes, kills, seed=1)
    assert f' {kills} kills ' in said and 'equal to the bit' in said

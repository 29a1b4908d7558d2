"""Benchmarks of several devices run where there are some."""

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import pytest

from benchmarks import layouts, sharding

ROOT = Path(__file__).parents[1]


def test_the_table_of_layouts_is_the_documented_one():
    """Arithmetic alone: docs/scaling.md, section Layouts by time."""
    assert '\n'.join(layouts.rows()) in (ROOT / 'docs/scaling.md').read_text()


@pytest.mark.slow
def test_sharding_on_two_devices():
    found = subprocess.run(
        [sys.executable, '-m', 'benchmarks.sharding', '--small'], cwd=ROOT, text=True,
        env=os.environ | {'JAX_PLATFORMS': 'cpu', 'JAX_NUM_CPU_DEVICES': '2'},
        capture_output=True, check=True).stdout
    assert len(re.findall(r'\| (?:dense|sparse), \d × \d × \d \| \d\.\de-\d\d \|', found)) == 6
    for model, target in sharding.TARGETS.items():
        assert re.search(rf'\| {re.escape(model)} \| none \| 1 \| 1 × 1 × 1 \(default\) \| '
                         rf'[\d.]+ \| [\d,]+ \| 1.000 \|  \|', found)
        assert re.search(rf'\| {re.escape(model)} \| none \| 2 \| .* \(default\) \| [\d.]+ \| '
                         rf'[\d,]+ \| [\d.]+ \| {target} \|', found)
    assert found.count('| scheduler | 2 |') == 3 and 'failed' not in found


@pytest.fixture
def as_users_have_it():
    """Without conftest.py's strictness, also in threads: the gradient of jax's attention needs it."""
    jax.config.update('jax_numpy_dtype_promotion', 'standard')
    yield
    jax.config.update('jax_numpy_dtype_promotion', 'strict')


@pytest.mark.slow
def test_an_unknown_option_fails_alone(as_users_have_it, monkeypatch, capsys):
    monkeypatch.setattr(sharding, 'OPTIONS', {
        'wrong': {'xla_gpu_no_such': True}, 'right': {'xla_gpu_enable_pipelined_all_reduce': True}})
    with ThreadPoolExecutor() as pool:
        programs = sharding.compiling(sharding.with_options(2, small=True), pool)
    sharding.print_times(programs, small=True)
    lines = capsys.readouterr().out.splitlines()[2:]
    assert "failed: INVALID_ARGUMENT: No such compile option: 'xla_gpu_no_such'" in lines[0]
    assert len(lines) == 6
    assert sum('| wrong | 2 |' in line and 'failed' in line for line in lines) == 3
    assert sum('| right | 2 |' in line and 'failed' not in line for line in lines) == 3

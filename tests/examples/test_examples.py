"""Every example runs as its first lines say, and prints what it is about."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / 'examples'
ROOT = EXAMPLES.parent


def run(name, folder):
    """Lines of its output, and its logs, from another folder than the repository's."""
    ran = subprocess.run(
        [sys.executable, '-W', 'error', str(EXAMPLES / f'{name}.py')], cwd=folder, text=True,
        env={**os.environ, 'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'},
        capture_output=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.splitlines(), ran.stderr


def losses(line):
    """First and last of 'loss 4.15 -> 0.01'."""
    return [float(number) for number in re.search(r'([\d.]+) -> ([\d.]+)', line).groups()]


def test_every_example_is_tested():
    assert {f'test_{path.stem}' for path in EXAMPLES.glob('*.py')} <= globals().keys()


@pytest.mark.slow
def test_transformer(tmp_path):
    lines, logged = run('transformer', tmp_path)
    assert len(lines) == 4
    for kind, (split, whole) in zip(('Auto', 'Explicit'), (lines[:2], lines[2:])):
        assert split.startswith(
            f'{kind} axes, table split over tp: a device has (256, 16) of (256, 32), loss')
        assert whole.startswith(
            f'{kind} axes, table on every device: a device has (256, 32) of (256, 32), loss')
        assert losses(split)[0] == losses(whole)[0] and losses(split)[1] < losses(split)[0] / 2
        assert losses(whole)[1] < losses(whole)[0] / 2
    assert logged.count("A memory under a mesh with the axes ('dp', 'tp')") == 1


@pytest.mark.slow
def test_sparse_updates(tmp_path):
    (line,), _ = run('sparse_updates', tmp_path)
    first, last = losses(line)
    rows, read, changed = map(int, re.search(
        r'of (\d+) rows (\d+) were read, (\d+) changed', line).groups())
    assert last < first / 2 and 0 < changed <= read < rows


def test_sparse_updates_take_at_most_ten_lines():
    lines = (EXAMPLES / 'sparse_updates.py').read_text().splitlines()
    marked = [line for line in lines if line.endswith('  # sparse')]
    is_sparse = re.compile(r'delta\b|SPARSE|REST|loss_of|DiffState|reads|touched\.count|, rows\)|'
                           r'apply_updates\(')
    code = lines[1 + max(n for n, line in enumerate(lines) if line.startswith('from ')):]
    assert list(filter(is_sparse.search, code)) == marked, 'a line is not marked'
    assert len(marked) <= 10


def test_linen(tmp_path):
    (params, batch_stats, step), _ = run('linen', tmp_path)
    assert params == 'params: codebooks, query, query_norm, values'
    assert batch_stats == "batch_stats: {'query_norm': {'mean': (2, 2, 8), 'var': (2, 2, 8)}}"
    before, after = losses(step)
    assert after < before and float(step.split()[-1]) > 0


@pytest.mark.slow
def test_which_slots(tmp_path):
    (_, *words, readers, usage), _ = run('which_slots', tmp_path)
    first, again = [line for line in words if line.startswith('the ')]
    assert first == again and len(set(words)) == len(words) - 1
    assert readers == f'slot {first.split()[1]} is read in head 0 by: the'
    assert re.search(r'of 64 slots, 28 tokens read \d+\.\d%, \d+\.\d% as', usage)

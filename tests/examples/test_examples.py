"""Every example runs as its first line says, and shows what it promises."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHOWN = {
    'transformer': ['table split over tp: loss', 'table on every device: loss',
                    "mesh with the axes ('dp', 'tp')"],
    'sparse_updates': ['rows', 'were read and'],
    'linen': ["collections ['batch_stats', 'params']; loss"],
    'which_slots': ['token 2, head 1: slots', '105 tokens use']}


@pytest.mark.parametrize('name', SHOWN)
def test_an_example_runs_and_shows_what_it_says(name, tmp_path):
    """Each asserts what it is about."""
    ran = subprocess.run(
        [sys.executable, str(ROOT / 'examples' / f'{name}.py')], cwd=tmp_path, text=True,
        env={**os.environ, 'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': ''},
        capture_output=True, check=False)
    assert ran.returncode == 0, ran.stderr
    for words in SHOWN[name]:
        assert words in ran.stdout + ran.stderr


def test_every_example_is_tested():
    assert {path.stem for path in (ROOT / 'examples').glob('*.py')} == SHOWN.keys()


def test_sparse_updates_take_at_most_ten_lines():
    marked = [line for line in (ROOT / 'examples/sparse_updates.py').read_text().splitlines()
              if line.endswith('# sparse')]
    assert 5 < len(marked) <= 10

"""The notebook that opens the quickstart's run, over runs as the quickstart leaves them."""

import json
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

from tests.report.synthetic_runs import make_quickstart, usage

NOTEBOOK = Path(__file__).parents[2] / 'examples' / 'quickstart_slots.ipynb'
CODE = [cell for cell in json.loads(NOTEBOOK.read_text())['cells'] if cell['cell_type'] == 'code']


def test_it_is_stored_without_outputs():
    assert CODE and all(not cell['outputs'] and not cell['execution_count'] for cell in CODE)


def test_it_plots_the_slots(tmp_path, monkeypatch, capsys):
    plt.switch_backend('Agg')
    folder = make_quickstart(tmp_path / 'runs' / 'quickstart', tokens=256, side=12)
    monkeypatch.chdir(folder.parent)    # where ../runs/quickstart is, as from examples/
    names = {}
    for cell in CODE:
        exec(''.join(cell['source']), names)
    assert names['top_1_usage'] == {
        name: pytest.approx(usage(folder, name)) for name in ('add', 'replace')}
    assert len(plt.get_fignums()) == 2
    plt.close('all')
    said = f'layer 2: {usage(folder, "add"):.1%} of the slots after 256 tokens'
    assert said in capsys.readouterr().out

"""The report of an ablation, of folders as training writes them."""

import csv
import json

import numpy as np
import pytest

from pkm_jax.refusal import Refusal
from pkm_jax.report.ablation import write_ablation
from pkm_jax.report.bands import curve
from pkm_jax.report.cell_tables import mean_and_deviation, memory_table, model_table
from pkm_jax.report.cells import read_cells
from tests.report.synthetic_runs import edit_evals, make_run, usage

SECONDS = {'trained': 1800., 'refreshed': 1800.}


def make_cell(folder, name, group, *, steps=100, before='', **cell):
    content = {'name': name, 'group': group, 'seed': 0, 'starts_from': before, 'seconds': SECONDS,
               'devices': 4, 'hardware': '4 × cpu', 'versions': {'jax': '0.10.2'},
               'command': f'python -m pkm_jax.ablate --only={name}',
               'trained': {'steps': steps, 'flops': 2e15}, **cell}
    (folder / name).mkdir(exist_ok=True, parents=True)
    (folder / name / 'cell.json').write_text(json.dumps(content))


@pytest.fixture
def grid(tmp_path):
    """A pretraining, two seeds from it that end at losses of 5 and 6, and three that are not done."""
    folder = tmp_path / 'grid'
    make_run(folder / 'pretrain', losses=(9., 6.4), tokens=256)
    make_cell(folder, 'pretrain', 'pretrain')
    for seed in (1, 2):
        name = f'add_100%-seed{seed}'
        make_run(folder / name, placement='add', skews=(.5,), losses=(8., 4. + seed), side=12,
                 seed=seed, tokens=256, init_from=str(folder / 'pretrain'))
        edit_evals(folder / name, lambda line: line | {'loss': round(line['loss'], 1)})
        make_cell(folder, name, 'add_100%', before='pretrain',
                  refreshed={'before': 5., 'after': 4.99, 'rise': .25, 'memories': {
                      '2': {'fall': .01 * seed, 'rise': .1 * seed}}},
                  finetuned={'tasks': {'cola': {'metric': 'matthews_correlation', 'mean': .4 + .1 * seed}}})
    make_run(folder / 'half', planned=200, tokens=256)
    (folder / 'ill').mkdir()
    (folder / 'ill/cell.json').write_text(json.dumps({'failure': 'memory.top_k\n= 7'}))
    names = ['pretrain', 'add_100%-seed1', 'add_100%-seed2', 'half', 'ill', 'absent']
    (folder / 'ablation.json').write_text(json.dumps({'budget': 'steps', 'cells': names}))
    return folder


def by_title(table, row):
    names, values = table.rows[row]
    return names, {column.title: some for column, some in zip(table.columns, values)}


def test_tables_have_every_seed_of_a_group(grid):
    done = [cell for cell in read_cells(grid) if cell.state == 'done']
    names, values = by_title(model_table(done, lambda cell: cell.group), 1)
    assert names == ('add_100%',) and values['loss (nats)'] == [5., 6.]
    assert values['steps in all'] == [200, 200] and values['PFLOP in all'] == [4, 4]
    assert values['tokens in all'] == [2 * 2048 * 100] * 2
    assert values['device hours'] == [4, 4]
    assert values['loss up without memories (mnats)'] == [250, 250]
    assert values['cola (Matthews correlation)'] == pytest.approx([.5, .6])
    names, values = by_title(memory_table(done, lambda cell: cell.group), 0)
    assert names == ('add_100%', '2')
    assert values['top-1'] == [usage(grid, f'add_100%-seed{seed}') for seed in (1, 2)]
    assert values['loss off by refreshing (mnats)'] == pytest.approx([10, 20])
    assert values['loss up without it (mnats)'] == pytest.approx([100, 200])
    assert 'dead' not in values     # which these runs have not


def test_deviations_are_those_of_a_sample():
    assert mean_and_deviation([5., 6.]) == (5.5, pytest.approx(np.sqrt(.5)))
    assert mean_and_deviation([5.]) == (5., 0.)


def test_the_page_names_what_is_missing_and_why(grid):
    text = write_ablation(grid).read_text()
    assert '6 cells: 3 done, 1 failed, 1 unfinished, 1 not begun.' in text
    assert 'Unfinished: half. Not begun: absent.' in text
    assert '* **ill**: memory.top_k = 7' in text
    assert 'equally many steps in all' in text
    assert '| add_100% | 2 |' in text and '5.5000 ± 0.7071' in text
    assert '3.00 hours of wall time, 12.00 device hours' in text
    assert 'python -m pkm_jax.ablate --only=add_100%-seed2' in text and 'jax 0.10.2' in text


def test_tables_for_other_programs(grid):
    target = write_ablation(grid).parent
    tex = (target / 'model.tex').read_text()
    assert r'add\_100\% & 2 &' in tex and r'5.5000 $\pm$ 0.7071' in tex
    with (target / 'model.csv').open() as file:
        row = list(csv.DictReader(file))[1]
    assert float(row['loss (nats): mean']) == 5.5 and row['loss (nats): cells'] == '2'
    assert float(row['loss (nats): deviation']) == pytest.approx(np.sqrt(.5))
    with (target / 'cells.csv').open() as file:
        assert [row['cell'] for row in csv.DictReader(file)] == [
            'pretrain', 'add_100%-seed1', 'add_100%-seed2']


def test_bands_are_over_the_evaluations_that_all_have(grid):
    edit_evals(grid / 'add_100%-seed2', lambda line: None if line['step'] == 50 else line)
    cells = [cell for cell in read_cells(grid) if cell.group == 'add_100%']
    tokens, means, deviations = curve(cells, lambda line: line['loss'])
    np.testing.assert_array_equal(tokens, 2048 * np.array([25, 75, 100]))
    assert means[-1] == 5.5 and deviations[-1] == pytest.approx(np.sqrt(.5))


def test_another_folder_is_refused(tmp_path):
    with pytest.raises(Refusal, match='no folder of an ablation'):
        write_ablation(tmp_path)

"""Cells beside the same training without memories, in pairs of a seed."""

import json

import pytest
from scipy import stats

from pkm_jax.report.ablation import write_ablation
from pkm_jax.report.cells import read_cells
from pkm_jax.report.pairs import DIFFERENCE, pair_table, paired
from tests.report.synthetic_runs import edit_evals, make_run
from tests.report.test_ablation import make_cell

ADD = {1: (8.5, 5.0), 2: (8.5, 5.5), 3: (8.5, 5.25)}
NONE = {1: (8., 5.5), 2: (8., 5.75), 3: (8., 6.)}


def make(folder, name, group, seed, losses, *, before='', steps=100, skews=()):
    make_run(folder / name, losses=losses, seed=seed, skews=skews, tokens=256, steps=steps, side=8,
             placement='add' if skews else 'none')
    edit_evals(folder / name, lambda line: line | {'loss': losses[line['step'] == steps]})
    make_cell(folder, name, group, seed=seed, before=before, steps=steps)


@pytest.fixture
def grid(tmp_path):
    """Three seeds with a memory and without from `pretrain`, and what they must not be paired with."""
    folder = tmp_path / 'grid'
    make(folder, 'pretrain', 'pretrain', 1, (9., 6.))
    make(folder, 'scratch_none-seed1', 'scratch_none', 1, (9., 7.))
    make(folder, 'long_none-seed1', 'long_none', 1, (9., 1.), before='pretrain', steps=200)
    for seed in ADD:
        make(folder, f'none-seed{seed}', 'none', seed, NONE[seed], before='pretrain')
        make(folder, f'add-seed{seed}', 'add', seed, ADD[seed], before='pretrain', skews=(.5,))
    make(folder, 'add-seed4', 'add', 4, (8., 1.), before='pretrain', skews=(.5,))
    names = [path.name for path in sorted(folder.iterdir())]
    (folder / 'ablation.json').write_text(json.dumps({'budget': 'own', 'cells': names}))
    return folder


def test_pairs_are_of_the_same_seed_start_and_steps(grid):
    pairs = paired(read_cells(grid))
    # pretrain and scratch_none are both from scratch with seed 1 here: a pair without memories
    assert {name: [cell.name for cell in cells] for name, cells in pairs.items()} == {
        'scratch_none': ['scratch_none-seed1'], 'add': ['add-seed1', 'add-seed2', 'add-seed3']}
    assert [cell.run.evals[-1][DIFFERENCE] for cell in pairs['add']] == [-.5, -.25, -.75]
    assert pairs['add'][0].run.evals[0][DIFFERENCE] == .5


def test_another_rate_of_learning_makes_no_pair(grid):
    for seed in NONE:
        path = grid / f'none-seed{seed}/config.json'
        config = json.loads(path.read_text())
        config['train']['learning_rate'] = 1e-3
        path.write_text(json.dumps(config))
    assert 'add' not in paired(read_cells(grid))


def test_the_table_has_means_and_students_test(grid):
    (names, values), = [row for row in pair_table(paired(read_cells(grid))).rows if row[0] == ('add',)]
    expected = stats.ttest_rel([ADD[seed][1] for seed in ADD], [NONE[seed][1] for seed in ADD])
    assert values == [[-.5, -.25, -.75], [pytest.approx(expected.statistic)],
                      [pytest.approx(expected.pvalue)]]
    page = write_ablation(grid)
    assert '| add | 3 | -0.5000 ± 0.2500 | -3.5 | 0.074 |' in page.read_text()
    assert '| scratch_none | 1 | 1.0000 | – | – |' in page.read_text()      # one pair: no test
    assert (page.parent / 'loss_in_pairs.png').stat().st_size > 10_000
    assert (page.parent / 'pairs.csv').exists()


def test_evaluations_that_the_other_has_not_are_left_out(grid):
    edit_evals(grid / 'none-seed1', lambda line: None if line['step'] == 100 else line)
    first = paired(read_cells(grid))['add'][0]
    assert [line['step'] for line in first.run.evals] == [25, 50, 75]


def test_a_grid_without_plain_cells_has_no_such_section(grid):
    names = ['add-seed1', 'add-seed2']
    (grid / 'ablation.json').write_text(json.dumps({'budget': 'own', 'cells': names}))
    page = write_ablation(grid)
    assert 'without memories' not in page.read_text().replace('up without memories', '')
    assert not (page.parent / 'loss_in_pairs.png').exists()

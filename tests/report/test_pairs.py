"""Cells beside the same training without memories, in pairs of a seed."""

import csv
import json

import pytest
from scipy import stats

from pkm_jax.report.ablation import write_ablation
from pkm_jax.report.bands import band_figures
from pkm_jax.report.cells import read_cells
from pkm_jax.report.pairs import DIFFERENCE, compared, markdown, paired
from tests.report.synthetic_runs import edit_evals, make_run
from tests.report.test_ablation import make_cell

ADD = {1: (8.5, 5.0), 2: (8.5, 5.5), 3: (8.5, 5.25)}
NONE = {1: (8., 5.5), 2: (8., 5.75), 3: (8., 6.)}


def configure(folder, **sections):
    """Changes fields of a cell's config.json."""
    path = folder / 'config.json'
    config = json.loads(path.read_text())
    for section, fields in sections.items():
        config[section] = config.get(section, {}) | fields if isinstance(fields, dict) else fields
    path.write_text(json.dumps(config))


def make(folder, name, group, seed, losses, *, before='pretrain', skews=()):
    make_run(folder / name, losses=losses, seed=seed, skews=skews, tokens=256, side=8,
             placement='add' if skews else 'none')
    edit_evals(folder / name, lambda line: line | {'loss': losses[line['step'] == 100]})
    make_cell(folder, name, group, seed=seed, before=before)
    configure(folder / name, seed=seed)


@pytest.fixture
def grid(tmp_path):
    """Three seeds with a memory and without, both from `pretrain`; and a fourth with it alone."""
    folder = tmp_path / 'grid'
    make(folder, 'pretrain', 'pretrain', 1, (9., 6.), before='')
    for seed in ADD:
        make(folder, f'none-seed{seed}', 'none', seed, NONE[seed])
        make(folder, f'add-seed{seed}', 'add', seed, ADD[seed], skews=(.5,))
    make(folder, 'add-seed4', 'add', 4, (8., 1.), skews=(.5,))
    plan(folder)
    return folder


def plan(folder, names=None):
    names = names or [path.name for path in sorted(folder.iterdir()) if path.is_dir()]
    (folder / 'ablation.json').write_text(json.dumps({'budget': 'own', 'cells': names}))


def names_of(pairs):
    return {name: [cell.name for cell in cells] for name, cells in pairs.items()}


def test_pairs_are_of_the_same_seed_and_start(grid):
    pairs = paired(read_cells(grid))
    assert names_of(pairs) == {('add', 'none'): ['add-seed1', 'add-seed2', 'add-seed3']}
    assert [cell.run.evals[-1][DIFFERENCE] for cell in pairs['add', 'none']] == [-.5, -.25, -.75]
    assert pairs['add', 'none'][0].run.evals[0][DIFFERENCE] == .5


@pytest.mark.parametrize('change', [
    {'model': {'layers': 3}}, {'train': {'learning_rate': 1e-3}}, {'seed': 7},
    {'train': {'steps': 200}}, {'data': {'length': 64}}, {'data': {'corpus': 'another'}}])
def test_other_settings_make_no_pair(grid, change):
    configure(grid / 'none-seed2', **change)
    assert names_of(paired(read_cells(grid))) == {('add', 'none'): ['add-seed1', 'add-seed3']}


@pytest.fixture
def wider(grid):
    """The same with models of wider layers, from a `pretrain_wide` of theirs."""
    make(grid, 'pretrain_wide', 'pretrain_wide', 1, (9., 5.75), before='')
    for seed in ADD:
        make(grid, f'wide-seed{seed}', 'wide', seed, (8., 5.), before='pretrain_wide')
    for name in ('pretrain_wide', *(f'wide-seed{seed}' for seed in ADD)):
        configure(grid / name, model={'feed_forward_width': 96})
    plan(grid, ['pretrain', 'pretrain_wide', *(f'{group}-seed{seed}' for group in (
        'add', 'none', 'wide') for seed in ADD)])
    return grid


def test_wider_layers_are_beside_too_if_what_they_start_from_differs_in_these_alone(wider):
    pairs = paired(read_cells(wider))
    assert {names: len(cells) for names, cells in pairs.items()} == {
        ('pretrain_wide', 'pretrain'): 1, ('add', 'none'): 3, ('add', 'wide'): 3,
        ('wide', 'none'): 3}
    assert [row.mean for row in compared(pairs)] == [-.25, -.5, .25, -.75]
    panel, = band_figures({name: [] for name in ('add', 'wide')}, pairs)['loss_in_pairs'].axes
    assert panel.get_title('left') == 'Loss minus that of none (nats)'
    assert sorted(line.get_ydata()[-1] for line in panel.lines
                  if len(line.get_xdata()) == 4) == [-.75, -.5]

    configure(wider / 'pretrain_wide', train={'learning_rate': 1e-3})
    assert set(paired(read_cells(wider))) == {('add', 'none')}


def test_the_same_cell_twice_is_no_pair(grid):
    make(grid, 'again-seed1', 'again', 1, (8., 4.), before='pretrain')
    plan(grid)
    found = names_of(paired(read_cells(grid)))      # in the order of the plan
    assert found == {('add', 'again'): ['add-seed1'], ('add', 'none'): ['add-seed2', 'add-seed3']}


@pytest.mark.parametrize('change', [
    {'train': {'values_learning_rate': 1e-3}}, {'memory': {'sub_keys': 64}},
    {'init_from': '/another/place/pretrain'}, {'data': {'workers': 8}}, {'log': {'every': 7}}])
def test_what_matters_to_memories_alone_or_to_no_number_keeps_a_pair(grid, change):
    configure(grid / 'none-seed2', **change)
    assert len(paired(read_cells(grid))['add', 'none']) == 3


def test_a_memory_that_was_never_evaluated_is_not_taken_for_none(grid):
    edit_evals(grid / 'add-seed1', lambda line: None)
    edit_evals(grid / 'none-seed2', lambda line: None)      # nor has a pair without evaluations
    assert names_of(paired(read_cells(grid))) == {('add', 'none'): ['add-seed3']}


def test_the_table_has_means_and_students_test(grid):
    row, = compared(paired(read_cells(grid)))
    expected = stats.ttest_rel([ADD[seed][1] for seed in ADD], [NONE[seed][1] for seed in ADD])
    assert (row.cell, row.beside, row.pairs, row.tokens) == ('add', 'none', 3, 2048 * 100)
    assert (row.mean, row.deviation) == (-.5, .25)
    assert (row.t, row.p) == pytest.approx((expected.statistic, expected.pvalue))
    page = write_ablation(grid)
    assert '| add | none | 3 | -0.5000 ± 0.2500 | -3.5 | 0.074 |' in page.read_text()
    assert '![loss_in_pairs](loss_in_pairs.png)' in page.read_text()
    with (page.parent / 'pairs.csv').open() as file:
        written, = csv.DictReader(file)
    assert float(written['p']) == row.p and written['pairs'] == '3'


def test_differences_are_taken_where_all_pairs_were_evaluated(grid):
    edit_evals(grid / 'none-seed1', lambda line: None if line['step'] == 100 else line)
    row, = compared(paired(read_cells(grid)))
    assert row.tokens == 2048 * 75 and row.mean == .5


@pytest.mark.parametrize('seeds', [(1,), (1, 2)])
def test_one_pair_and_equal_differences_have_no_test(grid, seeds):
    for seed in seeds:      # an error, where scipy warns of it
        edit_evals(grid / f'none-seed{seed}', lambda line: line | {'loss': 4.})
        edit_evals(grid / f'add-seed{seed}', lambda line: line | {'loss': 3.})
    plan(grid, [f'{group}-seed{seed}' for group in ('none', 'add') for seed in seeds])
    assert (f'| add | none | {len(seeds)} | -1.0000 | – | – |'
            in markdown(compared(paired(read_cells(grid)))))


def test_the_figure_has_a_panel_for_each_group_without_memories(grid):
    make(grid, 'scratch_none-seed1', 'scratch_none', 1, (9., 7.), before='')
    make(grid, 'scratch_add-seed1', 'scratch_add', 1, (9., 6.5), before='', skews=(.5,))
    configure(grid / 'pretrain', train={'steps': 200})      # else it were another none from scratch
    plan(grid)
    groups, cells = {}, read_cells(grid)
    for cell in cells:
        groups.setdefault(cell.group, []).append(cell)
    panels = band_figures(groups, paired(cells))['loss_in_pairs'].axes
    assert [ax.get_title('left') for ax in panels] == [
        f'Loss minus that of {name} (nats)' for name in ('none', 'scratch_none')]
    curves = [{line.get_color() for line in ax.lines if len(line.get_xdata()) == 4} for ax in panels]
    assert [len(found) for found in curves] == [1, 1] and curves[0] != curves[1]
    last = [[line.get_ydata()[-1] for line in ax.lines if len(line.get_xdata()) == 4] for ax in panels]
    assert last == [[-.5], [-.5]]


def test_a_grid_without_plain_cells_has_no_such_section(grid):
    plan(grid, ['add-seed1', 'add-seed2'])
    page = write_ablation(grid)
    assert 'Beside the same training' not in page.read_text()
    assert not (page.parent / 'loss_in_pairs.png').exists()

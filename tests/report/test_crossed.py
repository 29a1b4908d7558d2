"""The picture of four runs that cross both cures."""

import numpy as np
import pytest

from pkm_jax.report.crossed import crossed
from pkm_jax.report.plots import figures
from pkm_jax.report.runs import read_runs
from pkm_jax.report.theme import LIGHT
from tests.report.synthetic_runs import make_run

CELLS = [(start, placement) for placement in ('add', 'replace') for start in (True, False)]


@pytest.fixture
def runs(tmp_path):
    """In another order than that of the picture."""
    make_run(tmp_path / 'first', seed=1)
    for number, (start, placement) in enumerate(CELLS):
        make_run(tmp_path / f'cell{number}', placement=placement, seed=number, side=12, tokens=64,
                 init_from=str(tmp_path / 'first') if start else '', skews=(number / 2,))
    return read_runs(tmp_path, ['first', *(f'cell{number}' for number in range(4))])


def test_each_cell_has_its_place_and_share(runs):
    assert {cell: runs[index].name for cell, index in crossed(runs, '2').items()} == {
        cell: f'cell{number}' for number, cell in enumerate(CELLS)}
    drawn = figures(runs, LIGHT)
    assert list(drawn)[:3] == ['loss', 'usage_training', 'crossed_layer_2']
    panels = [ax for ax in drawn['crossed_layer_2'].axes if ax.get_images()]
    named = {run.name: run for run in runs}
    # Scratch above, replace left.
    for ax, name in zip(panels, ('cell3', 'cell1', 'cell2', 'cell0'), strict=True):
        run = named[name]
        counts, text = run.access['2'].top1, ax.texts[0].get_text()
        assert ax.get_xlabel().startswith(f'{name}, ')
        assert ax.get_title('left').startswith(f'{np.mean(counts > 0):.1%} of the slots')
        assert ('pretrained' in text) == bool(run.init_from)
        assert ('in place' in text) == (run.placement == 'replace')
        np.testing.assert_array_equal(np.ma.getmaskarray(ax.get_images()[0].get_array()).ravel(),
                                      counts == 0)


def test_other_runs_are_not_crossed(runs):
    cells = [run for run in runs if run.layers]
    assert crossed(cells, '2') and not crossed(cells[:3], '2')
    assert not crossed([*cells, cells[0]], '2') and not crossed([*cells[:3], cells[0]], '2')

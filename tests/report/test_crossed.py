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
    assert crossed(runs, '2') == {cell: 1 + number for number, cell in enumerate(CELLS)}
    drawn = figures(runs, LIGHT)
    assert list(drawn)[:3] == ['loss', 'usage_training', 'crossed_layer_2']
    panels = [ax for ax in drawn['crossed_layer_2'].axes if ax.get_images()]
    order = [4, 2, 3, 1]        # scratch above, replace left
    for ax, index in zip(panels, order, strict=True):
        counts, text = runs[index].access['2'].top1, ax.texts[0].get_text()
        assert ax.get_xlabel().startswith(f'{runs[index].name}, ')
        assert ax.get_title('left').startswith(f'{np.mean(counts > 0):.1%} of the slots')
        assert ('pretrained' in text) == bool(runs[index].init_from)
        assert ('in place' in text) == (runs[index].placement == 'replace')
        np.testing.assert_array_equal(np.ma.getmaskarray(ax.get_images()[0].get_array()).ravel(),
                                      counts == 0)


def test_other_runs_are_not_crossed(runs):
    assert not crossed(runs[:4], '2') and not crossed([*runs, runs[1]], '2')
    assert not crossed([*runs[:4], runs[1]], '2')

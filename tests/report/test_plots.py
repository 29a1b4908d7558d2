"""What is drawn in the figures of a report."""

import numpy as np
import pytest

from pkm_jax.memory.usage import uniform_ceiling
from pkm_jax.report import plots
from pkm_jax.report.runs import read_run, read_runs
from pkm_jax.report.theme import DARK, LIGHT, style
from tests.report.synthetic_runs import SlotDraws, usage


def panel(figure, title):
    return next(ax for ax in figure.axes if title in ax.get_title('left'))


def line_of(ax, index):
    """The last solid line that the index-th run has in a panel, as an array of x and y."""
    colour = style(index)[0]
    lines = [x for x in ax.get_lines() if x.get_color() == colour and x.get_linestyle() == '-']
    return lines[-1].get_xydata()


def texts(figure):
    return ' | '.join(text.get_text() for ax in figure.axes for text in ax.texts)


def test_continued_run_is_drawn_after_its_parent(quickstart):
    runs = read_runs(quickstart)
    assert [(run.name, run.parent, run.start_tokens) for run in runs] == [
        ('pretrain', None, 0),
        ('add', 'pretrain', 204_800),
        ('replace', None, 0),
    ]
    figure = plots.figures(runs, LIGHT)['loss']
    ends = [line_of(figure.axes[0], index)[[0, -1], 0].tolist() for index in range(3)]
    assert ends == [[2048, 204_800], [206_848, 409_600], [2048, 204_800]]
    marks = [x.get_xdata()[0] for x in figure.axes[0].get_lines() if x.get_linestyle() == '--']
    assert marks == [204_800] and 'memory added' in texts(figure)
    assert 'add  5.61' in texts(figure)


def test_usage_curves_and_ceilings(quickstart):
    figure = plots.figures(read_runs(quickstart), LIGHT)['usage']
    top1, top_k = panel(figure, 'top-1 usage'), panel(figure, 'top-K usage')
    curve = np.array(read_run(quickstart / 'add').evals[-1]['memory']['2']['curve'])
    np.testing.assert_array_equal(line_of(top1, 1), curve[:, :2])
    np.testing.assert_array_equal(line_of(top_k, 1), curve[:, [0, 2]])
    for ax, share in ((top1, 1 - (1 - 1 / 576) ** 128), (top_k, 1 - (1 - 4 / 576) ** 128)):
        (uniform,) = (x.get_xydata() for x in ax.get_lines() if x.get_linestyle() == '--')
        np.testing.assert_allclose(uniform[[0, -1], 0], [64, 8192])
        np.testing.assert_allclose(uniform[0, 1], share)
        assert ax.get_xscale() == 'log'
    assert f'add  {curve[-1, 1]:.1%}' in texts(figure)
    assert 'uniform  100.0%' in texts(figure)


def test_ceiling_is_that_of_the_metrics():
    assert plots.ceiling(np.array([900]), 4096, 4)[0] == pytest.approx(
        uniform_ceiling(4096, 900, 4)
    )
    draws = SlotDraws(0, 24, 2, 4, seed=0, tokens=512)
    assert draws.metrics()['top_k_usage'] == pytest.approx(
        plots.ceiling(np.array([512]), 576, 2, 4)[0], abs=0.02
    )


def test_usage_over_training_gives_t(quickstart):
    runs = read_runs(quickstart)
    ax = panel(plots.figures(runs, DARK)['usage_training'], 'top-1')
    assert ax.get_title('left') == 'Layer 2: top-1 usage, T = 8.19k'
    shares = [record['memory']['2']['top_1_usage'] for record in runs[1].evals]
    np.testing.assert_array_equal(
        line_of(ax, 1), np.c_[[51_200, 102_400, 153_600, 204_800], shares]
    )


def test_slot_images_share_a_scale_and_leave_unused_slots_plain(quickstart):
    runs = read_runs(quickstart)
    figure = plots.figures(runs, LIGHT)['slots_layer_2']
    images = [ax.get_images()[0] for ax in figure.axes if ax.get_images()]
    assert len(images) == 4
    for row, field in ((images[:2], 'count'), (images[2:], 'top1')):
        counts = [getattr(run.access['2'], field) for run in runs[1:]]
        for image, count in zip(row, counts, strict=True):
            np.testing.assert_array_equal(np.ma.getmaskarray(image.get_array()).ravel(), count == 0)
            assert image.get_array()[3, 5] == count[3 * 24 + 5] or count[3 * 24 + 5] == 0
            assert (image.norm.vmin, image.norm.vmax) == (1, max(c.max() for c in counts))


def test_access_curve_ends_at_the_slots_never_read(quickstart):
    runs = read_runs(quickstart)
    figure = plots.figures(runs, LIGHT)['access']
    reads = line_of(panel(figure, 'reads per slot'), 2)
    unused = float(np.mean(runs[2].access['2'].count == 0))
    assert unused > 0.05
    assert np.isnan(reads[:, 1]).mean() == pytest.approx(unused)
    held = line_of(panel(figure, 'mass held'), 2)
    np.testing.assert_allclose(
        np.interp(usage(quickstart, 'replace', 'slots_90'), *held.T), 0.9, atol=0.01
    )
    legend = panel(figure, 'reads per slot').get_legend().get_texts()
    assert legend[1].get_text() == f'replace: {unused:.1%} of the slots never read'

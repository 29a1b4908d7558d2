"""The slots of four runs that cross both cures of Kim & Jung 2020, as one picture."""

from collections.abc import Sequence

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from pkm_jax.report.runs import RunRecord, counted, thousands, titled
from pkm_jax.report.slot_plots import access_colours, slot_image
from pkm_jax.report.theme import Theme, count_axis, style

STARTS = {False: 'from scratch', True: 'from pretrained weights'}
PLACEMENTS = {'replace': 'in place of the FFN', 'add': 'beside the FFN'}


def crossed(runs: Sequence[RunRecord], layer: str) -> dict[tuple[bool, str], int]:
    """{(pretrained, placement): index} of {scratch, pretrained} × {replace, add}, with slot counts
    in this layer; {} unless there is exactly one run of each of the four."""
    found = [((bool(run.init_from), run.placement), index) for index, run in counted(runs, layer)]
    cells = {(start, placement) for start in STARTS for placement in PLACEMENTS}
    return dict(found) if len(found) == 4 and {cell for cell, _ in found} == cells else {}


def crossed_figure(runs: Sequence[RunRecord], layer: str, theme: Theme) -> Figure:
    """All N × N slots of the four runs, coloured by how often each was the best of a head."""
    cells = crossed(runs, layer)
    counts = {cell: runs[index].access[layer].top1 for cell, index in cells.items()}
    norm = LogNorm(1, max(2, *(int(count.max()) for count in counts.values())))
    figure = Figure(figsize=(9.6, 9.6), layout=ConstrainedLayoutEngine(h_pad=0.12))
    grid = figure.subplots(2, 2)
    for row, (start, where) in zip(grid, STARTS.items(), strict=True):
        for ax, (placement, how) in zip(row, PLACEMENTS.items(), strict=True):
            slot_image(ax, counts[start, placement], norm, access_colours(theme))
            run, colour = runs[cells[start, placement]], style(cells[start, placement])[0]
            ax.set_title(f'{np.mean(counts[start, placement] > 0):.1%} of the slots in use\n',
                         fontsize=17, color=colour)
            ax.text(0, 1.025, f'{where}, {how}', transform=ax.transAxes, color=theme.muted)
            ax.set(xlabel=f'{run.name}, loss {run.evals[-1]["loss"]:.2f}', ylabel='',
                   xticks=[], yticks=[])
    bar = figure.colorbar(ScalarMappable(norm, access_colours(theme)), ax=grid, fraction=0.035,
                          pad=0.02, label='times the best slot of a head')
    count_axis(bar.ax.yaxis)
    bar.outline.set_visible(False)
    tokens = ' or '.join(sorted({thousands(runs[index].memory_evals[-1]['eval_tokens'])
                                 for index in cells.values()}))
    figure.suptitle(f'{titled(runs, layer)}: one pixel a slot; plain: never the best for any of '
                    f'{tokens} tokens', fontweight='bold', x=0.01, ha='left', fontsize=12)
    return figure

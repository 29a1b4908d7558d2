"""Figures of single slots: the image of all of them, and how evenly they are read."""

import math
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, ListedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import PercentFormatter

from pkm_jax.report.runs import RunRecord, counted, thousands, titled
from pkm_jax.report.theme import DASHED, Theme, count_axis, panels, share_axis, style


def slots_figure(runs: Sequence[RunRecord], layer: str, theme: Theme) -> Figure:
    """All N × N slots of one layer, coloured by how often they were read (top) or best (bottom)."""
    shown = counted(runs, layer)
    blocks = [shown[start : start + 4] for start in range(0, len(shown), 4)]
    columns = len(blocks[0])
    figure = Figure(figsize=(0.9 + 3.9 * columns, 8.2 * len(blocks)),
                    layout=ConstrainedLayoutEngine(h_pad=0.1))
    grid = figure.subplots(2 * len(blocks), columns, squeeze=False)
    colours = access_colours(theme)
    fields = (('count', 'selected', 'times among the K reads'),
              ('top1', 'best', 'times the best of a head'))
    for offset, (field, verb, label) in enumerate(fields):
        most = max(getattr(run.access[layer], field).max() for _, run in shown)
        norm = LogNorm(1, max(most, 2))
        for row, block in zip(grid[offset::2], blocks, strict=True):
            for ax, (index, run) in zip(row, block, strict=False):
                slot_image(ax, getattr(run.access[layer], field), norm, colours)
                used = np.mean(getattr(run.access[layer], field) > 0)
                tokens = thousands(run.memory_evals[-1]['eval_tokens'])
                ax.set_title(f'{run.name}: {used:.1%} {verb}', color=style(index)[0])
                ax.set_xlabel(f'second sub-key j   (T = {tokens})')
            for ax in row[len(block):]:
                ax.set_axis_off()
            bar = figure.colorbar(ScalarMappable(norm, colours), ax=list(row), fraction=0.05,
                                  pad=0.02, label=label)
            count_axis(bar.ax.yaxis)
            bar.outline.set_visible(False)
    figure.suptitle(
        f'{titled(runs, layer)}: every slot of the memory; the plain background shows slots never '
        f'reached',
        fontweight='bold', x=0.01, ha='left', fontsize=12)
    return figure


def access_figure(runs: Sequence[RunRecord], layers: Sequence[str], theme: Theme) -> Figure:
    """Slots sorted by use: the share of the mass they hold together, and the reads of each."""
    figure, grid = panels(runs, len(layers), height=4.4 + 0.27 * len(runs))
    for (held, reads), layer in zip(grid, layers, strict=True):
        held.plot([0, 1], [0, 1], color=theme.muted, linewidth=1.4, linestyle=DASHED)
        held.annotate('all slots alike', (0.7, 0.67), color=theme.muted, va='top')
        for index, run in counted(runs, layer):
            colour, line = style(index)
            mass = np.sort(run.access[layer].mass.astype(np.float64))[::-1].cumsum()
            slots = np.arange(len(mass) + 1) / len(mass)
            points = np.linspace(0, 1, 501)
            half = (np.searchsorted(mass, mass[-1] / 2) + 1) / len(mass)
            held.plot(points, np.interp(points, slots, np.append(0, mass / mass[-1])), line,
                      color=colour, linewidth=2.2,
                      label=f'{run.name}: half of the mass on {half:.1%} of the slots')
            count = np.sort(run.access[layer].count)[::-1].astype(np.float64)
            never = np.mean(count == 0)
            count[count == 0] = np.nan
            thinned = np.unique(np.linspace(0, len(count) - 1, 2001).astype(int))
            reads.plot(slots[1:][thinned], count[thinned], line, color=colour, linewidth=2.2,
                       label=f'{run.name}: {never:.1%} of the slots never read')
        share_axis(held)
        title = titled(runs, layer)
        held.set(ylabel='Share of the access mass',
                 title=f'{title}: mass held by the most used slots')
        reads.set(yscale='log', ylabel='Reads of the slot', title=f'{title}: reads per slot')
        count_axis(reads.yaxis)
        for ax in (held, reads):
            ax.set(xlim=(0, 1), xlabel='Slots, most used first')
            ax.xaxis.set_major_formatter(PercentFormatter(1))
            ax.legend(frameon=False, loc='upper left', bbox_to_anchor=(-0.02, -0.14))
    return figure


def access_colours(theme: Theme) -> Colormap:
    """From one read to many; a slot that was never read is plain."""
    viridis = matplotlib.colormaps['viridis'](np.linspace(*theme.access, 256))
    return ListedColormap(viridis).with_extremes(bad=theme.never)


def slot_image(ax: Axes, counts: np.ndarray, norm: LogNorm, colours: Colormap) -> None:
    """Counts of N² slots as N × N pixels, first sub-keys down, second ones across."""
    side = math.isqrt(len(counts))
    image = np.ma.masked_equal(counts.reshape(side, side), 0)
    ax.imshow(image, norm=norm, cmap=colours)
    ax.set(xticks=[0, side - 1], yticks=[0, side - 1], ylabel='first sub-key i')
    ax.grid(False)
    ax.spines[:].set_visible(False)

"""How the figures of a report look: colours, lines, axes and labels."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, NullFormatter, PercentFormatter

from pkm_jax.report.runs import RunRecord, thousands

# Middle tones of Okabe and Ito's colour-blind safe palette: legible on white and on dark alike.
PALETTE = ('#2b83c6', '#dd6a13', '#12946f', '#c267a0', '#a68400', '#7a6fd0', '#b5453c', '#5c8a9e')
LINES = ('-', '-.', ':')
DASHED = (0, (4, 3))    # what is not a run


@dataclasses.dataclass(frozen=True)
class Theme:
    """Colours of everything in a figure that is not a run."""
    suffix: str
    background: str
    text: str
    muted: str
    grid: str
    never: str      # a slot that was not selected
    access: tuple[float, float]     # part of viridis, from one selection to many

    @property
    def look(self) -> dict[Any, Any]:
        """Matplotlib's settings under which figures are drawn."""
        return {
            'font.size': 11, 'font.family': 'sans-serif', 'text.color': self.text,
            'axes.labelcolor': self.text, 'axes.edgecolor': self.muted,
            'axes.facecolor': self.background, 'axes.titlesize': 12, 'axes.titleweight': 'bold',
            'axes.titlelocation': 'left', 'axes.titlepad': 10, 'axes.spines.top': False,
            'axes.spines.right': False, 'axes.grid': True, 'grid.color': self.grid,
            'axes.axisbelow': True, 'xtick.color': self.muted, 'ytick.color': self.muted,
            'figure.facecolor': self.background, 'lines.solid_capstyle': 'round',
        }


LIGHT = Theme('', '#ffffff', '#1c2330', '#667085', '#e4e7ec', '#e9ebef', (1.0, 0.0))
DARK = Theme('_dark', '#181c24', '#e8eaee', '#98a2b3', '#2e3542', '#0c0e12', (0.25, 1.0))


def style(index: int) -> tuple[str, str]:
    """Colour and line of the index-th run, the same in every figure."""
    return PALETTE[index % len(PALETTE)], LINES[index // len(PALETTE) % len(LINES)]


def panels(runs: Sequence[RunRecord], rows: int, height: float = 4.3) -> tuple[Figure, np.ndarray]:
    """Two panels a row, with room for the runs' names beside each."""
    width = 4.7 + 0.11 * max(len(run.name) for run in runs)
    figure = Figure(figsize=(2 * width, height * rows),
                    layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12))
    return figure, figure.subplots(rows, 2, squeeze=False)


def count_axis(axis: Axis) -> None:
    """Labels an axis with counts: 950, 65.5k, 2.1M."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: thousands(value)))
    axis.set_minor_formatter(NullFormatter())


def share_axis(ax: Axes) -> None:
    """Lets the vertical axis go from 0 to 100 %."""
    ax.set_ylim(0, 1.02)
    ax.yaxis.set_major_formatter(PercentFormatter(1))


def end_labels(ax: Axes, labels: Sequence[tuple[float, str, str]]) -> None:
    """Writes each label right of the axes at the height of its value, apart from the others."""
    low, high = ax.get_ylim()
    placed = sorted(((y - low) / (high - low), text, colour)
                    for y, text, colour in labels if np.isfinite(y))
    lowest = 0.0
    for count, (height, text, colour) in enumerate(placed):
        room = 0.97 - 0.065 * (len(placed) - 1 - count)
        height = max(min(height, room), lowest)
        ax.annotate(text, (1.015, height), xycoords='axes fraction', va='center', color=colour,
                    fontweight='bold', annotation_clip=False)
        lowest = height + 0.065

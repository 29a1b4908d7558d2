"""Figures over the cells of an ablation: means over seeds, with bands of one standard deviation."""

import operator
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pkm_jax.report.cell_tables import mean_and_deviation
from pkm_jax.report.cells import Cell, common_evaluations
from pkm_jax.report.pairs import DIFFERENCE, Pairs
from pkm_jax.report.theme import LIGHT, count_axis, end_labels, share_axis, style

# Metrics of a memory by what they are called in the name of a figure and on its axis.
MEMORY = {'top_1_usage': 'Top-1 usage', 'top_k_usage': 'Top-K usage', 'kl': 'KL (nats)',
          'gini': 'Gini', 'dead': 'Dead slots', 'outdated': 'Outdated slots',
          'drift': 'Mean drift of slots'}
SHARES = ('top_1_usage', 'top_k_usage', 'gini', 'dead', 'outdated')

Groups = dict[str, list[Cell]]


def band_figures(groups: Groups, pairs: Pairs) -> dict[str, Figure]:
    """All figures that the cells have the numbers for, by file name without suffix; `pairs` are
    those of `pairs.paired`."""
    with matplotlib.rc_context(LIGHT.look):
        drawn = {}
        for key, title in (('loss', 'Evaluation loss (nats)'), ('accuracy', 'Accuracy')):
            if figure := _figure(groups, [title], [operator.methodcaller('get', key)]):
                drawn[key] = figure
        if pairs:
            drawn['loss_in_pairs'] = _pairs_figure(list(groups), pairs)
        layers = sorted({layer for cells in groups.values() for cell in cells
                         for layer in cell.run.layers}, key=int)
        for key, title in MEMORY.items():
            values = [_of_layer(layer, key) for layer in layers]
            titles = [f'Layer {layer}: {title}' for layer in layers]
            if layers and (figure := _figure(groups, titles, values, share=key in SHARES)):
                drawn[key] = figure
    return drawn


def _pairs_figure(names: Sequence[str], pairs: Pairs) -> Figure:
    """Losses minus those of the same training without memories, a panel for each group of these
    that is the first beside one with memories."""
    first: dict[str, str] = {}
    for name, other in pairs:
        first.setdefault(name, other)
    beside_memories = [other for name, other in first.items() if pairs[name, other][0].run.layers]
    others = list(dict.fromkeys(beside_memories or first.values()))
    figure = Figure(figsize=(8 * len(others), 4.6), layout='constrained')
    for ax, other in zip(figure.subplots(1, len(others), squeeze=False)[0], others):
        groups = {name: pairs[name, other] if first.get(name) == other else [] for name in names}
        ax.axhline(0, color=LIGHT.muted, linewidth=1)
        _panel(ax, groups, f'Loss minus that of {other} (nats)', operator.itemgetter(DIFFERENCE),
               share=False)
    return figure


def _of_layer(layer: str, key: str) -> Callable[[dict[str, Any]], float | None]:
    return lambda line: line.get('memory', {}).get(layer, {}).get(key)


def _figure(groups: Groups, titles: Sequence[str],
            values: Sequence[Callable[[dict[str, Any]], float | None]],
            share: bool = False) -> Figure | None:
    """A panel a title, with a curve of each group that has the value; None where none has."""
    width = 6 + 0.09 * max(map(len, groups), default=0)
    figure = Figure(figsize=(width * len(titles), 4.6), layout='constrained')
    panels = figure.subplots(1, len(titles), squeeze=False)[0]
    drawn = [_panel(ax, groups, title, value, share)
             for ax, title, value in zip(panels, titles, values)]
    return figure if any(drawn) else None


def _panel(ax: Axes, groups: Groups, title: str,
           value: Callable[[dict[str, Any]], float | None], share: bool) -> bool:
    labels = []
    for index, (name, cells) in enumerate(groups.items()):
        tokens, means, deviations = curve(cells, value)
        if not len(tokens):
            continue
        colour, line = style(index)
        ax.plot(tokens, means, line, color=colour, linewidth=2, marker='o', markersize=4)
        ax.fill_between(tokens, means - deviations, means + deviations, color=colour, alpha=0.18,
                        linewidth=0)
        labels.append((means[-1], name, colour))
    ax.set(xlabel='Tokens trained, without what it starts from', ylabel=title.rpartition(': ')[2])
    ax.set_title(title)
    count_axis(ax.xaxis)
    if share:
        share_axis(ax)
    end_labels(ax, labels)
    return bool(labels)


def curve(
    cells: Sequence[Cell], value: Callable[[dict[str, Any]], float | None],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, mean and deviation over the cells at each evaluation that all of them have."""
    found = common_evaluations(cells, value)
    means, deviations = np.array(list(map(mean_and_deviation, found.values()))).reshape(-1, 2).T
    return np.array(list(found)), means, deviations

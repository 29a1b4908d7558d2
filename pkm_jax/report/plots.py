"""The figures of a report, and those of loss and usage. None touches pyplot's state."""

from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pkm_jax.memory.usage import uniform_ceiling
from pkm_jax.report.crossed import crossed, crossed_figure
from pkm_jax.report.finetuned import finetuned, predictions_figure, score_figure
from pkm_jax.report.runs import (
    RunRecord,
    column,
    counted,
    layers_of,
    loss_of,
    smoothed,
    thousands,
    titled,
    with_memory,
)
from pkm_jax.report.slot_plots import access_figure, slots_figure
from pkm_jax.report.theme import DASHED, Theme, count_axis, end_labels, panels, share_axis, style


def figures(runs: Sequence[RunRecord], theme: Theme) -> dict[str, Figure]:
    """All figures that the runs have the numbers for, by file name without suffix."""
    with matplotlib.rc_context(theme.look):
        drawn = {'loss': loss_figure(runs, theme)}
        tuned = finetuned(runs)
        if tuned:
            drawn['score'] = score_figure(runs, theme)
        for index, run in tuned:
            if figure := predictions_figure(run, theme):
                drawn[f'predictions_{index}'] = figure
        layers = layers_of(runs)
        if layers:
            drawn['usage_training'] = usage_training_figure(runs, layers, theme)
        with_counts = [layer for layer in layers if counted(runs, layer)]
        for layer in with_counts:
            if crossed(runs, layer):
                drawn[f'crossed_layer_{layer}'] = crossed_figure(runs, layer, theme)
            else:
                drawn[f'slots_layer_{layer}'] = slots_figure(runs, layer, theme)
        if layers:
            drawn['usage'] = usage_figure(runs, layers, theme)
        if with_counts:
            drawn['access'] = access_figure(runs, with_counts, theme)
    return drawn


def loss_figure(runs: Sequence[RunRecord], theme: Theme) -> Figure:
    """Loss against training tokens; a continued run starts where its parent ended."""
    figure = Figure(figsize=(9.6, 4.8), layout='constrained')
    ax = figure.add_subplot()
    labels = []
    for index, run in enumerate(runs):
        colour, line = style(index)
        end = float('nan')
        if run.train:
            tokens = column(run.train, 'tokens') + run.start_tokens
            loss = column(run.train, 'loss')
            ax.plot(tokens, loss, color=colour, alpha=0.18, linewidth=1)
            mean = smoothed(loss)
            ax.plot(tokens, mean, line, color=colour, linewidth=2)
            end = mean[-1]
        if run.evals:
            tokens = column(run.evals, 'tokens') + run.start_tokens
            loss = column(run.evals, 'loss')
            ax.plot(tokens, loss, 'o', color=colour, markersize=6, markeredgecolor=theme.background)
            end = loss[-1]
        labels.append((end, f'{run.name}  {end:.2f}', colour))
    for start in sorted({run.start_tokens for run in runs if run.memory_added}):
        ax.axvline(start, color=theme.muted, linewidth=1.2, linestyle=DASHED)
        ax.annotate('memory added', (start, 1), xycoords=('data', 'axes fraction'), xytext=(6, -4),
                    textcoords='offset points', va='top', color=theme.muted)
    name, unit = loss_of(runs)
    ax.set(xlabel='Training tokens', ylabel=f'{name}{unit}')
    count_axis(ax.xaxis)
    ax.set_title(f'{name}: training (line, smoothed) and evaluation (dots)')
    ax.set_xlim(left=0)
    end_labels(ax, labels)
    return figure


def usage_figure(runs: Sequence[RunRecord], layers: Sequence[str], theme: Theme) -> Figure:
    """Top-1 and top-K usage against the number of evaluation tokens, one row a memory layer."""
    figure, grid = panels(runs, len(layers))
    for (top_1, top_k), layer in zip(grid, layers, strict=True):
        _usage_panel(top_1, runs, layer, 'top-1', theme)
        _usage_panel(top_k, runs, layer, 'top-K', theme)
    return figure


def _usage_panel(ax: Axes, runs: Sequence[RunRecord], layer: str, kind: str, theme: Theme) -> None:
    """The curves of all runs with this layer, and what uniform picks would reach."""
    column = 1 if kind == 'top-1' else 2
    labels = []
    longest: dict[tuple[int, int, int], float] = {}
    for index, run in with_memory(runs, layer):
        memory = run.memory_evals[-1]['memory'][layer]
        if not memory.get('curve'):
            continue
        tokens, shares = np.array(memory['curve'], dtype=float)[:, [0, column]].T
        colour, line = style(index)
        ax.plot(tokens, shares, line, marker='o', color=colour, linewidth=2, markersize=4)
        labels.append((shares[-1], f'{run.name}  {shares[-1]:.1%}', colour))
        size = (memory['slots'], memory['heads'], 1 if kind == 'top-1' else memory['k'])
        longest[size] = max(longest.get(size, 0), tokens[-1])
    formulas = []
    for (slots, heads, picks), most in longest.items():
        tokens = np.unique(np.geomspace(ax.dataLim.x0, most, 200).round().astype(int))
        shares = ceiling(tokens, slots, heads, picks)
        ax.plot(tokens, shares, color=theme.muted, linewidth=1.4, linestyle=DASHED, zorder=1)
        labels.append((shares[-1], f'uniform  {shares[-1]:.1%}', theme.muted))
        read, reads = ('1', '') if kind == 'top-1' else ('K', f'K = {picks}, ')
        formulas.append(f'dashed: 1−(1−{read}/S)^(T·H), {reads}H = {heads}, S = {slots:,}')
    ax.annotate('\n'.join(formulas), (0, 1.03), xycoords='axes fraction', va='bottom',
                color=theme.muted, fontsize=9.5)
    ax.set_title(f'{titled(runs, layer)}: {kind} usage', pad=14 + 14 * len(formulas))
    ax.set(xlabel='Evaluation tokens T (log scale)', ylabel=f'Slots used, {kind}')
    count_axis(ax.xaxis)
    share_axis(ax)
    ax.set_xscale('log')
    count_axis(ax.xaxis)     # the scale has brought its own labels
    end_labels(ax, labels)


def usage_training_figure(runs: Sequence[RunRecord], layers: Sequence[str], theme: Theme) -> Figure:
    """Top-1 and top-K usage at every evaluation, against the tokens trained with the memory."""
    figure, grid = panels(runs, len(layers))
    for (top_1, top_k), layer in zip(grid, layers, strict=True):
        _usage_training_panel(top_1, runs, layer, 'top_1_usage', 'top-1')
        _usage_training_panel(top_k, runs, layer, 'top_k_usage', 'top-K')
    return figure


def _usage_training_panel(ax: Axes, runs: Sequence[RunRecord], layer: str, key: str,
                          kind: str) -> None:
    labels, evaluated = [], set()
    for index, run in with_memory(runs, layer):
        records = [record for record in run.memory_evals if layer in record['memory']]
        usage = np.array([record['memory'][layer][key] for record in records])
        colour, line = style(index)
        ax.plot(column(records, 'tokens'), usage, line, marker='o', color=colour, linewidth=2,
                markersize=5)
        labels.append((usage[-1], f'{run.name}  {usage[-1]:.1%}', colour))
        evaluated |= {thousands(record['eval_tokens']) for record in records}
    ax.set(xlabel='Tokens trained with the memory', ylabel=f'Slots used, {kind}')
    count_axis(ax.xaxis)
    share_axis(ax)
    ax.set_xlim(left=0)
    ax.set_title(f'{titled(runs, layer)}: {kind} usage, T = {" or ".join(sorted(evaluated))}')
    end_labels(ax, labels)


def ceiling(tokens: np.ndarray, slots: int, heads: int, picks: int = 1) -> np.ndarray:
    """Share of S slots that T tokens reach if each head picks k distinct ones uniformly.

    1 − (1 − k/S)^(T·H), for k = 1 the ceiling of docs/method.md, section 4.
    """
    return np.array([uniform_ceiling(slots, count, heads, picks) for count in tokens.tolist()])

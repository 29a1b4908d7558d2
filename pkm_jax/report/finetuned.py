"""What a report shows of fine-tuned runs: learning curves, predictions, the worst errors."""

import html
import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pkm_jax.report.cells import read_json
from pkm_jax.report.runs import RunRecord, column
from pkm_jax.report.theme import DASHED, Theme, count_axis, end_labels, style

MOST_CLASSES = 20       # of a confusion matrix that can be read
WORST = 10              # errors that are shown


def finetuned(runs: Sequence[RunRecord]) -> list[tuple[int, RunRecord]]:
    """The runs that kept their best weights by a metric, each with its index among all."""
    return [(index, run) for index, run in enumerate(runs)
            if run.evals and run.config['train'].get('best') in run.evals[-1]]


def score_figure(runs: Sequence[RunRecord], theme: Theme) -> Figure:
    """The metric that counts at every evaluation; dashed what the commonest class would reach."""
    figure = Figure(figsize=(9.6, 4.8), layout='constrained')
    ax, labels, metrics = figure.add_subplot(), [], set()
    for index, run in finetuned(runs):
        metric, (colour, line) = run.config['train']['best'], style(index)
        scores = column(run.evals, metric)
        ax.plot(column(run.evals, 'step'), scores, line, marker='o', color=colour, linewidth=2)
        labels.append((run.best(metric), f'{run.name}  {run.best(metric):.3f}', colour))
        metrics.add(metric)
        majority = results_of(run).get(f'eval_majority_{metric}')
        if majority is not None:
            ax.axhline(majority, color=theme.muted, linewidth=1.4, linestyle=DASHED)
            ax.annotate('commonest class', (0, majority), xycoords=('axes fraction', 'data'),
                        xytext=(6, 4), textcoords='offset points', color=theme.muted)
    ax.set(xlabel='Step', ylabel=', '.join(sorted(metrics)))
    ax.set_title('Score at every evaluation, and the best')
    count_axis(ax.xaxis)
    end_labels(ax, labels)
    return figure


def predictions_figure(run: RunRecord, theme: Theme) -> Figure | None:
    """A confusion matrix of classes, or estimates against numbers; None for other predictions."""
    rows = [row for row in predictions_of(run) if row.get('label') is not None]
    draw = _scatter if rows and isinstance(rows[0].get('prediction'), float) else _confusion
    classes = {str(row[side]) for row in rows for side in ('label', 'prediction')
               if not isinstance(row[side], list)}
    if not classes or draw is _confusion and len(classes) > MOST_CLASSES:
        return None
    figure = Figure(figsize=(6.4, 5.6), layout='constrained')
    draw(figure.add_subplot(), rows, theme)
    return figure


def _confusion(ax: Axes, rows: list[dict[str, Any]], theme: Theme) -> None:
    names = sorted({str(row[side]) for row in rows for side in ('label', 'prediction')})
    counts = Counter((str(row['label']), str(row['prediction'])) for row in rows)
    table = np.array([[counts[gold, guess] for guess in names] for gold in names])
    shares = table / np.maximum(table.sum(1, keepdims=True), 1)
    ax.imshow(shares, cmap='Blues', vmin=0, vmax=1)
    for (gold, guess), count in np.ndenumerate(table):
        ax.text(guess, gold, f'{count:,}', ha='center', va='center',
                color='#ffffff' if shares[gold, guess] > .5 else '#1c2330')
    ax.set_xticks(range(len(names)), names, rotation=45, ha='right')
    ax.set_yticks(range(len(names)), names)
    ax.grid(visible=False)
    ax.set(xlabel='Predicted', ylabel='Label')
    ax.set_title('Validation examples by label and prediction')


def _scatter(ax: Axes, rows: list[dict[str, Any]], theme: Theme) -> None:
    gold, guess = (np.array([float(row[side]) for row in rows]) for side in ('label', 'prediction'))
    ends = [min(gold.min(), guess.min()), max(gold.max(), guess.max())]
    ax.plot(ends, ends, color=theme.muted, linewidth=1.4, linestyle=DASHED)
    ax.plot(gold, guess, 'o', color=style(0)[0], alpha=.35, markersize=4)
    varied = np.ptp(gold) > 0 and np.ptp(guess) > 0
    ax.set(xlabel='Label', ylabel='Estimate')
    ax.set_title('Validation examples' + (f', r = {np.corrcoef(gold, guess)[0, 1]:.3f}' if varied
                                          else ''))


def worst_errors(run: RunRecord) -> str:
    """The predictions that were surest and wrong, or farthest off, as an HTML table; '' of none."""
    rows = [row for row in predictions_of(run) if row.get('label') is not None and _error(row) > 0]
    lines = ''
    for row in sorted(rows, key=_error, reverse=True)[:WORST]:
        texts = ' / '.join(row[name] for name in ('text', 'text_pair') if name in row)
        said = row['prediction']
        said = f'{said:.3f}' if isinstance(said, float) else said
        lines += ''.join(['<tr>', *(f'<td>{html.escape(str(part))}</td>' for part in (
            texts, row['label'], said)), '</tr>'])
    if not lines:
        return ''
    return (f'<h3>{html.escape(run.name)}</h3><div class="wide"><table><thead><tr>'
            f'<th>Text</th><th>Label</th><th>Prediction</th></tr></thead><tbody>{lines}</tbody>'
            f'</table></div>')


def _error(row: dict[str, Any]) -> float:
    """How far off an estimate is, or how sure a wrong class; 0 of what is right."""
    said, label = row.get('prediction'), row['label']
    if isinstance(said, float):
        return abs(said - float(label))
    shares = row.get('probabilities')
    if not isinstance(said, str) or shares is None or said == str(label):
        return 0.
    return shares[said] - shares.get(str(label), 0.)


def results_of(run: RunRecord) -> dict[str, Any]:
    """The eval_results.json of a finished run; {} where there is none yet."""
    return read_json(run.folder / 'eval_results.json')


def predictions_of(run: RunRecord) -> list[dict[str, Any]]:
    """The predictions over the validation data of a finished run; [] where there are none yet."""
    path = run.folder / 'predictions_validation.jsonl'
    if not path.exists():
        return []
    with path.open(encoding='utf-8') as file:
        return list(map(json.loads, file))

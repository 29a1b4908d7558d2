"""The table of a report: what the runs were, and what their last evaluation says."""

import html
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pkm_jax.report.runs import RunRecord, column, layers_of, loss_of, smoothed, thousands, titled
from pkm_jax.report.theme import style

# Metrics of fine-tuned runs, by what they are called in the table.
SCORES = {
    'f1': 'F1', 'macro_f1': 'Macro F1', 'micro_f1': 'Micro F1',
    'matthews_correlation': 'Matthews correlation', 'pearson': 'Pearson r',
    'spearmanr': 'Spearman ρ', 'rmse': 'Root mean square error', 'exact_match': 'Exact match',
}
KEY_ROWS = ('Evaluation loss', 'Top-1 usage')       # and what follows in brackets


def table(runs: Sequence[RunRecord]) -> str:
    """The runs side by side as HTML; rows that hold for none of them are left out."""
    heads = ''.join(f'<th scope="col"><i style="background:{style(index)[0]}"></i>'
                    f'{html.escape(run.name)}</th>' for index, run in enumerate(runs))
    sections = [('', _run_rows(loss_of(runs)[1])), *(
        (f'{titled(runs, layer)}: memory at the last evaluation', _memory_rows(layer))
        for layer in layers_of(runs))]
    body = ''
    for title, rows in sections:
        if title:
            body += f'<tr class="section"><th colspan="{len(runs) + 1}">{title}</th></tr>'
        for label, write in rows:
            values = [write(run) for run in runs]
            if set(values) == {'–'}:
                continue
            cells = ''.join(f'<td>{html.escape(value)}</td>' for value in values)
            key = ' class=key' if label.startswith(KEY_ROWS) else ''
            body += f'<tr{key}><th scope="row">{label}</th>{cells}</tr>'
    head = f'<thead><tr><td></td>{heads}</tr></thead>'
    return f'<div class="wide"><table>{head}<tbody>{body}</tbody></table></div>'


def _run_rows(unit: str) -> list[tuple[str, Callable[[RunRecord], str]]]:
    """Rows of the table that hold for a whole run; `unit`: of the loss, see `loss_of`."""

    def last(key: str, form: str) -> Callable[[RunRecord], str]:
        return lambda run: (format(run.evals[-1][key], form)
                            if run.evals and key in run.evals[-1] else '–')

    def initialisation(run: RunRecord) -> str:
        return f'from {run.parent or Path(run.init_from).name}' if run.init_from else 'scratch'

    def steps(run: RunRecord) -> str:
        before = f' (after {run.start_step:,})' if run.start_step else ''
        return f'{run.steps:,}{before}'

    def tokens(run: RunRecord) -> str:
        before = f' (after {thousands(run.start_tokens)})' if run.start_tokens else ''
        return f'{thousands(run.tokens)}{before}'

    def speed(run: RunRecord) -> str:
        speeds = sorted(r['tokens_per_second'] for r in run.train if 'tokens_per_second' in r)
        return thousands(speeds[len(speeds) // 2]) if speeds else '–'

    return [
        ('Placement of the memory', lambda run: run.placement),
        ('Initialisation', initialisation),
        ('Steps', steps),
        ('Training tokens', tokens),
        ('Parameters', lambda run: thousands(run.parameters) if run.parameters else '–'),
        ('Tokens per second (median)', speed),
        (f'Training loss, smoothed{unit}',
         lambda run: f'{smoothed(column(run.train, "loss"))[-1]:.3f}' if run.train else '–'),
        (f'Evaluation loss{unit}', last('loss', '.3f')),
        ('Perplexity', last('perplexity', ',.1f')),
        ('Accuracy', last('accuracy', '.1%')),
        *((label, last(metric, '.4f')) for metric, label in SCORES.items()),
    ]


def _memory_rows(layer: str) -> list[tuple[str, Callable[[RunRecord], str]]]:
    """Rows of the table for the memory of one layer."""

    def usage(write: Callable[[dict[str, Any]], str]) -> Callable[[RunRecord], str]:
        return lambda run: (write(run.memory_evals[-1]['memory'][layer])
                            if layer in run.layers else '–')

    def tokens(run: RunRecord) -> str:
        return thousands(run.memory_evals[-1]['eval_tokens']) if layer in run.layers else '–'

    def holding(memory: dict[str, Any]) -> str:
        return ' / '.join(f'{memory[f"slots_{share}"] * 100:.3g}' for share in (50, 90, 99)) + ' %'

    return [
        ('Slots S · heads H · reads K',
         usage(lambda m: f'{thousands(m["slots"])} · {m["heads"]} · {m["k"]}')),
        ('Evaluation tokens T', tokens),
        ('Top-1 usage', usage(lambda m: f'{m["top_1_usage"]:.1%}')),
        ('Uniform picks would reach', usage(lambda m: f'{m["ceiling"]:.1%}')),
        ('Top-K usage', usage(lambda m: f'{m["top_k_usage"]:.1%}')),
        ('KL from uniform (nats)', usage(lambda m: f'{m["kl"]:.3f}')),
        ('Gini', usage(lambda m: f'{m["gini"]:.3f}')),
        ('Slots holding 50 / 90 / 99 %', usage(holding)),
        ('Dead slots', usage(lambda m: f'{m["dead"]:.1%}' if m.get('dead') is not None else '–')),
        ('Outdated slots · mean drift', usage(
            lambda m: f'{m["outdated"]:.1%} · {m["drift"]:.3f}' if 'drift' in m else '–')),
    ]

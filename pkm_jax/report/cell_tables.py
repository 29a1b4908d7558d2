"""Tables over the cells of an ablation, with mean and deviation over seeds."""

import csv
import dataclasses
import io
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from pkm_jax.report.cells import Cell
from pkm_jax.report.runs import thousands
from pkm_jax.report.table import SCORES


@dataclasses.dataclass(frozen=True)
class Column:
    """A number of a cell, or of one of its memories; None where it has none."""
    title: str
    of: Callable[..., float | None]
    form: Callable[[float], str]


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of names and of the values of each column, over the cells that share a row."""
    names: tuple[str, ...]
    columns: list[Column]
    rows: list[tuple[tuple[str, ...], list[list[float]]]]

    def markdown(self) -> str:
        """Means, and where there are several cells deviations after ±."""
        heads, *body = self._lines()
        lines = [heads, ['---'] * len(heads), *body]
        return '\n'.join(f'| {" | ".join(line)} |' for line in lines)

    def latex(self) -> str:
        """The same as a tabular of the package booktabs."""
        head, *body = (' & '.join(map(_escaped, line)) + r' \\' for line in self._lines())
        columns = 'l' * len(self.names) + 'r' * (1 + len(self.columns))
        return '\n'.join([rf'\begin{{tabular}}{{{columns}}}', r'\toprule', head, r'\midrule', *body,
                          r'\bottomrule', r'\end{tabular}']) + '\n'

    def csv(self) -> str:
        """In full precision: the cells, mean and deviation of each column."""
        file = io.StringIO()
        write = csv.writer(file, lineterminator='\n').writerow
        write([*self.names, *(f'{column.title}: {part}' for column in self.columns
                              for part in ('cells', 'mean', 'deviation'))])
        for names, values in self.rows:
            write([*names, *(part for some in values
                             for part in ((len(some), *mean_and_deviation(some)) if some else
                                          (0, '', '')))])
        return file.getvalue()

    def _lines(self) -> list[list[str]]:
        heads = [*self.names, 'n', *(column.title for column in self.columns)]
        return [heads, *([*names, str(max(map(len, values))), *(
            _with_deviation(some, column.form) for some, column in zip(values, self.columns))]
                         for names, values in self.rows)]


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and the standard deviation by n − 1; 0 of a single value."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.


def model_table(cells: Sequence[Cell], by: Callable[[Cell], str]) -> Table:
    """Loss, accuracy, speed, cost and fine-tuned scores of finished cells, a row for each `by`."""
    tasks = sorted({task for cell in cells for task in _tasks(cell)})
    columns = [
        Column('steps', lambda cell: cell.described['trained']['steps'], thousands),
        Column('steps in all', lambda cell: cell.in_all('steps'), thousands),
        Column('tokens in all', lambda cell: cell.in_all('tokens'), thousands),
        Column('PFLOP in all', lambda cell: cell.in_all('flops') / 1e15, '{:,.3g}'.format),
        Column('parameters', lambda cell: cell.run.parameters, thousands),
        Column('loss (nats)', _last('loss'), '{:.4f}'.format),
        Column('perplexity', _last('perplexity'), '{:.2f}'.format),
        Column('accuracy', _last('accuracy'), _percent),
        Column('tokens/s', _speed, thousands),
        Column('device hours', lambda cell: cell.device_hours, '{:.2f}'.format),
        Column('loss off by refreshing (mnats)', _refreshed, '{:.2f}'.format),
        Column('loss up without memories (mnats)', _unread, '{:.2f}'.format),
        *(Column(f'{task} ({_metric(cells, task)})', _score(task), '{:.4f}'.format)
          for task in tasks)]
    return _table(('cell',), columns, [((by(cell),), (cell,)) for cell in cells])


def memory_table(cells: Sequence[Cell], by: Callable[[Cell], str]) -> Table:
    """Usage and drift of each memory at the last evaluation, a row for each `by` and layer."""
    columns = [
        Column('tokens T', lambda cell, _: cell.run.evals[-1]['eval_tokens'], thousands),
        Column('top-1', _memory('top_1_usage'), _percent),
        Column('uniform top-1', _memory('ceiling'), _percent),
        Column('top-K', _memory('top_k_usage'), _percent),
        Column('KL (nats)', _memory('kl'), '{:.3f}'.format),
        Column('Gini', _memory('gini'), '{:.3f}'.format),
        Column('dead', _memory('dead'), _percent),
        Column('outdated', _memory('outdated'), _percent),
        Column('mean drift', _memory('drift'), '{:.3f}'.format),
        Column('loss up without it (mnats)', _refresh('rise'), '{:.2f}'.format),
        Column('loss off by refreshing (mnats)', _refresh('fall'), '{:.2f}'.format),
        Column('of it outdated (mnats)', _refresh('outdated'), '{:.2f}'.format)]
    rows = [((by(cell), layer), (cell, layer)) for cell in cells for layer in cell.run.layers]
    return _table(('cell', 'memory'), columns, rows)


def _table(names, columns, given) -> Table:
    """Those of several rows with the same names as one; columns without any value are left out."""
    rows: dict[tuple[str, ...], list[Any]] = {}
    for key, what in given:
        rows.setdefault(key, []).append(what)
    found = [(key, [[float(value) for one in some if (value := column.of(*one)) is not None]
                    for column in columns]) for key, some in rows.items()]
    kept = [index for index in range(len(columns)) if any(values[index] for _, values in found)]
    return Table(names, [columns[index] for index in kept],
                 [(key, [values[index] for index in kept]) for key, values in found])


def _last(key):
    return lambda cell: cell.run.evals[-1].get(key) if cell.run.evals else None


def _memory(key):
    return lambda cell, layer: cell.run.memory_evals[-1]['memory'][layer].get(key)


def _refresh(key):
    def of(cell, layer):
        found = cell.described.get('refreshed', {}).get('memories', {}).get(layer, {}).get(key)
        return None if found is None else 1e3 * found
    return of


def _refreshed(cell):
    found = cell.described.get('refreshed')
    return 1e3 * (found['before'] - found['after']) if found else None


def _unread(cell):
    found = cell.described.get('refreshed', {}).get('rise')     # cells of before have none
    return None if found is None else 1e3 * found


def _speed(cell):
    speeds = sorted(line['tokens_per_second'] for line in cell.run.train
                    if 'tokens_per_second' in line)
    return speeds[len(speeds) // 2] if speeds else None


def _tasks(cell):
    return cell.described.get('finetuned', {}).get('tasks', {})


def _score(task):
    return lambda cell: _tasks(cell).get(task, {}).get('mean')


def _metric(cells, task):
    metric = next(_tasks(cell)[task]['metric'] for cell in cells if task in _tasks(cell))
    return SCORES.get(metric, metric)


def _percent(share):
    return f'{share:.1%}'


def _with_deviation(values, form):
    if not values:
        return '–'
    mean, deviation = mean_and_deviation(values)
    text = form(mean)
    return f'{text} ± {form(deviation)}' if deviation else text


def _escaped(text):
    text = re.sub(r'([%_&#$])', r'\\\1', text)
    return text.replace('±', r'$\pm$').replace('–', '--')

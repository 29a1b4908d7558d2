"""What a memory is worth: cells beside the same training without memories, in pairs of a seed."""

import csv
import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy import stats

from pkm_jax.report.cell_tables import mean_and_deviation
from pkm_jax.report.cells import Cell

# What need not be equal in these sections of a config.json: only memories depend on it, or nothing.
FREE = {'model': ('remat',), 'data': ('cache', 'workers'),
        'train': ('values_learning_rate', 'values_epsilon', 'values_optimizer', 'fsdp',
                  'max_skipped_steps')}
DIFFERENCE = 'difference'       # of an evaluation: its loss minus that of the pair's other cell


@dataclasses.dataclass(frozen=True)
class Compared:
    """The pairs of a group at the last evaluation that all of them have."""
    cell: str
    pairs: int
    tokens: int         # of the cell's own training
    mean: float         # of the loss minus that without memories, nats
    deviation: float    # by n − 1; 0 of one pair
    t: float            # Student's, of the differences; NaN where it has none
    p: float            # two-sided


def paired(cells: Sequence[Cell]) -> dict[str, list[Cell]]:
    """By group, finished cells with memories that have a pair, with the difference at each of their
    evaluations that the other has too.

    The other one has no memories, and the same settings otherwise: seed, start, model, data and
    training. So both see the same batches at the same rates. Cells without any common evaluation
    are left out.
    """
    plain = {_setting(cell): cell for cell in cells if cell.run.started.get('memories') == {}}
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        other = plain.get(_setting(cell))
        if other and cell.run.started.get('memories'):
            beside = _beside(cell, other)
            if beside.run.evals:
                groups.setdefault(cell.group, []).append(beside)
    return groups


def compared(groups: dict[str, list[Cell]]) -> list[Compared]:
    """Each group with Student's test of its differences, where all its pairs have an evaluation."""
    found = []
    for name, cells in groups.items():
        by_cell = [{line['tokens']: line[DIFFERENCE] for line in cell.run.evals} for cell in cells]
        if tokens := set.intersection(*map(set, by_cell)):
            differences = [one[max(tokens)] for one in by_cell]
            tested = len(differences) > 1 and np.ptp(differences) > 0
            t, p = stats.ttest_1samp(differences, 0) if tested else (math.nan, math.nan)
            found.append(Compared(name, len(cells), max(tokens), *mean_and_deviation(differences),
                                  float(t), float(p)))
    return found


def markdown(rows: Sequence[Compared]) -> str:
    """A table of them."""
    lines = ['| cell | n | loss minus that without memories (nats) | t | p |',
             '| --- | --- | --- | --- | --- |']
    for row in rows:
        deviation = f' ± {row.deviation:.4f}' if row.deviation else ''
        t, p = (format(number, form) if math.isfinite(number) else '–'
                for number, form in ((row.t, '.1f'), (row.p, '.2g')))
        lines.append(f'| {row.cell} | {row.pairs} | {row.mean:.4f}{deviation} | {t} | {p} |')
    return '\n'.join(lines)


def write_csv(path: Path, rows: Sequence[Compared]) -> None:
    """The same in full precision."""
    with path.open('w', newline='', encoding='utf-8') as file:
        write = csv.writer(file, lineterminator='\n').writerow
        write([field.name for field in dataclasses.fields(Compared)])
        for row in rows:
            write(dataclasses.astuple(row))


def _setting(cell):
    """What a cell shares with the same training without memories."""
    config = cell.run.config
    sections = [{name: value for name, value in config.get(section, {}).items() if name not in free}
                for section, free in FREE.items()]
    return json.dumps([config.get('seed'), config.get('task'), cell.described.get('starts_from'),
                       *sections], sort_keys=True)


def _beside(cell, other):
    losses = {line['tokens']: line['loss'] for line in other.run.evals}
    evals = [line | {DIFFERENCE: line['loss'] - losses[line['tokens']]}
             for line in cell.run.evals if line['tokens'] in losses]
    return dataclasses.replace(cell, run=dataclasses.replace(cell.run, evals=evals))

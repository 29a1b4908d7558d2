"""What a memory is worth: cells beside the same training without memories, in pairs of a seed.

Or beside one with wider feed-forward layers instead, such as takes as long.
"""

import csv
import dataclasses
import json
import math
import operator
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy import stats

from pkm_jax.report.cell_tables import mean_and_deviation
from pkm_jax.report.cells import Cell, common_evaluations

WIDTH = 'feed_forward_width'
# What need not be equal in these sections of a config.json: only memories depend on it, or nothing.
# Widths are compared apart.
FREE = {'model': ('remat', WIDTH), 'data': ('cache', 'workers'),
        'train': ('values_learning_rate', 'values_epsilon', 'values_optimizer', 'fsdp',
                  'max_skipped_steps')}
DIFFERENCE = 'difference'       # of an evaluation: its loss minus that of the pair's other cell
Pairs = dict[tuple[str, str], list[Cell]]


@dataclasses.dataclass(frozen=True)
class Compared:
    """The pairs of two groups at the last evaluation that all of them have."""
    cell: str
    beside: str         # the group without memories
    pairs: int
    tokens: int         # of the cell's own training
    mean: float         # of the loss minus that of the other, nats
    deviation: float    # by n − 1; 0 of one pair
    t: float            # Student's, of the differences; NaN where it has none
    p: float            # two-sided


def paired(cells: Sequence[Cell]) -> Pairs:
    """By two groups, finished cells of the first that have a pair in the second, with the
    difference at each of their evaluations that the other has too.

    The other one has no memories, and the same settings otherwise: seed, start, model, data and
    training. So both see the same batches at the same rates. Only its feed-forward layers may have
    another width; then those of what it starts from may too, and cells without memories have pairs
    as well, of those before them. Cells without any common evaluation are left out.
    """
    plain: dict[str, list[Cell]] = {}
    for cell in cells:
        others = plain.setdefault(_setting(cell), [])
        if _memories(cell) == {} and not any(_same_model(cell, other) for other in others):
            others.append(cell)
    groups: Pairs = {}
    for cell in cells:
        for other in plain[_setting(cell)]:
            if other is cell:
                break
            if _memories(cell) and _same_model(cell, other) or _wider(cell, other):
                beside = _beside(cell, other)
                if beside.run.evals:
                    groups.setdefault((cell.group, other.group), []).append(beside)
    return groups


def compared(groups: Pairs) -> list[Compared]:
    """Each two groups with Student's test of their differences, where all their pairs have an
    evaluation."""
    found = []
    for names, cells in groups.items():
        if evaluations := common_evaluations(cells, operator.itemgetter(DIFFERENCE)):
            tokens, differences = evaluations.popitem()     # the last
            tested = len(differences) > 1 and np.ptp(differences) > 0
            t, p = stats.ttest_1samp(differences, 0) if tested else (math.nan, math.nan)
            found.append(Compared(*names, len(cells), tokens, *mean_and_deviation(differences),
                                  float(t), float(p)))
    return found


def markdown(rows: Sequence[Compared]) -> str:
    """A table of them."""
    lines = ['| cell | beside | n | loss minus that of the other (nats) | t | p |',
             '| --- | --- | --- | --- | --- | --- |']
    for row in rows:
        deviation = f' ± {row.deviation:.4f}' if row.deviation else ''
        t, p = (format(number, form) if math.isfinite(number) else '–'
                for number, form in ((row.t, '.1f'), (row.p, '.2g')))
        loss = f'{row.mean:+.4f}{deviation}'
        lines.append(f'| {row.cell} | {row.beside} | {row.pairs} | {loss} | {t} | {p} |')
    return '\n'.join(lines)


def write_csv(path: Path, rows: Sequence[Compared]) -> None:
    """The same in full precision."""
    with path.open('w', newline='', encoding='utf-8') as file:
        write = csv.writer(file, lineterminator='\n').writerow
        write([field.name for field in dataclasses.fields(Compared)])
        for row in rows:
            write(dataclasses.astuple(row))


def _memories(cell):
    """Those of a cell, {} of one without; None where it does not say."""
    return cell.run.started.get('memories')


def _same_model(cell, other):
    """Whether two cells of a setting have one model, but for memories, and one start."""
    return _width(cell) == _width(other) and cell.starts_from == other.starts_from


def _wider(cell, other):
    """Whether feed-forward layers of another width are all that two cells of a setting, and what
    they start from, differ in beside memories."""
    return (_memories(cell) is not None and _width(cell) != _width(other)
            and _start(cell) == _start(other))


def _width(cell):
    return cell.run.config.get('model', {}).get(WIDTH)


def _start(cell):
    """What a cell starts from, by its settings; by its name where it is not there."""
    before = cell.before
    return ([_setting(before), _memories(before), _start(before)] if before and before.run
            else cell.starts_from)


def _setting(cell):
    """What a cell shares with those beside it, but for what it starts from."""
    config = cell.run.config
    sections = [{name: value for name, value in config.get(section, {}).items() if name not in free}
                for section, free in FREE.items()]
    return json.dumps([config.get('seed'), config.get('task'), *sections], sort_keys=True)


def _beside(cell, other):
    losses = {line['tokens']: line['loss'] for line in other.run.evals}
    evals = [line | {DIFFERENCE: line['loss'] - losses[line['tokens']]}
             for line in cell.run.evals if line['tokens'] in losses]
    return dataclasses.replace(cell, run=dataclasses.replace(cell.run, evals=evals))

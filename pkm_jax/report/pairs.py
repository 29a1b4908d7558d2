"""What a memory is worth: cells beside the same training without memories, in pairs of a seed."""

import dataclasses
import math
from collections.abc import Sequence

from scipy import stats

from pkm_jax.report.cell_tables import Column, Table
from pkm_jax.report.cells import Cell

DIFFERENCE = 'difference'       # of an evaluation: its loss less that of the pair's other cell


def paired(cells: Sequence[Cell]) -> dict[str, list[Cell]]:
    """By group, finished cells that have a pair, their evaluations with the difference of losses.

    The other cell of a pair is the first without memories of the same seed, start, steps, batch and
    learning rate: both see the same batches. Groups without any pair are left out.
    """
    plain: dict[tuple, Cell] = {}
    for cell in cells:
        if not cell.run.layers:
            plain.setdefault(_batches(cell), cell)
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        other = plain.get(_batches(cell))
        if other and other is not cell:
            groups.setdefault(cell.group, []).append(_beside(cell, other))
    return groups


def pair_table(groups: dict[str, list[Cell]]) -> Table:
    """Mean and deviation of the differences at the last evaluation, with Student's t of pairs."""
    columns = [Column('loss less that without memories (nats)', _last, '{:.4f}'.format),
               Column('t', _last, '{:.1f}'.format), Column('p', _last, '{:.2g}'.format)]
    rows: list[tuple[tuple[str, ...], list[list[float]]]] = []
    for name, cells in groups.items():
        differences = [float(last) for cell in cells if (last := _last(cell)) is not None]
        t, p = stats.ttest_1samp(differences, 0) if len(differences) > 1 else (math.nan, math.nan)
        tested = [[float(number)] if math.isfinite(number) else [] for number in (t, p)]
        rows.append(((name,), [differences, *tested]))
    return Table(('cell',), columns, rows)


def _batches(cell):
    """What decides which batches a run sees, and at which rates."""
    train = cell.run.config['train']
    return (cell.described.get('seed'), cell.described.get('starts_from', ''),
            *(train.get(key) for key in ('steps', 'batch', 'learning_rate')))


def _beside(cell, other):
    losses = {line['tokens']: line['loss'] for line in other.run.evals}
    evals = [line | {DIFFERENCE: line['loss'] - losses[line['tokens']]}
             for line in cell.run.evals if line['tokens'] in losses]
    return dataclasses.replace(cell, run=dataclasses.replace(cell.run, evals=evals))


def _last(cell):
    return cell.run.evals[-1][DIFFERENCE] if cell.run.evals else None

"""The report of an ablation: report.md with its tables, also as .csv and .tex, and figures."""

import math
from collections.abc import Sequence
from pathlib import Path

from pkm_jax.memory.drift import OUTDATED
from pkm_jax.refusal import Refusal
from pkm_jax.report import pairs
from pkm_jax.report.bands import band_figures
from pkm_jax.report.cell_tables import memory_table, model_table
from pkm_jax.report.cells import PLAN, Cell, read_cells, read_json

BUDGETS = {
    'own': 'Each cell is trained for the steps of its configuration. A cell that starts from '
           'another has had the steps of that one as well: “in all” counts both.',
    'steps': 'All cells that no other starts from have had equally many steps in all, those of '
             'the cells that they start from included.',
    'compute': 'All cells that no other starts from have had the same compute in all (matrix '
               'products of forward and backward passes), that of the cells that they start from '
               'included.',
}


def write_ablation(folder: Path) -> Path:
    """Writes FOLDER/ablation/report.md and what belongs to it; returns its path.

    tables `model` and `memory` (.csv, .tex) and `pairs` (.csv) are means over seeds, `cells` and
    `cells_memory` (.csv) have a row for each cell.

    Raises:
      Refusal: the folder is not one of an ablation.
    """
    if not (folder / PLAN).exists():
        raise Refusal(f'{folder} has no {PLAN}: it is no folder of an ablation.')
    cells = read_cells(folder)
    done = [cell for cell in cells if cell.state == 'done']
    target = folder / 'ablation'
    target.mkdir(exist_ok=True)
    text = [f'# Ablation {folder.resolve().name}', _states(cells), _failures(cells),
            BUDGETS[read_json(folder / PLAN)['budget']]]
    if done:
        tables = {'model': model_table(done, lambda cell: cell.group),
                  'memory': memory_table(done, lambda cell: cell.group)}
        for name, table in tables.items():
            (target / f'{name}.csv').write_text(table.csv(), encoding='utf-8')
            (target / f'{name}.tex').write_text(table.latex(), encoding='utf-8')
        for name, of in (('cells', model_table), ('cells_memory', memory_table)):
            table = of(done, lambda cell: cell.name)
            (target / f'{name}.csv').write_text(table.csv(), encoding='utf-8')
        paired = pairs.paired(done)
        beside = pairs.compared(paired)
        pairs.write_csv(target / 'pairs.csv', beside)
        text += ['## Models', tables['model'].markdown(),
                 'Means over seeds ± one standard deviation (n − 1), of the last evaluation.',
                 *(['## Memories', tables['memory'].markdown(), _definitions()]
                   if tables['memory'].rows else []),
                 *(['## Beside the same training without memories', pairs.markdown(beside),
                    'Pairs of the same seed, which see the same batches, at the last evaluation '
                    'that all have; t and p: Student’s test of these differences. Where widths of '
                    'feed-forward layers differ, so may those of what the cells start from.']
                   if beside else []),
                 '## During training', *_figures(done, paired, target)]
    text += ['## Cost', _cost(cells), '## Commands', _commands(cells)]
    page = target / 'report.md'
    page.write_text('\n\n'.join(filter(None, text)) + '\n', encoding='utf-8')
    return page


def _states(cells: Sequence[Cell]) -> str:
    counts = {state: sum(cell.state == state for cell in cells)
              for state in ('done', 'failed', 'unfinished', 'not begun')}
    said = f'{len(cells)} cells: ' + ', '.join(f'{count} {state}' for state, count in counts.items()
                                               if count) + '.'
    for state in ('unfinished', 'not begun'):
        if names := [cell.name for cell in cells if cell.state == state]:
            said += f' {state.capitalize()}: {", ".join(names)}.'
    return said


def _failures(cells: Sequence[Cell]) -> str:
    lines = [f'* **{cell.name}**: {" ".join(cell.failure.split())}'
             for cell in cells if cell.failure]
    return '\n'.join(['## Failed', '', *lines]) if lines else ''


def _definitions() -> str:
    return (
        'Usage is measured over the T real tokens of a fixed validation set, and grows with T; '
        '“uniform top-1” is what uniform picks would reach. Dead: unread in the last '
        'memory.dead_after steps. Drift of a slot: 1 − the correlation of its scores now with '
        f'those when its value was last updated; outdated: above {OUTDATED:g}. Loss off by '
        'refreshing: what the validation loss falls by when values move to what their readers ask '
        'for; up without memories: what it rises by when what they read is zeros. docs/method.md, '
        'section 4, has all of it.')


def _figures(done: Sequence[Cell], paired: pairs.Pairs, target: Path) -> list[str]:
    groups: dict[str, list[Cell]] = {}
    for cell in done:
        groups.setdefault(cell.group, []).append(cell)
    lines = ['Means over seeds; bands of one standard deviation.']
    for name, figure in band_figures(groups, paired).items():
        figure.savefig(target / f'{name}.png', dpi=130)
        lines.append(f'![{name}]({name}.png)')
    return lines


def _cost(cells: Sequence[Cell]) -> str:
    wall = math.fsum(cell.seconds for cell in cells)
    hours = math.fsum(cell.device_hours for cell in cells)
    said = [f'{wall / 3600:.2f} hours of wall time, {hours:.2f} device hours, those of starting, '
            f'compiling and evaluating included, and of cells that failed.']
    for title, key in (('Hardware', 'hardware'), ('Versions', 'versions')):
        found: dict[str, list[str]] = {}
        for cell in cells:
            if what := cell.described.get(key):
                text = what if isinstance(what, str) else ', '.join(
                    f'{name} {version}' for name, version in what.items())
                found.setdefault(text, []).append(cell.name)
        said += [f'{title}: {text}' + (f' ({", ".join(names)})' if len(found) > 1 else '') + '.'
                 for text, names in found.items()]
    return '\n\n'.join(said)


def _commands(cells: Sequence[Cell]) -> str:
    """How to train each cell again, with what it starts from, in another folder."""
    lines = [f'# {cell.name}: {cell.seconds:,.0f} s\n{cell.described["command"]}'
             for cell in cells if 'command' in cell.described]
    return ('Each trains a cell anew, with what it starts from, in another folder; on the same '
            'CPUs and versions the numbers are the same to the bit, on GPUs up to rounding.'
            '\n\n```sh\n'
            + '\n'.join(lines) + '\n```')

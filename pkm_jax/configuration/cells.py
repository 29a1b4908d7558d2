"""The cells of an ablation: every run that a configuration with a section `ablation` asks for."""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np

from pkm_jax.configuration.ablation import Ablation
from pkm_jax.configuration.command_line import check_field
from pkm_jax.configuration.resolve import is_ablation, resolve, runs_of, section_of
from pkm_jax.configuration.run import Run
from pkm_jax.data.files import expand
from pkm_jax.refusal import Refusal

Point = dict[str, Any]      # a value for each axis


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of an ablation; those of a `group` differ in their seeds alone."""
    name: str                   # of its folder too
    group: str
    seed: int
    point: Point
    config: dict[str, Any]      # its own, complete
    starts_from: str            # the name of another cell, or ''

    @property
    def folder(self) -> Path:
        """Where it is trained."""
        return Path(self.config['workdir'])

    def run(self) -> Run:
        """The run.

        Raises:
          Refusal: its settings cannot work; the message names them.
        """
        return resolve(self.config, self.name)


def cells_of(config: ml_collections.ConfigDict) -> list[Cell]:
    """The cells in the order in which they are trained: one seed after another.

    Settings of a cell that cannot work are refused by its `run`, not here.

    Raises:
      Refusal: the section `ablation` cannot work: a field that is not there, a run to be trained
        once that is none, a cell that starts from a later one.
    """
    section = section_of(Ablation, config.ablation.to_dict(), 'ablation')
    runs = config.runs.to_dict() or {'': {}}
    if unknown := sorted(set(section.once) - set(runs)):
        raise Refusal(f'ablation.once has {unknown[0]!r}, which is none of the runs: '
                      f'{", ".join(filter(None, runs)) or "there are none"}.')
    for field, _ in section.axes:
        check_field(field, config)
    points = _points(section)
    cells = [_cell(config, runs, section, name, {}, None) for name in section.once]
    cells += [_cell(config, runs, section, name, point, seed)
              for seed in section.seeds for point in points for name in runs
              if name not in section.once]
    for number, cell in enumerate(cells):
        if cell.starts_from and cell.starts_from not in (one.name for one in cells[:number]):
            raise Refusal(f'The run {cell.name} starts from {cell.starts_from}, which comes after '
                          f'it: name it before.')
    return _with_budget(cells, section.budget)


def every_run(config: ml_collections.ConfigDict) -> list[Run]:
    """The runs of any configuration of pretraining, those of all cells where it is an ablation.

    Raises:
      Refusal: settings of one of them cannot work.
    """
    return [cell.run() for cell in cells_of(config)] if is_ablation(config) else runs_of(config)


def with_sources(cells: list[Cell], chosen: Iterable[Cell]) -> list[Cell]:
    """The chosen cells and those that they start from, in the order of `cells`."""
    needed, by_name = set(), {cell.name: cell for cell in cells}
    for cell in chosen:
        while cell and cell.name not in needed:
            needed.add(cell.name)
            cell = by_name.get(cell.starts_from)
    return [cell for cell in cells if cell.name in needed]


def shard(cells: list[Cell], part: str) -> list[Cell]:
    """The cells of part 'i/n', i from 1: neighbours, as many in each part, but for one.

    Raises:
      Refusal: it is no such part.
    """
    number, _, parts = part.partition('/')
    if not (number.isdecimal() and parts.isdecimal() and 1 <= int(number) <= int(parts)):
        raise Refusal(f'--shard={part}: it must be i/n, with i from 1 to n, such as 2/3.')
    return [cells[index] for index in np.array_split(np.arange(len(cells)), int(parts))[
        int(number) - 1]]


def _points(section: Ablation) -> list[Point]:
    """The combinations of the axes, or a sample of them in their order."""
    fields = [field for field, _ in section.axes]
    every = [dict(zip(fields, values))
             for values in itertools.product(*(values for _, values in section.axes))]
    if not section.sample:
        return every
    if section.sample > len(every):
        raise Refusal(f'ablation.sample = {section.sample}, but the axes have {len(every)} '
                      f'combinations: lower it, or set it to 0 for all.')
    chosen = np.random.default_rng(section.sample_seed).choice(
        len(every), section.sample, replace=False)
    return [every[index] for index in sorted(chosen)]


def _cell(config: ml_collections.ConfigDict, runs: dict[str, Any], section: Ablation, name: str,
          point: Point, seed: int | None) -> Cell:
    """A cell; `seed` None: of a run that is trained once."""
    one = config.copy_and_resolve_references()
    one.runs = ml_collections.ConfigDict()
    one.update(runs[name])
    for field, value in point.items():
        try:
            one.update_from_flattened_dict({field: value})
        except TypeError as error:
            raise Refusal(f'ablation.axes: {field} cannot be {value!r}: {error}') from error
    if seed is not None:
        one.seed = seed
    folder, source = Path(expand(config.workdir)), ''
    if one.init_from and one.init_from in runs:
        once = one.init_from in section.once
        source = _name(one.init_from, {} if once else point, None if once else seed)
        one.init_from = str(folder / source)
    own = _name(name, point, seed)
    one.workdir = str(folder / own)
    return Cell(own, _name(name, point, None), one.seed, point, one.to_dict(), source)


def _name(run: str, point: Point, seed: int | None) -> str:
    fields = [field.rpartition('.')[2] for field in point]
    parts = [run, *(f'{field if fields.count(last) > 1 else last}={_text(value)}'
                    for (field, value), last in zip(point.items(), fields))]
    parts += [] if seed is None else [f'seed{seed}']
    return '-'.join(filter(None, parts)) or 'all'


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return '+'.join(map(_text, value))
    return (f'{value:g}' if isinstance(value, float) else str(value)).replace('/', '_')


def _with_budget(cells: list[Cell], budget: str) -> list[Cell]:
    """Cells that no other starts from with so many steps that their budgets are the greatest's."""
    if budget == 'own':
        return cells
    spent, costs = {}, dict(_costs(cells, budget))
    for cell in cells:
        if cell.name in costs:
            spent[cell.name] = (spent.get(cell.starts_from, 0)
                                + cell.config['train']['steps'] * costs[cell.name])
    sources = {cell.starts_from for cell in cells}
    most = max((spent[name] for name in spent.keys() - sources), default=0)
    return [_longer(cell, round((most - spent[cell.name]) / costs[cell.name]))
            if cell.name in spent.keys() - sources else cell for cell in cells]


def _costs(cells: list[Cell], budget: str) -> Iterator[tuple[str, int]]:
    """What a step of each cell whose settings work costs."""
    for cell in cells:
        try:
            run = cell.run()
        except Refusal:
            continue
        yield cell.name, (1 if budget == 'steps' else
                          run.with_vocabulary(run.task.vocab_size).flops_per_step)


def _longer(cell: Cell, steps: int) -> Cell:
    train = cell.config['train'] | {'steps': cell.config['train']['steps'] + steps}
    return dataclasses.replace(cell, config=cell.config | {'train': train})

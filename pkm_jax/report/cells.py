"""The cells of an ablation as their files tell them.

WORKDIR/ablation.json says which there are to be; cell.json in the folder of each how it is trained
again, on what it was, for how long, and what came of it. So folders of several machines can be
copied into one. `training.cells` writes both.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pkm_jax.report.runs import RunRecord, read_run

PLAN, CELL = 'ablation.json', 'cell.json'


@dataclasses.dataclass(frozen=True)
class Cell:
    """A cell; `run` is None of one that has no metrics, `before` the cell that it starts from."""
    name: str
    described: dict[str, Any]
    run: RunRecord | None
    before: 'Cell | None' = None

    @property
    def group(self) -> str:
        """The name that it shares with its other seeds."""
        return self.described.get('group', self.name)

    @property
    def starts_from(self) -> str:
        """The name of the cell that it starts from, '' of one from scratch."""
        return self.described.get('starts_from', '')

    @property
    def failure(self) -> str:
        return self.described.get('failure', '')

    @property
    def state(self) -> str:
        """'failed', 'done', 'unfinished' or 'not begun'."""
        if self.failure:
            return 'failed'
        if 'trained' in self.described and self.run:
            return 'done'
        return 'unfinished' if self.run else 'not begun'

    @property
    def seconds(self) -> float:
        """Of all work on it, those of starting, compiling and evaluating included."""
        return math.fsum(self.described.get('seconds', {}).values())

    @property
    def device_hours(self) -> float:
        return self.seconds * self.described.get('devices', 1) / 3600

    def in_all(self, of: str) -> float:
        """'steps', 'tokens' or 'flops' of its training and that of what it starts from; NaN where
        that is not known."""
        own = self.run.tokens if of == 'tokens' and self.run else self.described.get(
            'trained', {}).get(of, math.nan)
        return float(own) + (self.before.in_all(of) if self.before else 0)


def read_cells(folder: Path) -> list[Cell]:
    """The cells of an ablation in the order of its plan, whatever became of them."""
    found: dict[str, Cell] = {}
    for name in read_json(folder / PLAN).get('cells', ()):
        run = read_run(folder / name) if (folder / name / 'metrics.jsonl').exists() else None
        described = read_json(folder / name / CELL)
        found[name] = Cell(name, described, run if run and (run.train or run.evals) else None,
                           found.get(described.get('starts_from', '')))
    return list(found.values())


def common_evaluations(
    cells: Sequence[Cell], value: Callable[[dict[str, Any]], float | None],
) -> dict[int, list[float]]:
    """{tokens: of each cell its value} of the evaluations in which all of them have one, in order.

    `value` is of a line of an evaluation, None where it has none.
    """
    by_cell = [{line['tokens']: found for line in cell.run.evals
                if (found := value(line)) is not None} for cell in cells]
    common = set.intersection(*map(set, by_cell)) if by_cell else ()
    return {tokens: [found[tokens] for found in by_cell] for tokens in sorted(common)}


def read_json(path: Path) -> dict[str, Any]:
    """A file's object; {} where there is no such file."""
    return json.loads(path.read_text(encoding='utf-8')) if path.exists() else {}

"""The files of an ablation, as `report.cells` reads them: its plan, and what came of each cell."""

import contextlib
import json
import platform
import shlex
import time
import traceback
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from pkm_jax.configuration.cells import Cell
from pkm_jax.report.cells import CELL, PLAN, read_json

PACKAGES = ('pkm-jax', 'jax', 'jaxlib', 'flax', 'optax', 'numpy')


def plan(folder: Path, cells: Sequence[Cell], budget: str) -> None:
    """Writes which cells there are to be; others that a plan of before had stay in it if they were
    begun."""
    names = [cell.name for cell in cells]
    others = [name for name in read_json(folder / PLAN).get('cells', ())
              if name not in names and (folder / name / CELL).exists()]
    _write(folder / PLAN, {'budget': budget, 'cells': names + others})


class CellFile:
    """cell.json in the folder of a cell. Parts of the work are done for a number of training steps.

    The first process alone writes.
    """

    def __init__(self, folder: Path):
        self._folder = folder

    def begin(self, cell: Cell, arguments: Sequence[str]) -> None:
        """Says what the cell is, and how it is trained again with these arguments."""
        command = ['python', '-m', 'pkm_jax.ablate', *arguments,
                   f'--config.workdir={cell.folder.parent}_again', f'--only={cell.name}']
        self.update(name=cell.name, group=cell.group, seed=cell.seed,
                    starts_from=cell.starts_from, command=shlex.join(command))

    def has(self, part: str, steps: int) -> bool:
        """Whether a part of the work is done, after so many steps."""
        return read_json(self._folder / CELL).get(part, {}).get('steps') == steps

    def update(self, **values: Any) -> None:
        """Sets some of its fields."""
        if jax.process_index() == 0:
            _write(self._folder / CELL, read_json(self._folder / CELL) | values)

    def fail(self, error: Exception) -> str:
        """Says why the cell failed, and returns it; failure.txt has the traceback."""
        why = str(error) or type(error).__name__
        self.update(failure=why)
        if jax.process_index() == 0:
            (self._folder / 'failure.txt').write_text(
                ''.join(traceback.format_exception(error)), encoding='utf-8')
        return why

    @contextlib.contextmanager
    def part(self, name: str, steps: int) -> Iterator[dict[str, Any]]:
        """A context in which a part of the work is done; what is put into the dict is kept.

        Its seconds are added up over all attempts: that of an attempt which was killed ends with
        the last line of its metrics.
        """
        found: dict[str, Any] = {'steps': steps}
        before, began = read_json(self._folder / CELL), time.time()
        seconds = before.get('seconds', {}) | {name: self._seconds(before, name)}
        self.update(seconds=seconds, began={name: began}, devices=jax.device_count(),
                    hardware=f'{jax.device_count()} × {jax.devices()[0].device_kind}',
                    versions=_versions())
        try:
            yield found
        finally:
            seconds[name] += time.time() - began
            self.update(seconds=seconds, began={})
        self.update(**{name: found})

    def _seconds(self, before: dict[str, Any], name: str) -> float:
        """Of the attempts before."""
        spent = before.get('seconds', {}).get(name, 0.)
        began, metrics = before.get('began', {}).get(name), self._folder / 'metrics.jsonl'
        if began and metrics.exists():
            spent += max(0., metrics.stat().st_mtime - began)
        return spent


def _versions() -> dict[str, str]:
    """Those of Python and of the packages that numbers depend on."""
    found = {'python': platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def _write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix('.part')
    unfinished.write_text(json.dumps(content, indent=1, ensure_ascii=False) + '\n',
                          encoding='utf-8')
    unfinished.replace(path)

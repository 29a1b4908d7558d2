"""Says which runs live, from outside: python -m pkm_jax.status RUN …

    python -m pkm_jax.status runs/one
    python -m pkm_jax.status /mnt/gcs/BUCKET/runs        # all runs below, of a mounted bucket too
    watch -n 60 python -m pkm_jax.status runs/*

Prints state, step, loss, tokens/s, newest checkpoint and host of each. Reads running.json,
metrics.jsonl and the checkpoints, and writes nothing. The exit status is 4 where a run is stalled,
dead or diverged, 2 where a folder holds no run, else 0.

Guide: docs/launch.md, "Is it alive?".
"""

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pkm_jax.checkpoints import checksums
from pkm_jax.console import survive_any_console
from pkm_jax.processes.lock import Holder, holder
from pkm_jax.refusal import ExitStatus, Refusal, ends

LINES = 20          # the last lines of metrics.jsonl that say how often there is one
LATE = 5            # times their usual distance after which a line is late
LEAST = 600.        # seconds for which it is not, whatever the distance: evaluations, checkpoints
TAIL = 1 << 20      # bytes of metrics.jsonl that are read: many more than those lines
DIVERGED = 'diverged'     # the folder that such a run leaves (training/divergence.py)
UNWELL = 'stalled', 'dead', 'diverged'
HEADINGS = 'run', 'state', 'step', 'loss', 'tokens/s', 'checkpoint', 'host', 'last step'


class Status(NamedTuple):
    """What the files of a run say of it; times in seconds since 1970, 0 where there is none."""
    folder: Path
    state: str          # running, starting, finished, stopped, or one of UNWELL
    step: int
    steps: int
    loss: float | None
    tokens_per_second: float | None
    checkpoint: tuple[int, float]   # step of the newest finished one, and when that was
    host: str           # '' where nothing runs
    last_line: float    # when metrics.jsonl got its last line of training


def status_of(folder: Path, now: float) -> Status | None:
    """The status of the run in a folder at that time, in seconds since 1970; None where a model
    alone is, whose config.json describes no training.

    'running': its heartbeat is fresh and it takes steps; 'stalled': it takes none, though it lives;
    'starting': it has taken none yet; 'dead': its heartbeat is not fresh; 'diverged': it gave up;
    'stopped': it is not running, and can go on; 'finished': all its steps are taken.

    Raises:
      Refusal: config.json cannot be read, or is of neither.
    """
    try:
        described = json.loads((folder / 'config.json').read_text())
        if isinstance(described, dict) and 'train' not in described:
            return None
        steps = int(described['train']['steps'])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Refusal(f'{folder} is not the folder of a run: config.json: {error!r}') from error
    lines, held = _last_lines(folder / 'metrics.jsonl'), holder(folder)
    last = lines[-1] if lines else {}
    return Status(folder, _state(folder, lines, held, steps, now), last.get('step', 0), steps,
                  last.get('loss'), last.get('tokens_per_second'), _checkpoint(folder),
                  held.host if held else '', last.get('time', 0.))


def _state(folder: Path, lines: list[dict[str, Any]], held: Holder | None, steps: int,
           now: float) -> str:
    last = lines[-1] if lines else {'step': 0, 'time': 0.}
    if held is None:
        gave_up = _changed(folder / DIVERGED) > last['time'] > 0
        return 'finished' if last['step'] >= steps else 'diverged' if gave_up else 'stopped'
    if not held.alive:
        return 'dead'
    stacks = max(map(_changed, folder.glob('stacks-*.txt')), default=0.)
    if stacks > max(last['time'], held.since):      # it says itself where it hangs
        return 'stalled'
    if last['time'] <= held.since:
        return 'starting'
    usual = [after['time'] - before['time'] for before, after in itertools.pairwise(lines)]
    late = max(LEAST, LATE * statistics.median(usual)) if usual else LEAST
    return 'stalled' if now - last['time'] > late else 'running'


def _last_lines(path: Path) -> list[dict[str, Any]]:
    """The last lines of training, whole ones; none where there is no file yet."""
    try:
        with path.open('rb') as file:
            file.seek(max(0, path.stat().st_size - TAIL))
            raw = file.read().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    found: list[dict[str, Any]] = []
    for line in reversed(raw):
        try:
            record = json.loads(line) if line.endswith(b'\n') else None
        except ValueError:      # the first one of the tail is cut
            continue
        if isinstance(record, dict) and record.get('kind') in ('train', 'skipped'):
            found.append(record)
        if len(found) == LINES:
            break
    return found[::-1]


def _checkpoint(folder: Path) -> tuple[int, float]:
    steps = [path for path in (folder / 'checkpoints').glob('*')
             if path.name.isdigit() and checksums.finished(path)]
    newest = max(steps, key=lambda path: int(path.name), default=None)
    return (int(newest.name), _changed(newest)) if newest else (0, 0.)


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.


def runs_in(folder: Path) -> list[Path]:
    """The folder itself if it has a configuration, else those up to two levels below that have one.

    Raises:
      Refusal: there is none, or a bucket is named.
    """
    if (folder / 'config.json').exists():
        return [folder]
    found = [path.parent for pattern in ('*/', '*/*/')
             for path in sorted(folder.glob(f'{pattern}config.json'))
             if 'checkpoints' not in path.parts]
    if not found:
        raise Refusal(f'{folder} holds no run: no config.json there or two levels below. Give the '
                      f'folder of a run (--config.workdir), or mount its bucket.')
    return found


def table(found: Sequence[Status], now: float) -> str:
    """A line for each run, below the headings."""
    rows = [HEADINGS, *(_row(one, now) for one in found)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    return '\n'.join('  '.join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip()
                     for row in rows)


def _row(one: Status, now: float) -> tuple[str, ...]:
    step, saved = one.checkpoint
    return (str(one.folder), one.state, f'{one.step:,}/{one.steps:,}',
            '-' if one.loss is None else f'{one.loss:.4f}',
            '-' if one.tokens_per_second is None else f'{one.tokens_per_second:,.0f}',
            f'{step:,}, {_ago(saved, now)}' if saved else '-', one.host or '-',
            _ago(one.last_line, now) if one.last_line else '-')


def _ago(then: float, now: float) -> str:
    seconds = max(0., now - then)
    for size, unit in ((86400, 'days'), (3600, 'h'), (60, 'min')):
        if seconds >= size * 1.5:
            return f'{seconds / size:.0f} {unit} ago'
    return f'{seconds:.0f} s ago'


def main(arguments: Sequence[str] | None = None) -> None:
    survive_any_console()
    given, now = _parser().parse_args(arguments), time.time()
    try:
        folders = [run for folder in given.folders for run in runs_in(Path(folder).expanduser())]
        found = [one for folder in folders if (one := status_of(folder, now))]
        if not found:
            raise Refusal(f'{folders[0]} is not the folder of a run: config.json describes no '
                          f'training.')
    except Refusal as refusal:
        raise ends(f'Not read: {refusal}') from refusal
    print(table(found, now))
    if any(one.state in UNWELL for one in found):
        raise SystemExit(ExitStatus.HUNG)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog='python -m pkm_jax.status', description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folders', metavar='RUN', nargs='+',
                        help='the folder of a run, or one with runs in it')
    return parser


if __name__ == '__main__':
    main()

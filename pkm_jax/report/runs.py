"""What a run leaves in its folder, read back: its config, metrics and slot counts."""

import collections
import dataclasses
import json
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from jaxtyping import Float

from pkm_jax.refusal import Refusal

PLACEMENTS = ('none', 'add', 'replace', '–')    # of memories; a model of one's own has its own
# What every line of metrics.jsonl says, and what one of a kind says beside it.
FIELDS = ('kind', 'step', 'tokens')
FIELDS_OF = {'train': ('loss',), 'eval': ('loss', 'eval_tokens')}


@dataclasses.dataclass(frozen=True)
class SlotAccess:
    """Counts of one memory over the last evaluation: arrays of length S (slot = i·N + j)."""
    count: np.ndarray   # selections among the K reads of any head
    top1: np.ndarray    # times the slot was a head's best
    mass: np.ndarray    # summed weights


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """One training run as its files tell it; `start_*` is where the run it continues had got."""
    name: str
    folder: Path
    config: dict[str, Any]
    train: list[dict[str, Any]]
    evals: list[dict[str, Any]]
    access: dict[str, SlotAccess]
    notes: list[str]
    started: dict[str, Any] = dataclasses.field(default_factory=dict)   # the line of its beginning
    parent: str | None = None
    start_step: int = 0
    start_tokens: int = 0
    memory_added: bool = False

    @property
    def init_from(self) -> str | None:
        return self.config['init_from'] or None

    @property
    def parameters(self) -> int | None:
        return self.started.get('parameters')

    @property
    def loss_name(self) -> dict[str, str]:
        """Its task's `LossName`; runs of before such names were written have a nameless one."""
        return self.started.get('loss_name') or {'name': 'Loss', 'unit': '', 'meaning': ''}

    def title(self, layer: str) -> str:
        """What its memory of that name is called: 'layer 4'."""
        return self.started.get('memories', {}).get(layer, f'layer {layer}')

    def best(self, metric: str) -> float:
        """Of all evaluations."""
        choose = min if metric in self.started.get('lower_is_better', ()) else max
        return choose(record[metric] for record in self.evals)

    @property
    def steps(self) -> int:
        return max(records[-1]['step'] for records in (self.train, self.evals) if records)

    @property
    def tokens(self) -> int:
        return max(records[-1]['tokens'] for records in (self.train, self.evals) if records)

    @property
    def planned_steps(self) -> int:
        return self.config['train']['steps']

    @property
    def memory_evals(self) -> list[dict[str, Any]]:
        return [record for record in self.evals if record.get('memory')]

    @property
    def layers(self) -> list[str]:
        """The names of its memories, layers of most models, in order."""
        return _in_order(self.memory_evals[-1]['memory']) if self.memory_evals else []

    @property
    def placement(self) -> str:
        """'none', 'add' or 'replace'; '–' of a model that is built otherwise."""
        return _placement(self.config) if self.layers else 'none'


def read_runs(folder: Path, names: Sequence[str] | None = None) -> list[RunRecord]:
    """The runs under a work folder (or the folder's own run), in the order they were started.

    `names` picks subfolders. Runs that have no metrics yet are left out, with a word in the log.

    Raises:
      Refusal: nothing is left to report in the folder, or a file is not what a run writes.
    """
    folder = Path(folder)
    if names:
        folders = [folder / name for name in names]
    else:
        files = [folder / 'metrics.jsonl', *sorted(folder.glob('*/metrics.jsonl'))]
        folders = [file.parent for file in files if file.exists()]
    runs = []
    for run_folder in folders:
        run = read_run(run_folder)
        if run.train or run.evals:
            runs.append(run)
        else:
            logging.warning('%s has no metrics yet: left out', run_folder)
    if not runs:
        raise Refusal(
            f'nothing to report in {folder}: no run with a line in its metrics.jsonl was found '
            'there or one level below; pass the work folder of a training, or a run folder')
    runs.sort(key=lambda run: min(r[0].get('time', 0) for r in (run.train, run.evals) if r))
    return _link(_told_apart(runs))


def read_run(folder: Path) -> RunRecord:
    """One run's files.

    Raises:
      Refusal: a file is missing, is not the configuration of a training, or has a metrics line
        without its fields.
    """
    for needed in (folder / 'config.json', folder / 'metrics.jsonl'):
        if not needed.exists():
            raise Refusal(f'{needed} is missing: {folder} is not a whole run folder')
    config = _read_config(folder / 'config.json')
    records, notes = _read_metrics(folder / 'metrics.jsonl')
    access = {}
    for file in sorted(folder.glob('slot_counts_*.npz')):
        try:
            with file.open('rb') as opened, np.load(opened) as arrays:
                access[file.stem.removeprefix('slot_counts_')] = SlotAccess(
                    arrays['count'], arrays['top1'], arrays['mass'])
        except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, ValueError, OSError,
                RuntimeError) as error:
            notes.append(f'{file.name} is damaged and was left out ({error}): the next evaluation '
                         f'of the run writes it anew; a finished run evaluates again when it is '
                         f'started without its last checkpoint')
            logging.warning('%s: %s', folder, notes[-1])
    started = records['start'][-1] if records['start'] else {}
    run = RunRecord(folder.resolve().name, folder, config, records['train'], records['eval'],
                    access, notes, started)
    if (run.train or run.evals) and run.steps < run.planned_steps:
        notes.append(f'unfinished: {run.steps:,} of {run.planned_steps:,} steps')
    return run


def with_memory(runs: Sequence[RunRecord], layer: str) -> list[tuple[int, RunRecord]]:
    """The runs that evaluated a memory in this layer, each with its index among all."""
    return [(index, run) for index, run in enumerate(runs) if layer in run.layers]


def counted(runs: Sequence[RunRecord], layer: str) -> list[tuple[int, RunRecord]]:
    """Those of them whose slot counts can be read."""
    return [(index, run) for index, run in with_memory(runs, layer) if layer in run.access]


def layers_of(runs: Sequence[RunRecord]) -> list[str]:
    """The names of the memories of all runs, in order."""
    return _in_order({layer for run in runs for layer in run.layers})


def titled(runs: Sequence[RunRecord], layer: str) -> str:
    """What the memory of that name is called, to begin a title: 'Layer 4'."""
    title = with_memory(runs, layer)[0][1].title(layer)
    return title[0].upper() + title[1:]


def loss_of(runs: Sequence[RunRecord]) -> tuple[str, str]:
    """What the loss of the runs is called, and ', nats' if that is the unit of all."""
    names, units = ({run.loss_name[part] for run in runs} for part in ('name', 'unit'))
    unit = units.pop() if len(units) == 1 else ''
    return names.pop() if len(names) == 1 else 'Loss', f', {unit}' if unit else ''


def column(records: Sequence[dict[str, Any]], key: str) -> Float[np.ndarray, 'n']:
    """One number of every record."""
    return np.array([record[key] for record in records], dtype=float)


def thousands(number: float | int) -> str:
    """A count in three digits: 950, 65.5k, 2.1M, 1.4B."""
    for unit, size in (('B', 1e9), ('M', 1e6), ('k', 1e3)):
        if abs(number) >= size * 0.9995:
            return f'{number / size:.3g}{unit}'
    return f'{number:.3g}'


def smoothed(values: Float[np.ndarray, 'n'], share: float = 0.03) -> Float[np.ndarray, 'n']:
    """Running mean with exponential weights over about `share` of the values, unbiased at first."""
    decay = 1 - 1 / max(len(values) * share, 1)
    total = weight = 0.0
    means = []
    for value in values:
        total, weight = decay * total + value, decay * weight + 1
        means.append(total / weight)
    return np.array(means)


def _in_order(names):
    """Numbers by size, then words."""
    return sorted(names, key=lambda name: (not name.isdigit(), int(name) if name.isdigit() else 0,
                                           name))


def _placement(config: dict[str, Any]) -> str:
    return config.get('memory', {}).get('placement', '–')


def _read_config(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text(encoding='utf-8'))
        config['train']['steps'] = int(config['train']['steps'])
        init_from, placement = config['init_from'], _placement(config)
        if not isinstance(init_from, str) or placement not in PLACEMENTS:
            raise ValueError(f'init_from = {init_from!r}, memory.placement = {placement!r}')
    except KeyError as error:
        raise Refusal(f'{file} is not the configuration of a training: no {error}') from error
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise Refusal(f'{file} is not the configuration of a training: {error}') from error
    return config


def _read_metrics(file: Path) -> tuple[dict[str, list[dict]], list[str]]:
    """The lines by their kind, and notes on those that are no JSON object and were ignored."""
    records: dict[str, list[dict]] = {'start': [], 'train': [], 'eval': []}
    notes = []
    lines = file.read_text(encoding='utf-8', errors='replace').splitlines()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record, fault = json.loads(line), 'not a JSON object'
        except json.JSONDecodeError:
            record, fault = None, 'cut short'
        if not isinstance(record, dict):
            which = 'the last line' if number == len(lines) else f'line {number}'
            notes.append(f'{which} of {file.name} is {fault} and was ignored')
            logging.warning('%s: %s', file, notes[-1])
            continue
        wanted = (*FIELDS, *FIELDS_OF.get(str(record.get('kind')), ()))
        if missing := sorted(set(wanted) - record.keys()):
            raise Refusal(
                f'{file}, line {number} has no {", ".join(missing)}: not a metrics line')
        if odd := _odd(record, wanted):
            raise Refusal(f'{file}, line {number}: {odd} is {record[odd]!r}: not a metrics line')
        same_kind = records.setdefault(record['kind'], [])
        # A run resumed from an older checkpoint writes some steps again: the later line counts.
        while same_kind and same_kind[-1]['step'] >= record['step']:
            same_kind.pop()
        same_kind.append(record)
    return records, notes


def _odd(record: dict[str, Any], numbers: Sequence[str]) -> str:
    """The first field of a line that is not of its type; '' where all are."""
    kinds: dict[str, Any] = dict.fromkeys([*numbers, 'time'], (int, float))
    kinds |= {'kind': str, 'memory': dict}
    odd = [name for name, kind in kinds.items()
           if name in record and not isinstance(record[name], kind)]
    return next(iter(odd), '')


def _told_apart(runs: list[RunRecord]) -> list[RunRecord]:
    """`runs`, those whose folders share a name called by their parent folder's name too."""
    times = collections.Counter(run.name for run in runs)
    return [run if times[run.name] == 1 else
            dataclasses.replace(run, name='/'.join(run.folder.resolve().parts[-2:]))
            for run in runs]


def _link(runs: list[RunRecord]) -> list[RunRecord]:
    """Tells each run that continues an earlier one of `runs` its parent and where it starts."""
    linked: list[RunRecord] = []
    for run in runs:
        parent = next((earlier for earlier in linked
                       if run.init_from and _names(run.init_from, earlier.folder)), None)
        if parent and run.init_from:
            step = _checkpoint_step(run.init_from)
            step = parent.steps if step is None else step
            seen = [r['tokens'] for r in parent.train + parent.evals if r['step'] <= step]
            run = dataclasses.replace(
                run, parent=parent.name, start_step=parent.start_step + step,
                start_tokens=parent.start_tokens + max(seen, default=0),
                memory_added=bool(run.layers) and not parent.layers)
        elif run.init_from:
            run.notes.append(
                f'starts from {run.init_from}, whose training is not part of this report')
        linked.append(run)
    return linked


def _names(init_from: str, folder: Path) -> bool:
    """Whether `init_from` (RUN or RUN/checkpoints/STEP) is the run in `folder`, moved or not."""
    path = Path(init_from)
    parts = path.parts
    run = Path(*parts[:parts.index('checkpoints')]) if 'checkpoints' in parts else path
    if run.exists():
        return run.resolve() == folder.resolve()
    return run.name == folder.resolve().name


def _checkpoint_step(init_from: str) -> int | None:
    path = Path(init_from)
    return int(path.name) if path.parent.name == 'checkpoints' and path.name.isdigit() else None

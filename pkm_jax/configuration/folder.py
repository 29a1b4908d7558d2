"""The folder of a run: what its config.json says it is, and whether another run may go on in it."""

import contextlib
import errno
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pkm_jax.configuration.resolve import described
from pkm_jax.configuration.run import Run
from pkm_jax.refusal import Refusal

# What may differ between the runs that share a folder: where things are, not what they are.
FREE = ('log', 'workdir', 'compilation_cache', 'distributed', 'memory.shards', 'train.fsdp',
        'train.max_skipped_steps', 'model.remat', 'data.corpus', 'data.cache',
        'data.workers')     # data: compared by content
# What fields were called before, by section: runs of then go on.
RENAMED = {'model': {'heads': 'output_heads'},
           'train': {'accumulate': 'gradient_accumulation_steps', 'split_backbone': 'fsdp'}}
# Fields that came later, and what runs of before did.
ADDED = {'train.skip_loss_spikes': 0., 'train.values_epsilon': 0., 'memory.drift_tokens': 0}
SECTIONS = ('model', 'memory', 'data', 'train', 'log')
OPTIONAL = ('data', 'train', 'log')     # what was converted has none of these
REMEDY = ('restore it from a copy, or remove it: the same command then goes on from the '
          'checkpoints beside it, which are not harmed, and writes it anew, without comparing '
          'settings.')
# What says that a file could not be written, in errors that are not of Python: TensorStore's.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO, errno.ESTALE)
_OS_ERROR = re.compile(r"os[ _]error(?:_code='| )(\d+)", re.IGNORECASE)


def read_description(folder: Path) -> dict[str, Any]:
    """The config.json of a run, in the names of today.

    Raises:
      Refusal: there is none, or it is damaged.
    """
    path = Path(folder) / 'config.json'
    try:
        config = json.loads(path.read_text(encoding='utf-8'))
    except OSError as error:
        raise Refusal(f'{path} cannot be read ({error.strerror}): {folder} is no run.') from error
    except ValueError as error:
        raise Refusal(f'{path} is damaged ({error}): {REMEDY}') from error
    if not isinstance(config, dict):
        raise Refusal(f'{path} is damaged (no JSON object): {REMEDY}')
    if 'model' in config:       # else it is not one of ours
        for section in SECTIONS:
            if not isinstance(config.get(section, {} if section in OPTIONAL else None), dict):
                raise Refusal(f'{path} is damaged (it has no section {section!r}): {REMEDY}')
    for section, names in RENAMED.items():
        for before, now in names.items():
            if isinstance(config.get(section), dict) and before in config[section]:
                config[section][now] = config[section].pop(before)
    return config


def check_same_run(run: Run) -> str:
    """Refuses to go on with another run in a folder; a word on what is changed on purpose, or ''.

    Raises:
      Refusal: the folder holds the run of another configuration (FREE may differ, accumulation
        too, and train.steps may grow).
    """
    if not (run.folder / 'config.json').exists():
        resumes = any(path.name.isdigit() for path in (run.folder / 'checkpoints').glob('*'))
        return (f'WARNING: {run.folder} has checkpoints and no config.json: it is written anew; '
                f'whether the settings are those of before was not compared' if resumes else '')
    found, here = ADDED | _flat(read_description(run.folder)), _flat(described(run))
    if 'task' not in found:     # of before there were several
        here = {name: value for name, value in here.items() if name in found}
    changed = {name: (found.get(name), here.get(name))
               for name in sorted(found.keys() | here.keys())
               if found.get(name) != here.get(name)}
    longer = changed.pop('train.steps', None)
    if longer and not (isinstance(longer[0], int) and longer[0] < longer[1]):
        changed['train.steps'] = longer
    parts = changed.pop('train.gradient_accumulation_steps', None)
    if changed:
        differences = '; '.join(f'{name}: {there!r} there, {now!r} here'
                                for name, (there, now) in changed.items())
        raise Refusal(f'{run.folder} holds the run of another configuration: {differences}. Set '
                      f'what it has, choose another --config.workdir, or remove that folder.')
    said = []
    if longer:
        said.append(f'train.steps is raised from {longer[0]:,} to {longer[1]:,}: the learning rate '
                    f'now falls from {run.train.learning_rate} at step {run.train.warmup:,} to 0 '
                    f'at the new end, and jumps up to that line where the run goes on')
    if parts:
        said.append(f'train.gradient_accumulation_steps is changed from {parts[0]} to {parts[1]}: '
                    f'the batches are the same, dropout masks and batch statistics are those of '
                    f'other micro-batches')
    return '; '.join(said)


def describe(run: Run) -> None:
    """Makes a run's folder and writes its config.json, whole."""
    run.folder.mkdir(parents=True, exist_ok=True)
    unfinished = run.folder / 'config.json.part'
    unfinished.write_text(json.dumps(described(run), indent=1) + '\n')
    unfinished.replace(run.folder / 'config.json')


def storage_fault(error: BaseException | None) -> str:
    """What the storage said, where an error (or one behind it) is that it failed; else ''."""
    while error is not None:
        named = _OS_ERROR.search(str(error))
        if isinstance(error, OSError) and error.errno:
            return ': '.join(filter(None, [str(error.filename or ''), os.strerror(error.errno)]))
        if named:
            return os.strerror(int(named[1]))
        error = error.__cause__ or error.__context__
    return ''


@contextlib.contextmanager
def written_or_named(folder: Path) -> Iterator[None]:
    """Refuses in one line what the storage under a run's folder does not take.

    Raises:
      Refusal: a file in it could not be written or read.
    """
    try:
        yield
    except OSError as error:
        place, here = Path(error.filename or ''), folder.absolute()
        if error.errno not in FULL and not (
                error.filename and (place.absolute().is_relative_to(here)
                                    or here.is_relative_to(place.absolute()))):
            raise
        raise Refusal(f'{error.filename or folder}: {os.strerror(error.errno or 0)}. The run has '
                      f'stopped; its finished checkpoints are whole. Make room, or bring the '
                      f'folder back, and start the same command again.') from error


def _flat(config: dict, prefix: str = '') -> dict[str, Any]:
    """{'train.batch': 32, …} of everything that a resumed run must share."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if prefix + name in FREE:
            continue
        if isinstance(value, dict):
            flat.update(_flat(value, f'{prefix}{name}.'))
        else:
            flat[prefix + name] = value
    return flat

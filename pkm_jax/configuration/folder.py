"""The folder of a run: what its config.json says it is, and whether another run may go on in it."""

import json
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
ADDED = {'train.skip_loss_spikes': 0.}


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
        raise Refusal(f'{path} is damaged ({error}): restore it from a copy; the checkpoints '
                      f'beside it are not harmed.') from error
    if not isinstance(config, dict):
        raise Refusal(f'{path} is damaged (no JSON object): restore it from a copy.')
    for section, names in RENAMED.items():
        for before, now in names.items():
            if before in config.get(section, {}):
                config[section][now] = config[section].pop(before)
    return config


def check_same_run(run: Run) -> str:
    """Refuses to go on with another run in a folder; a word on what is changed on purpose, or ''.

    Raises:
      Refusal: the folder holds the run of another configuration (FREE may differ, and
        train.steps may grow).
    """
    if not (run.folder / 'config.json').exists():
        return ''
    found, here = ADDED | _flat(read_description(run.folder)), _flat(described(run))
    if 'task' not in found:     # of before there were several
        here = {name: value for name, value in here.items() if name in found}
    changed = {name: (found.get(name), here.get(name))
               for name in sorted(found.keys() | here.keys())
               if found.get(name) != here.get(name)}
    longer = changed.pop('train.steps', (0, 0))
    if longer[0] > longer[1]:
        changed['train.steps'] = longer
    if changed:
        differences = '; '.join(f'{name}: {there!r} there, {now!r} here'
                                for name, (there, now) in changed.items())
        raise Refusal(f'{run.folder} holds the run of another configuration: {differences}. Choose '
                      f'another --config.workdir, or remove that folder.')
    return (f'train.steps is raised from {longer[0]:,} to {longer[1]:,}: the learning rate now '
            f'falls to 0 at the new end' if longer[1] else '')


def describe(run: Run) -> None:
    """Makes a run's folder and writes its config.json, whole."""
    run.folder.mkdir(parents=True, exist_ok=True)
    unfinished = run.folder / 'config.json.part'
    unfinished.write_text(json.dumps(described(run), indent=1) + '\n')
    unfinished.replace(run.folder / 'config.json')


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

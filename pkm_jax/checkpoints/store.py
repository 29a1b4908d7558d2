"""Checkpoints of a run: written asynchronously, verified when read, none believed blindly."""

import shutil
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging
from jax.experimental import multihost_utils

from pkm_jax.checkpoints.arrays import StoredArray, open_model
from pkm_jax.models.interface import flatten
from pkm_jax.refusal import Refusal

# Orbax writes these last: the second one on storage without atomic renames too.
FINISHED = ('_CHECKPOINT_METADATA', 'commit_success.txt')
# What another run can start from, by what it is called in a checkpoint: the fields of a state.
MODEL = {'params': 'params', 'statistics': 'batch_stats'}

FULL = ('RESOURCE_EXHAUSTED', 'No space left', 'Disk quota exceeded')      # said of a full disk
SPARE = 1.25    # room that must be free for a checkpoint, of what the one before took

State = Any     # a NamedTuple with these fields, `step` and others: training.state.TrainState


class Checkpoints:
    """The newest `keep` checkpoints of a run in FOLDER/STEP, with the progress of its data."""

    def __init__(self, folder: Path, keep: int):
        self.folder = Path(folder).absolute()
        self._options = ocp.CheckpointManagerOptions(max_to_keep=keep)
        self._manager = ocp.CheckpointManager(self.folder, options=self._options)

    def steps(self) -> list[int]:
        """Those of which there is a checkpoint, whole or not."""
        return sorted(self._manager.all_steps())

    def save(self, state: State, progress: dict) -> None:
        """Starts to write a state and a JSON-able `progress`; returns before it is written.

        Raises:
          Refusal: the disk has no room for it; the checkpoints before are whole.
        """
        self._check_room(state)
        model, rest = _items(state)
        self._manager.save(int(state.step), args=ocp.args.Composite(
            model=ocp.args.StandardSave(model), rest=ocp.args.StandardSave(rest),
            progress=ocp.args.JsonSave(progress)))

    def _check_room(self, state):
        self.wait()         # what is still being written takes room that seems free
        needed = max([sum(leaf.nbytes for leaf in jax.tree.leaves(state)), *self._sizes()])
        free = shutil.disk_usage(self.folder).free
        if free < SPARE * needed:
            raise Refusal(f'No room for the checkpoint of step {int(state.step):,}: it needs '
                          f'{needed / 1e6:,.1f} MB, and {self.folder} has {free / 1e6:,.1f} MB '
                          f'left. Those of steps {self.steps()} are kept: with more room, the same '
                          f'command goes on from the last.')

    def _whole(self):
        return sorted(int(path.name) for path in self.folder.iterdir()
                      if path.name.isdigit() and _finished(path))

    def _sizes(self):
        """Bytes of the newest checkpoint's files, which are more than its small arrays hold."""
        return [sum(path.stat().st_size for path in (self.folder / str(step)).rglob('*'))
                for step in self.steps()[-1:]]

    def restore(self, like: State) -> tuple[State, dict] | None:
        """The newest checkpoint that can be read, laid out as the abstract state `like`; or None.

        Newer ones are named in the log and moved to FOLDER/damaged-STEP.

        Raises:
          Refusal: there are checkpoints and none can be read; they stay where they are.
        """
        damaged = []
        for step in reversed(self.steps()):
            try:
                found = self._read(step, like)
            except Exception as error:  # whatever a damaged file makes Orbax raise
                logging.warning('Checkpoint %s is damaged: %s: %.300s', self.folder / str(step),
                                type(error).__name__, error)
                damaged.append(step)
                continue
            if damaged:
                self._set_aside(damaged)
            return found
        if damaged:
            raise Refusal(f'None of the checkpoints {damaged} in {self.folder} can be read, as '
                          f'logged above. Choose another --config.workdir to start again.')
        return None

    def _read(self, step, like):
        if not _finished(self.folder / str(step)):
            raise ValueError('it was never finished')
        model, rest = _items(like)
        read = self._manager.restore(step, args=ocp.args.Composite(
            model=ocp.args.StandardRestore(model), rest=ocp.args.StandardRestore(rest),
            progress=ocp.args.JsonRestore()))
        return _state(like, read.model, read.rest), read.progress

    def _set_aside(self, steps):
        self._manager.close()
        multihost_utils.sync_global_devices('nobody reads the damaged checkpoints')
        if jax.process_index() == 0:
            for step in steps:
                before = len(list(self.folder.glob(f'damaged-{step}*')))
                (self.folder / str(step)).rename(
                    self.folder / (f'damaged-{step}' + (f'-{before + 1}' if before else '')))
        multihost_utils.sync_global_devices('the damaged checkpoints are set aside')
        self._manager = ocp.CheckpointManager(self.folder, options=self._options)

    def wait(self) -> None:
        """Waits until everything is written.

        Raises:
          Refusal: the disk became full meanwhile; the checkpoints before are whole.
        """
        try:
            self._manager.wait_until_finished()
        except Exception as error:      # Orbax passes on what its storage raised, of any type
            if not any(sign in str(error) for sign in FULL):
                raise
            raise Refusal(f'No room in {self.folder}: it became full while a checkpoint was '
                          f'written. Those of steps {self._whole()} are kept: with more room, the '
                          f'same command goes on from the last.') from error

    def close(self) -> None:
        """Waits until everything is written, and ends the threads that do so."""
        self.wait()
        self._manager.close()


def _items(state):
    """A state as (what another run can start from, what only this run needs)."""
    rest = state._asdict()
    return {stored: rest.pop(field) for stored, field in MODEL.items()}, rest


def _state(like, model, rest):
    return like._replace(**rest, **{field: model[stored] for stored, field in MODEL.items()})


def _finished(checkpoint):
    return all((checkpoint / name).exists() for name in FINISHED)


def newest(folder: Path) -> Path:
    """The newest finished checkpoint of a run or checkpoints folder, or the one given.

    Raises:
      Refusal: there is none.
    """
    folder = Path(folder).absolute()
    if _finished(folder):
        return folder
    for parent in (folder / 'checkpoints', folder):
        steps = [path for path in parent.glob('*') if path.name.isdigit() and _finished(path)]
        if steps:
            return max(steps, key=lambda path: int(path.name))
    raise Refusal(f'{folder} holds no finished checkpoint.')


def read_weights(checkpoint: Path) -> dict[str, StoredArray]:
    """{'params/layers/0/…': array, 'statistics/…': array} of a checkpoint, read when asked for."""
    return flatten(open_model(checkpoint))

"""Checkpoints of a run: written asynchronously, verified before they are read."""

import copy
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging

from pkm_jax.checkpoints import apart, checksums
from pkm_jax.checkpoints.arrays import StoredArray, open_model
from pkm_jax.configuration.folder import storage_fault
from pkm_jax.models.interface import flatten
from pkm_jax.processes import hosts
from pkm_jax.refusal import Refusal

FOLDERS = ('checkpoints', 'best')       # of a run: its newest ones, that of its best evaluation
# What another run can start from, by what it is called in a checkpoint: the fields of a state.
MODEL = {'params': 'params', 'statistics': 'batch_stats'}
# Left where a process was killed: a checkpoint begun, an old one half deleted.
UNFINISHED = '.unfinished'      # ends the name of a checkpoint until its checksums are written
LEFTOVERS = ('*.orbax-checkpoint-tmp*', f'*{UNFINISHED}', '*.deleted')

State = Any     # a NamedTuple with these fields, `step` and others: training.state.TrainState


class Checkpoints:
    """The newest `keep` checkpoints of a run in FOLDER/STEP, with its progress beside the state.

    One is finished, and older ones are deleted, once its checksums are written, which a thread of
    the first process does while training goes on. `still_ours` raises where the folder is not.
    With `copies` a state is copied on the devices where they have room, so that the next step does
    not even wait until it is on the host.
    """

    def __init__(self, folder: Path, keep: int, still_ours: Callable[[], None] = lambda: None,
                 copies: bool = False):
        self.folder = Path(folder).absolute()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._keep, self._still_ours = keep, still_ours
        logging.get_absl_logger().addFilter(_not_raised_later)
        self._writer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(
            model=_arrays(), rest=_arrays(), progress=ocp.JsonCheckpointHandler()))
        self._finishing = ThreadPoolExecutor(1)
        self._last: Future[None] | None = None
        self._copies = apart.Copies() if copies else None

    def steps(self) -> list[int]:
        """Those of which there is a checkpoint, whole or not."""
        return sorted(int(path.name) for path in self.folder.glob('*') if path.name.isdigit())

    def newest(self) -> tuple[int, dict] | None:
        """(step, progress) of the newest whole checkpoint; None if there never was one.

        The files of newer ones that are damaged are named in the log, and their folders renamed to
        FOLDER/damaged-STEP. All processes call this, and agree.

        Raises:
          Refusal: there are checkpoints and none is whole, or a file cannot be read; nothing is
            renamed then.
        """
        if jax.process_index() == 0:
            for path in (path for pattern in LEFTOVERS for path in self.folder.glob(pattern)):
                logging.warning('%s was never finished, or its deletion: it is deleted.', path)
                shutil.rmtree(path)
        before = [str(path) for path in self.folder.glob('damaged-*')]
        steps, before = hosts.all_say((self.steps(), before))[0]
        damaged: dict[int, str] = {}
        for step in reversed(steps):
            faults = checksums.damage(self.folder / str(step))
            if not faults:
                self._set_aside(list(damaged))
                return step, self._read(step, progress=ocp.args.JsonRestore()).progress
            damaged[step] = '; '.join(faults)
            logging.warning('Checkpoint %s is damaged: %s', self.folder / str(step), damaged[step])
        if damaged or before:
            listed = [f'{self.folder / str(step)}: {faults}' for step, faults in damaged.items()]
            raise Refusal('\n'.join([
                'None of the checkpoints of this run is whole, and it does not begin anew by '
                'itself. Restore one from a copy, or choose another --config.workdir.',
                *listed, *before]))
        return None

    def restore(self, step: int, like: State) -> State:
        """The state of a whole checkpoint, laid out as the abstract state `like`.

        Raises what Orbax does, and renames nothing: the files are as they were written.
        """
        model, rest = _items(like)
        try:
            read = self._read(step, model=_as(model), rest=_as(rest))
        except Exception as error:
            error.add_note(f'While {self.folder / str(step)} was read. Its files are not damaged, '
                           f'as far as it has checksums; nothing was renamed.')
            raise
        return _state(like, read.model, read.rest)

    def room(self, like: State) -> str:
        """How much room checkpoints of an abstract state take, in words.

        Raises:
          Refusal: there is none for a single one.
        """
        size, free = _bytes(like), self._free()
        self._agree(_no_room(self.folder, 'the first checkpoint', size, free)
                    if free < size and not self.steps() else '')
        more = self._keep + 1 - len(self.steps())
        return (f'checkpoints: {size / 1e6:,.1f} MB each, {self._keep} are kept; {self.folder} has '
                f'{free / 1e6:,.1f} MB left' + (f', WARNING: less than the {more} more will take'
                                                if free < more * size else ''))

    def save(self, state: State, progress: dict) -> None:
        """Starts to write a state and a JSON-able `progress`; returns before it is written.

        Raises:
          Refusal: the folder is gone, full, or another run's; or the checkpoint before could not be
            written. Those that were finished are whole.
        """
        self.wait()
        step = int(state.step)
        self._agree(self._hindrance(step, max(_bytes(state), self._files_of_newest())))
        progress = copy.deepcopy(progress)
        copied = self._copies and self._copies.of(state)
        if copied:
            self._last = self._finishing.submit(self._write, step, [copied], progress)
        else:
            self._begin(step, state, progress)
            self._last = self._finishing.submit(self._finish, step)

    def wait(self) -> None:
        """Waits until everything is written.

        Raises:
          Refusal: the last checkpoint could not be; the cause is named.
        """
        last, self._last = self._last, None
        if last:
            last.result()

    def close(self) -> None:
        """Waits until everything is written, and ends the threads that do so."""
        try:
            self.wait()
        finally:
            self._finishing.shutdown()
            self._writer.close()

    def _write(self, step, held, progress):
        self._begin(step, held.pop(), progress)     # so that nothing holds it from then on
        self._finish(step)

    def _begin(self, step, state, progress):
        model, rest = _items(state)
        with self._storage_named(step):
            self._writer.save(self.folder / f'{step}{UNFINISHED}', args=ocp.args.Composite(
                model=ocp.args.PyTreeSave(model), rest=ocp.args.PyTreeSave(rest),
                progress=ocp.args.JsonSave(progress)), custom_metadata=checksums.PROMISED)

    def _finish(self, step):
        with self._storage_named(step):
            self._writer.wait_until_finished()
            if jax.process_index() == 0:
                written = self.folder / f'{step}{UNFINISHED}'
                checksums.write(written)
                written.rename(self.folder / str(step))
                for old in self.steps()[:-self._keep]:
                    unwanted = self.folder / f'{old}.deleted'
                    (self.folder / str(old)).rename(unwanted)
                    shutil.rmtree(unwanted)

    def _hindrance(self, step, size):
        """Why a checkpoint cannot be begun, or ''."""
        try:
            self._still_ours()
            free = self._free()
        except Refusal as refusal:
            return str(refusal)
        except OSError as error:
            return f'The checkpoint of step {step:,} cannot be written: {storage_fault(error)}.'
        what = f'the checkpoint of step {step:,}'
        return _no_room(self.folder, what, size, free) if free < size else ''

    def _agree(self, hindrance):
        """Refuses in all processes what one of them cannot do."""
        if found := next(filter(None, hosts.all_say(hindrance)), ''):
            raise Refusal(found + self._kept())

    def _kept(self):
        steps = [step for step in self.steps() if checksums.finished(self.folder / str(step))]
        return (f' The checkpoints of steps {steps} are whole: the same command goes on from the '
                f'last.' if steps else '')

    def _files_of_newest(self):
        """Bytes of the newest checkpoint's files: of small arrays more than these hold."""
        return sum(path.stat().st_size for step in self.steps()[-1:]
                   for path in (self.folder / str(step)).rglob('*'))

    def _free(self):
        return shutil.disk_usage(self.folder).free

    def _read(self, step, **items):
        return self._writer.restore(self.folder / str(step), args=ocp.args.Composite(**items))

    def _set_aside(self, steps):
        if jax.process_index() == 0:
            for step in steps:
                before = len(list(self.folder.glob(f'damaged-{step}*')))
                (self.folder / str(step)).rename(
                    self.folder / (f'damaged-{step}' + (f'-{before + 1}' if before else '')))
        hosts.all_say('the damaged checkpoints are set aside')

    @contextmanager
    def _storage_named(self, step) -> Iterator[None]:
        """A fault of the storage in one line, whichever library found it."""
        try:
            yield
        except Exception as error:
            cause = storage_fault(error)
            if not cause:
                raise
            raise Refusal(f'The checkpoint of step {step:,} could not be written to '
                          f'{self.folder}: {cause}.{self._kept()}') from error


def _arrays():
    """To compress numbers takes most of the time of a save, and saves 8 % of their bytes."""
    return ocp.PyTreeCheckpointHandler(use_compression=False)


def _as(like):
    return ocp.args.PyTreeRestore(
        like, restore_args=ocp.checkpoint_utils.construct_restore_args(like))


def _not_raised_later(record):
    """Leaves out the errors that Orbax's threads log with their tracebacks: `wait` raises them."""
    return not (record.exc_info and 'orbax' in record.pathname)


def newest(folder: Path) -> Path:
    """The newest finished checkpoint of a run or checkpoints folder, or the one given.

    Raises:
      Refusal: there is none.
    """
    folder = Path(folder).absolute()
    if checksums.finished(folder):
        return folder
    for parent in (folder / 'checkpoints', folder):
        steps = sorted((path for path in parent.glob('*') if path.name.isdigit()),
                       key=lambda path: int(path.name), reverse=True)
        for path in steps:
            if checksums.finished(path):
                return path
            logging.warning('The checkpoint %s was never finished and is left out.', path)
    raise Refusal(f'{folder} holds no finished checkpoint.')


def of_run(folder: Path) -> Path:
    """The checkpoint of a run's best evaluation where it keeps that, else `newest`.

    Raises:
      Refusal: there is none.
    """
    best = Path(folder).absolute() / 'best'
    return newest(best if any(map(checksums.finished, best.glob('*'))) else folder)


def whole(checkpoint: Path) -> Path:
    """A finished checkpoint, its files verified; nothing is renamed.

    Raises:
      Refusal: it is damaged, as every damaged file is named.
    """
    if faults := checksums.damage(checkpoint):
        raise Refusal(f'The checkpoint {checkpoint} is damaged: {"; ".join(faults)}. Restore it '
                      f'from a copy, or name another one: {checkpoint.parent}/STEP.')
    return checkpoint


def read_weights(checkpoint: Path) -> dict[str, StoredArray]:
    """{'params/layers/0/…': array, 'statistics/…': array} of a checkpoint, read when asked for."""
    return flatten(open_model(checkpoint))


def _items(state):
    """A state as (what another run can start from, what only this run needs)."""
    rest = state._asdict()
    return {stored: rest.pop(field) for stored, field in MODEL.items()}, rest


def _state(like, model, rest):
    return like._replace(**rest, **{field: model[stored] for stored, field in MODEL.items()})


def _bytes(state):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def _no_room(folder, what, size, free):
    return (f'No room for {what}: it needs {size / 1e6:,.1f} MB, and {folder} has '
            f'{free / 1e6:,.1f} MB left. Make room, or choose another --config.workdir.')

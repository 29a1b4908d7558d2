"""Steps that were skipped: how many in a row, and what is kept where they do not end.

The step skips itself (`optimizers.skips`); here it is counted, from metrics that are read anyway.
"""

import json
import math
import shutil
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from pkm_jax.checkpoints.store import Checkpoints
from pkm_jax.configuration.run import Run
from pkm_jax.data.loader import BatchStream
from pkm_jax.refusal import ExitStatus
from pkm_jax.training.state import TrainState

DIAGNOSIS = 'diagnosis.json'
FOLDER = 'diverged'     # of a run: the state before the first bad step, its batch, and what it gave


class Diverged(RuntimeError):
    """Loss or gradient are no numbers any more: the run has stopped, and did not save them."""
    status = ExitStatus.DIVERGED


class Skips:
    """The steps in a row that were skipped, up to the last one seen."""

    def __init__(self) -> None:
        self.in_a_row = 0
        self.first: tuple[int, dict[str, Any]] = 0, {}      # of them: its number and metrics
        self._seen = 0

    def see(self, first: int, window: Iterable[dict[str, Any]]) -> None:
        """Counts the metrics, on the host, of steps from `first` on; those seen before once."""
        for step, metrics in enumerate(window, first):
            if step <= self._seen:
                continue
            self._seen = step
            if not metrics['skipped']:
                self.in_a_row = 0
            else:
                if not self.in_a_row:
                    self.first = step, metrics
                self.in_a_row += 1

    def why(self) -> str:
        """What the first of the steps gave."""
        return why(*self.first)


def why(step: int, metrics: dict[str, Any]) -> str:
    """What a step gave, from its metrics on the host."""
    norms = ', '.join(f'{name} {float(norm):.4g}'
                      for name, norm in metrics['norms']['grad_norm'].items())
    return (f'step {step:,} gave the loss {float(metrics["loss"]):.4g} and, by group of '
            f'parameters, the gradient norms {norms}')


def stop_after_too_many(run: Run, skips: Skips, state: TrainState, stream: BatchStream) -> None:
    """Ends a run whose last steps, all those that `state` has taken seen, were skipped too often.

    What the first of them began with is kept. FOLDER/STEP is a checkpoint of the state, which no
    step since has changed. Beside it lies, for each process, its part of the batch with the epochs
    and numbers of its records. The checkpoints of the run stay as they are.

    Raises:
      Diverged: train.max_skipped_steps or more were skipped, one after the other.
    """
    if skips.in_a_row < run.train.max_skipped_steps:
        return
    first, metrics = skips.first
    folder = run.folder / FOLDER
    if jax.process_index() == 0:
        shutil.rmtree(folder, ignore_errors=True)
    multihost_utils.sync_global_devices('there is room for what diverged')
    place = stream.get_state()
    place['batches'] -= int(state.step) - (first - 1)
    before = jax.device_put(np.int32(first - 1), state.step.sharding)
    kept = Checkpoints(folder, 1)
    kept.save(state._replace(step=before), {'data': place})
    kept.close()
    batch, epochs, records = stream.at(place['batches'])
    arrays: dict[str, Any] = {'epochs': epochs, 'records': records, **batch}
    np.savez(folder / f'batch-{jax.process_index()}.npz', **arrays)
    if jax.process_index() == 0:
        numbers = jax.tree.map(float, metrics)
        (folder / DIAGNOSIS).write_text(json.dumps({'step': first, **numbers}, indent=1))
    raise Diverged(
        f'{skips.in_a_row} steps in a row were skipped (train.max_skipped_steps = '
        f'{run.train.max_skipped_steps}): {skips.why()}. {folder} has the state before it, which '
        f'no step since has changed, its batch and the numbers of its records; `python -m '
        f'pkm_jax.replay` with the options of this run takes that step again and names the '
        f'operation. The checkpoints in {run.folder} are of before. Lower train.learning_rate or '
        f'train.values_learning_rate, lengthen train.warmup, or set train.clip, in another '
        f'--config.workdir.')


def check_evaluation(step: int, loss: float, run: Run) -> None:
    """Raises Diverged where an evaluation has no finite loss, before that state is saved."""
    if not math.isfinite(loss):
        raise Diverged(
            f'At step {step:,} the loss over the validation text is {loss}: training has diverged, '
            f'or that text has nothing to predict. The checkpoints in {run.folder} are of before. '
            f'Lower train.learning_rate or train.values_learning_rate, or lengthen train.warmup, '
            f'in another --config.workdir.')

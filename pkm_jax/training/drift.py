"""The drift of a run's slots, measured at its evaluations from scores that are kept beside it."""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int32

from pkm_jax.configuration.run import Run
from pkm_jax.memory.drift import OUTDATED, drift_of_slots, sub_key_scores
from pkm_jax.models.interface import MemorySite, at, table_paths
from pkm_jax.tasks.interface import Batch, Task
from pkm_jax.training.program import Program
from pkm_jax.training.state import TrainState, gathered

FOLDER = 'scores'       # of a run: MEMORY-STEP.npy, see `memory.drift.sub_key_scores`


class DriftLog:
    """Keeps `sub_key_scores` of the first real tokens of a batch, and tells how they moved.

    All processes call it; the first one reads, writes and returns numbers, the others {}.
    """

    def __init__(self, run: Run, program: Program, mesh: Mesh, batch: Batch):
        self._folder, self._batch = run.folder, batch
        self._scores = jax.jit(functools.partial(
            scores_of, task=run.task, graph=program.graph, sites=run.model.memories,
            tokens=run.tables.drift_tokens), out_shardings=NamedSharding(mesh, P()))

    def __call__(self, state: TrainState, step: int) -> dict[str, dict[str, float]]:
        """By memory, the mean 'drift' of its slots and the share of those that are 'outdated'.

        Writes FOLDER/slot_drift_MEMORY.npy, the drift of each slot [S].
        """
        scores, count, last_selected = jax.device_get(self._scores(
            state.params, state.batch_stats, self._batch, state.last_selected))
        if jax.process_index() > 0:
            return {}
        (self._folder / FOLDER).mkdir(exist_ok=True)
        found = {}
        for name, now in scores.items():
            _save(self._path(name, step), now[:count])
            before = [at for at in self._steps(name) if at < step]
            drift = drift_of_slots([*((at, np.load(self._path(name, at))) for at in before),
                                    (step, now[:count])], last_selected[name])
            _save(self._folder / f'slot_drift_{name}.npy', drift)
            found[str(name)] = {'drift': float(drift.mean()),
                                'outdated': float(np.mean(drift > OUTDATED))}
        return found

    def _steps(self, name):
        return sorted(int(path.stem.rpartition('-')[2])
                      for path in (self._folder / FOLDER).glob(f'{name}-*.npy'))

    def _path(self, name, step):
        return self._folder / FOLDER / f'{name}-{step}.npy'


def scores_of(
    params: dict, batch_stats: dict, batch: Batch, last_selected: dict[Any, Int32[Array, 'S']], *,
    task: Task, graph: nnx.GraphDef, sites: dict[Any, MemorySite], tokens: int,
) -> tuple[dict[Any, Float[Array, 'T H 2 N']], Int32[Array, ''], dict[Any, Int32[Array, 'S']]]:
    """By memory, `sub_key_scores` of the first real tokens of a batch; how many there are, at most
    `tokens`; and `last_selected`, to be read by every host."""
    real = task.real(batch)
    chosen = jnp.nonzero(real, size=min(tokens, real.size), fill_value=0)[0]
    model = nnx.merge(graph, gathered(params, table_paths(sites)), batch_stats)
    outcome = task.outcome(model, batch, deterministic=True)
    scores = {name: sub_key_scores(outcome.reads[name].query[chosen],
                                   at(params, site.path)['codebooks'])
              for name, site in sites.items()}
    return scores, jnp.minimum(jnp.sum(real, dtype=jnp.int32), len(chosen)), last_selected


def _save(path: Path, array: np.ndarray) -> None:
    """Whole, or not at all."""
    unfinished = path.with_suffix('.part')
    with unfinished.open('wb') as file:
        np.save(file, array)
    unfinished.replace(path)

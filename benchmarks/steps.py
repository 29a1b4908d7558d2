"""Training steps on random tokens, compiled and timed: what several benchmarks share."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pkm_jax.configuration.resolve import runs_of
from pkm_jax.configuration.run import Run
from pkm_jax.mesh import Shards, make_mesh
from pkm_jax.training.program import make_program
from pkm_jax.training.state import batch_sharding

CALLS, RUNS = 10, 5
WORDS = 30_522


def seconds_of(function, calls: int = CALLS, runs: int = RUNS) -> float:
    """Seconds of `function()`: the median of `runs` timings of so many calls, after a warm-up."""
    times = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        for _ in range(calls):
            result = function()
        jax.block_until_ready(result)
        times.append((time.perf_counter() - start) / calls)
    return statistics.median(times[1:])


def run_of(config: ml_collections.ConfigDict, batch: int, length: int, words: int = WORDS) -> Run:
    """The run of a configuration of masked words with so many sequences of so many tokens."""
    predictions = -(-config.data.max_predictions * length // config.data.length)
    config.train.update(batch=batch)
    config.data.update(length=length, max_predictions=predictions)
    return runs_of(config)[0].with_vocabulary(words)


def random_batch(run: Run, seed: int = 0) -> dict[str, np.ndarray]:
    """Full sequences of random words, as many of them to be predicted as can be."""
    rng, rows = np.random.default_rng(seed), run.train.batch
    length, predictions = run.task.length, run.task.predictions()

    def words(columns):
        return rng.integers(5, run.model.vocab_size, (rows, columns), dtype=np.int32)

    return {'tokens': words(length), 'segments': np.zeros((rows, length), np.int32),
            'lengths': np.full(rows, length, np.int32), 'mlm_labels': words(predictions),
            'mlm_positions': np.sort(rng.integers(0, length, (rows, predictions), np.int32)),
            'mlm_weights': np.ones((rows, predictions), np.float32)}


class Step(NamedTuple):
    """A compiled training step, without norms of the update, and what it begins with."""
    initialise: Callable        # seed -> state
    take: Callable              # state, batch, seed -> state, metrics
    mesh: Mesh

    def put(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """A batch on the devices."""
        return jax.device_put(batch, batch_sharding(self.mesh))


def compiled(
    run: Run, shards: Shards | None = None, sparse: bool = False,
    devices: Sequence[jax.Device] | None = None, options: dict[str, Any] | None = None,
) -> Step:
    """The step of a run in a layout over some devices, by XLA with `options`; of one, the first."""
    mesh = make_mesh(shards or Shards(), devices or jax.devices()[:1])
    with jax.set_mesh(mesh):
        program = make_program(run, run.model, sparse, mesh)
        batch = jax.tree.map(lambda array: jax.ShapeDtypeStruct(
            array.shape, array.dtype, sharding=batch_sharding(mesh)), random_batch(run))
        initialise = program.initialise.lower(np.uint32(0)).compile()
        take = program.take_step.lower(program.abstract, batch, np.uint32(0),
                                       all_norms=False).compile(compiler_options=options)
    return Step(initialise, take, mesh)


def seconds_of_step(step: Step, batch: dict[str, np.ndarray], calls: int = CALLS,
                    runs: int = RUNS) -> float:
    """Seconds of a training step; none waits for the host to see the one before."""
    state, on_devices = step.initialise(np.uint32(0)), step.put(batch)
    seed = jax.device_put(np.uint32(0), NamedSharding(step.mesh, P()))

    def take():
        nonlocal state
        state, metrics = step.take(state, on_devices, seed)
        return metrics

    return seconds_of(take, calls, runs)

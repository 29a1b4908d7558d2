"""The programs of a run, compiled at the side of whatever else its start has to do."""

import functools
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jax.stages import Compiled, Lowered

from pkm_jax import dispatch
from pkm_jax.configuration.run import Run
from pkm_jax.training.program import Program, abstract_batch

Shapes = frozenset[tuple[str, tuple[int, ...]]]     # of a batch, by the names of its arrays


class Programs:
    """The compiled programs of a run.

    One thread traces and lowers them in the order in which they are needed, others compile them. An
    error of theirs is raised where the program is asked for.
    """

    def __init__(self, run: Run, program: Program, mesh: Mesh, step: int, fresh: bool):
        """Begins: with the first state if the run is `fresh`, then all from `step` + 1 on."""
        self._mesh = mesh
        self._tracer, self._compilers = ThreadPoolExecutor(1), ThreadPoolExecutor()
        self._seed = np.uint32(run.seed)
        self._compiled: dict[Any, Future[Compiled | None]] = {}
        self._closed = False
        self.operations: dict[str, list[str]] = {}  # the ways in which each is made in the step
        batches = {length: abstract_batch(run, mesh, length) for length in run.task.buckets}
        self.lengths = {shapes_of(batch): length        # tokens of a row
                        for length, batch in batches.items()}
        if fresh:
            self._begin('first state', lambda: program.initialise.lower(self._seed))
        for all_norms in _kinds_of_steps(run, step):
            for batch in batches.values():
                self._begin((all_norms, shapes_of(batch)),
                            functools.partial(self._lowered_step, program, batch, all_norms))
        for length in batches if step < run.train.steps else ():
            batch = abstract_batch(run, mesh, length, run.train.micro_batch)
            self._begin(('evaluation', length), functools.partial(_lowered_count, program, batch))

    def first_state(self) -> Any:
        """A fresh TrainState; once."""
        return self._get('first state')(self._seed)

    def wait(self) -> None:
        """Until all are there. Later they would look for the fastest kernels on devices that are
        busy and full; `Program.count` is found by JAX when it is called."""
        for program in self._compiled.values():
            program.result()
        self._compiled.pop('first state', None)
        self.close()

    def step(self, all_norms: bool, shapes: Shapes) -> Callable:
        """`Program.take_step` for batches of these shapes."""
        return self._get((all_norms, shapes))

    def close(self) -> None:
        """Begins nothing more. A process that ends waits for what is being traced or compiled."""
        self._closed = True
        self._tracer.shutdown(wait=False, cancel_futures=True)
        self._compilers.shutdown(wait=False, cancel_futures=True)

    def _begin(self, name, lower: Callable[[], Lowered]) -> None:
        def lower_here():
            with jax.set_mesh(self._mesh):      # is each thread's own
                return lower()

        def compile_it():
            program = lowered.result()
            return None if self._closed else program.compile()

        lowered = self._tracer.submit(lower_here)
        self._compiled[name] = self._compilers.submit(compile_it)

    def _get(self, name) -> Compiled:
        program = self._compiled[name].result()
        assert program, 'closed before it was compiled'
        return program

    def _lowered_step(self, program, batch, all_norms):
        with dispatch.recorded(self.operations):
            return program.take_step.lower(program.abstract, batch, self._seed,
                                           all_norms=all_norms)


def shapes_of(batch: dict[str, Any]) -> Shapes:
    """By what a compiled step is found."""
    return frozenset((name, array.shape) for name, array in batch.items())


def takes_norms(run: Run, step: int) -> bool:
    """Whether the metrics of a step have all norms."""
    return bool(run.log.norms_every) and step % run.log.norms_every == 0


def _kinds_of_steps(run, step):
    """Whether with all norms: of the next step first, then what comes within a period, if at all;
    as in all periods, so in the next one."""
    last = min(run.train.steps, step + 1 + run.log.norms_every)
    return dict.fromkeys(takes_norms(run, each) for each in range(step + 1, last + 1))


def _lowered_count(program, batch):
    params, batch_stats = program.abstract.params, program.abstract.batch_stats
    return program.count.lower(params, batch_stats, batch, program.totals(batch))

"""What a run compiles: for the loop that runs it, and for planning without its hardware.

To be used under `jax.set_mesh` of the mesh given, which may be one of devices that are not there.
"""

import functools
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.stages import Wrapped

from pkm_jax.configuration.run import Run
from pkm_jax.memory.usage import counts_spec, no_counts
from pkm_jax.mesh import OWN
from pkm_jax.models.interface import ModelConfig, table_paths
from pkm_jax.optimizers.build import make_optimizer
from pkm_jax.tasks.interface import Batch
from pkm_jax.training.state import (
    TrainState,
    batch_sharding,
    initial_state,
    laid_out,
    model_graph,
)
from pkm_jax.training.step import Totals, eval_step, train_step
from pkm_jax.xla_flags import xla_flags

# This pass of XLA copies every gradient into one array for each sum over GPUs, and out of it again:
# 0.1 to 1.2 ms of a step on two H200s of one host (docs/results.md, 2026-11-30).
PACKS_GRADIENTS = 'all-reduce-contiguous'


class Program(NamedTuple):
    """The functions of a run, and the state that they pass on."""
    graph: nnx.GraphDef
    abstract: TrainState    # shapes, dtypes and shardings
    initialise: Wrapped     # seed -> TrainState
    take_step: Wrapped      # (TrainState, which it reuses the memory of, batch, seed, *,
                            # all_norms) -> it, metrics
    count: Wrapped          # (params, batch_stats, batch, totals, which it reuses the memory of)
                            # -> totals, outputs by example
    counts: dict[Any, Any]  # by memory the SlotCounts that it sums, abstract as well

    def totals(self, batch: Batch | dict[str, jax.ShapeDtypeStruct]) -> Totals:
        """Shapes, dtypes and shardings of what `count` sums over batches like this one.

        The task names its sums where it makes them, so that they are known from a batch alone.
        """
        params, batch_stats = self.abstract.params, self.abstract.batch_stats
        none, whole = Totals({}, self.abstract.step, self.counts), self.abstract.step.sharding
        sums: Any = jax.eval_shape(self.count, params, batch_stats, batch, none)[0].sums
        return none._replace(sums=jax.tree.map(
            lambda one: jax.ShapeDtypeStruct(one.shape, one.dtype, sharding=whole), sums))


def make_program(run: Run, model: ModelConfig, sparse: bool, mesh: Mesh) -> Program:
    """The program of a run over a mesh, by the rules of `state.laid_out`; `model` is the run's,
    with its vocabulary.

    Raises:
      Refusal: a size does not divide over the devices.
    """
    tables = table_paths(model.memories)
    optimizer = make_optimizer(run.train, run.train.steps, tables, model.is_backbone, sparse)
    initialise = functools.partial(initial_state, config=model, optimizer=optimizer,
                                   track_dead=run.tables.dead_after > 0)
    abstract = laid_out(jax.eval_shape(initialise, np.uint32(run.seed)), optimizer, mesh,
                        tables, run.train.fsdp)
    layout = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    graph = model_graph(model)
    platform = mesh.devices.flat[0].platform
    step = functools.partial(
        train_step, task=run.task, graph=graph, model=model, optimizer=optimizer,
        accumulation_steps=run.train.gradient_accumulation_steps, sparse=sparse)
    count = functools.partial(eval_step, task=run.task, graph=graph, sites=model.memories)
    whole: Any = NamedSharding(mesh, P())
    by_rows: Any = NamedSharding(mesh, counts_spec(OWN))
    counts = {name: _abstract_counts(site.config.slots, by_rows)
              for name, site in model.memories.items()}
    return Program(graph, abstract, jax.jit(initialise, out_shardings=layout),
                   jax.jit(step, donate_argnums=0, out_shardings=(layout, None),
                           static_argnames='all_norms',
                           compiler_options=options_of(platform, mesh.size)),
                   jax.jit(count, donate_argnums=3,     # the rest is for every host to read
                           out_shardings=(Totals(whole, whole, by_rows), whole)), counts)


def options_of(platform: str, devices: int) -> dict[str, str] | None:
    """XLA's, for a step on so many devices of JAX's platform. They would replace the passes that
    XLA_FLAGS disables, so these are among them."""
    if platform != 'gpu' or devices == 1:
        return None
    name = 'xla_disable_hlo_passes'
    return {name: ','.join(filter(None, [xla_flags().get(name), PACKS_GRADIENTS]))}


def _abstract_counts(slots, sharding):
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        jax.eval_shape(lambda: no_counts(slots)))


def abstract_batch(
    run: Run, mesh: Mesh, length: int = 0, rows: int = 0,
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes, dtypes and shardings of a batch: of training, or of so many `rows`; of the longest
    examples, or padded to `length`."""
    return {name: jax.ShapeDtypeStruct(
                (rows or run.train.batch, *array.cut(length or run.task.length).shape), array.dtype,
                sharding=batch_sharding(mesh))
            for name, array in run.task.arrays.items()}

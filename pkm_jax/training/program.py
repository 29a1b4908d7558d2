"""What a run compiles, from its configuration: for the loop that runs it, and for planning without.

To be used under `jax.set_mesh` of the mesh given, which may be one of devices that are not there.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
from flax import nnx
from jax.sharding import Mesh
from jax.stages import Wrapped

from pkm_jax.models.bert import BertConfig
from pkm_jax.training.optimizer import make_optimizer
from pkm_jax.training.state import (TrainState, batch_sharding, initial_state, laid_out,
                                    model_graph)
from pkm_jax.training.step import train_step


class Program(NamedTuple):
    """The functions of a run, and the state that they pass on."""
    graph: nnx.GraphDef
    abstract: TrainState    # shapes, dtypes and shardings
    initialise: Wrapped     # seed -> TrainState
    take_step: Wrapped      # (TrainState, which it reuses the memory of, batch) -> it, metrics


def make_program(
    config: ml_collections.ConfigDict, model: BertConfig, sparse: bool, mesh: Mesh,
) -> Program:
    """The program of a configuration over a mesh, by the rules of `state.laid_out`."""
    optimizer = make_optimizer(config.train, sparse)
    initialise = functools.partial(initial_state, config=model, optimizer=optimizer,
                                   track_dead=config.memory.dead_after > 0)
    abstract = laid_out(jax.eval_shape(initialise, config.seed), mesh, config.train.split_backbone)
    layout = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    graph = model_graph(model)
    step = functools.partial(train_step, graph=graph, optimizer=optimizer, seed=config.seed,
                             accumulate=config.train.accumulate, sparse=sparse)
    return Program(graph, abstract, jax.jit(initialise, out_shardings=layout),
                   jax.jit(step, donate_argnums=0, out_shardings=(layout, None)))


def abstract_batch(
    config: ml_collections.ConfigDict, mesh: Mesh,
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes, dtypes and shardings of a training batch."""
    def array(*columns, dtype=jnp.int32):
        return jax.ShapeDtypeStruct((config.train.batch, *columns), dtype,
                                    sharding=batch_sharding(mesh))

    length, predictions = config.data.length, config.data.max_predictions
    return {'tokens': array(length), 'segments': array(length), 'lengths': array(),
            'mlm_positions': array(predictions), 'mlm_labels': array(predictions),
            'mlm_weights': array(predictions, dtype=jnp.float32)}

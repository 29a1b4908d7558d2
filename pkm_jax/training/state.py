"""What training changes, and where it lives."""

import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from jaxtyping import Array, Int32

from pkm_jax.memory.usage import NEVER
from pkm_jax.mesh import OWN
from pkm_jax.models.bert import Bert, BertConfig

# How the axes of an array are split: that of the first pattern found in its path within the state.
# Moments and marks of a value table lie beside it; what no pattern names is on every device.
RULES = (
    (r'memory/values$', OWN.table),
    (r'^last_selected/', OWN.table),
)
# The backbone and its moments too: a matrix by its inputs, an embedding by its features.
FULLY_SHARDED = (
    (r'kernel$', P('data')),
    (r'(embedding|decoder)$', P(None, 'data')),
)


class TrainState(NamedTuple):
    """Everything one step hands to the next. Random keys derive from (seed, step)."""
    step: Int32[Array, '']      # steps taken
    params: dict                # nested, see Bert
    statistics: dict            # running statistics of batch norms, nested like params
    optimizer: Any
    last_selected: dict         # {layer: step at which each slot was last read, or NEVER}; or {}


def initial_state(
    seed: Int32[Array, ''] | int, config: BertConfig, optimizer: optax.GradientTransformation,
    track_dead: bool,
) -> TrainState:
    """A fresh model; to be called under `jax.jit` (of the seed: as a constant, XLA would draw the
    random weights while it compiles) or `jax.eval_shape`."""
    model = Bert(config, nnx.Rngs(jax.random.key(seed)))
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    never = jnp.full(config.memory.slots, NEVER, jnp.int32)
    return TrainState(
        step=jnp.zeros((), jnp.int32), params=params,
        statistics=nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)),
        optimizer=optimizer.init(params),
        last_selected={layer: never for layer in config.memory_layers} if track_dead else {})


def model_graph(config: BertConfig) -> nnx.GraphDef:
    """The structure that `nnx.merge(graph, params, statistics)` makes a model of."""
    return nnx.split(nnx.eval_shape(lambda: Bert(config, nnx.Rngs(0))), nnx.Param, nnx.BatchStat)[0]


def laid_out(abstract: TrainState, mesh: Mesh, split_backbone: bool = False) -> TrainState:
    """An abstract state, each array with its sharding over the mesh, by RULES."""
    rules = RULES + (FULLY_SHARDED if split_backbone else ())

    def lay_out(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator='/')
        spec = next((spec for pattern, spec in rules if re.search(pattern, name)), P())
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype,
                                    sharding=NamedSharding(mesh, P(*spec[:leaf.ndim])))

    return jax.tree_util.tree_map_with_path(lay_out, abstract)


def whole(params: dict) -> dict:
    """Parameters to compute with: what FULLY_SHARDED split is gathered, never a value table."""
    if jax.sharding.get_abstract_mesh().empty:
        return params

    def gather(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator='/')
        is_split = any(re.search(pattern, name) for pattern, _ in FULLY_SHARDED)
        return jax.lax.with_sharding_constraint(leaf, P()) if is_split else leaf

    return jax.tree_util.tree_map_with_path(gather, params)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sequences of a batch over all devices."""
    return NamedSharding(mesh, OWN.tokens)

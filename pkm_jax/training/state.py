"""What training changes, and where it lives."""

from collections.abc import Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int32, Integer

from pkm_jax.memory.usage import NEVER
from pkm_jax.mesh import OWN
from pkm_jax.models.interface import ModelConfig, TracedRngs, abstract_model, path_of
from pkm_jax.optimizers.layout import state_specs
from pkm_jax.refusal import Refusal


class TrainState(NamedTuple):
    """Everything one step hands to the next. Random keys derive from (seed, step)."""
    step: Int32[Array, '']      # steps taken
    params: dict                # nested, see the model
    batch_stats: dict           # running statistics of batch norms, nested like params
    optimizer: Any
    last_selected: dict         # {memory: step at which each slot was last read, or NEVER}; or {}


def initial_state(
    seed: Integer[Array, ''] | np.uint32 | int, config: ModelConfig, optimizer:
    optax.GradientTransformation, track_dead: bool,
) -> TrainState:
    """A fresh model; to be called under `jax.jit` (of the seed: as a constant, XLA would draw the
    random weights while it compiles) or `jax.eval_shape`."""
    model = config.build(TracedRngs(jax.random.key(seed)))
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    return TrainState(
        step=jnp.zeros((), jnp.int32), params=params,
        batch_stats=nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)),
        optimizer=optimizer.init(params),
        last_selected={name: jnp.full(site.config.slots, NEVER, jnp.int32)
                       for name, site in config.memories.items()} if track_dead else {})


def model_graph(config: ModelConfig) -> nnx.GraphDef:
    """The structure that `nnx.merge(graph, params, batch_stats)` makes a model of."""
    model = abstract_model(config)
    return nnx.split(model, nnx.Param, nnx.BatchStat)[0]


def laid_out(
    abstract: TrainState, optimizer: optax.GradientTransformation, mesh: Mesh,
    tables: Collection[str], fsdp: bool = False,
) -> TrainState:
    """An abstract state, each array with its sharding over the mesh.

    Value tables, at the paths `tables`, are split by rows and columns, with `fsdp` the matrices of
    the backbone over the replicas; everything else is on every device. States of the optimizer lie
    beside their parameters.

    Raises:
      Refusal: the size of an array does not divide over the devices; it is named.
    """
    def spec(path, leaf):
        if path_of(path) in tables:
            return OWN.table
        return _fsdp(path_of(path), leaf) if fsdp else P()

    def lay_out(name, leaf, spec):
        _check_divides(name, leaf.shape, spec, mesh)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    def whole(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, P()))

    specs = jax.tree_util.tree_map_with_path(spec, abstract.params)
    return TrainState(
        step=whole(abstract.step),
        params=jax.tree_util.tree_map_with_path(
            lambda path, leaf, spec: lay_out(path_of(path), leaf, spec), abstract.params, specs),
        batch_stats=jax.tree.map(whole, abstract.batch_stats),
        optimizer=jax.tree.map(
            lambda leaf, spec: lay_out('state of the optimizer', leaf, spec), abstract.optimizer,
            state_specs(optimizer, abstract.params, specs)),
        last_selected=jax.tree.map(
            lambda leaf: lay_out('last_selected', leaf, P(*OWN.table[:1])),
            abstract.last_selected))


def gathered(params: dict, tables: Collection[str]) -> dict:
    """Parameters to compute with: what FSDP split is gathered, never a value table."""
    if jax.sharding.get_abstract_mesh().empty:
        return params

    def gather(path, leaf):
        name = path_of(path)
        is_split = name not in tables and _fsdp(name, leaf) != P()
        return jax.lax.with_sharding_constraint(leaf, P()) if is_split else leaf

    return jax.tree_util.tree_map_with_path(gather, params)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Examples of a batch over all devices."""
    return NamedSharding(mesh, OWN.tokens)


def _fsdp(path, leaf):
    """Fully sharded data parallelism: a matrix by its inputs, an embedding, which has a row for
    each word, by its features."""
    if leaf.ndim != 2:
        return P()
    return P(None, 'data') if path.endswith(('embedding', 'decoder')) else P('data')


def _check_divides(name, shape, spec, mesh):
    for size, axes in zip(shape, spec):
        axes = (axes,) if isinstance(axes, str) else axes or ()
        parts = 1
        for axis in axes:
            parts *= mesh.shape[axis]
        if size % parts:
            raise Refusal(f'{name} has the shape {shape}, whose {size} do not divide over the '
                          f'{parts} devices along {" × ".join(axes)}: change that size, the number '
                          f'of devices or memory.shards, or set train.fsdp = False.')

"""Compiles the training step of a configuration for devices that are not here, and measures it."""

import math
import re
import time
from typing import NamedTuple

import jax
import ml_collections
from jax.experimental.compilation_cache import compilation_cache

from pkm_jax.mesh import make_mesh
from pkm_jax.models.bert import BertConfig
from pkm_jax.planning import chips, hlo, memory
from pkm_jax.planning.chips import GIB, Topology
from pkm_jax.planning.hlo import Collective
from pkm_jax.planning.memory import Memory
from pkm_jax.training import settings
from pkm_jax.training.metrics import training_flops
from pkm_jax.training.plan import Plan, make_plan, tables_of
from pkm_jax.training.program import abstract_batch, make_program

RESERVED = GIB // 4     # of a TPU's memory: what the v5e compiler leaves to its runtime
GPU_SHARE = 0.75        # of a GPU's memory: JAX's, where XLA_PYTHON_CLIENT_MEM_FRACTION is not set


class Exchange(NamedTuple):
    """A collective of a step, the mesh axes that it crosses, and its seconds at the links' rate."""
    collective: Collective
    axes: str
    seconds: float


class Check(NamedTuple):
    """A training step on a topology. All amounts are one device's, for one step."""
    topology: Topology
    config: ml_collections.ConfigDict
    plan: Plan
    memory: Memory
    refusal: str            # of the compiler for want of memory: nothing below is known then
    flops: float            # model FLOPs (`training_flops`)
    counted_flops: float    # by XLA's cost analysis: loop bodies once, no custom calls
    counted_bytes: float    # HBM traffic by the same
    loop_bytes: float       # what the loops' other iterations add to it
    unknown_loops: int      # of which the iterations are not known
    exchanges: tuple[Exchange, ...]
    table_sized: tuple[str, ...]    # collectives of whole tables, or of whole rows or columns
    compile_seconds: float

    @property
    def seconds(self) -> dict[str, float]:
        """Of a step at the chip's peak rates, by what takes them; for GPUs without HBM, of which a
        program for CPUs says nothing."""
        chip = self.topology.chip
        moved = self.counted_bytes + self.loop_bytes if self.topology.is_tpu else 0.
        return {'arithmetic': self.flops / chip.flops, 'HBM': moved / chip.bandwidth,
                'links': sum(exchange.seconds for exchange in self.exchanges)}

    @property
    def step_seconds(self) -> float:
        """The longer of arithmetic and HBM, which overlap, and the links after them."""
        seconds = self.seconds
        return max(seconds['arithmetic'], seconds['HBM']) + seconds['links']

    @property
    def fits(self) -> bool:
        return not self.refusal and self.memory.fits


def check(config: ml_collections.ConfigDict, topology: Topology) -> Check:
    """The step that `loop.train` would take with this configuration on that topology.

    For a TPU it is compiled by the TPU's compiler, and what that says is passed on. For GPUs it is
    compiled for as many CPU devices: collectives are read from that, memory is estimated.

    Raises:
      ValueError, ModuleNotFoundError: see `settings.check`, `chips.devices`.
    """
    chip, count = topology.chip, math.prod(topology.shape)
    config = config.copy_and_resolve_references()
    config.data.corpus = config.data.corpus or 'none'     # planning needs no text
    settings.check(config, count)
    model = settings.model_config(config, config.model.vocab_size or config.data.vocab_size)
    available = chip.memory - RESERVED if topology.is_tpu else int(chip.memory * GPU_SHARE)
    plan = make_plan(config, model, count, available)
    devices = chips.devices(topology)
    mesh = make_mesh(plan.shards, devices)
    with jax.set_mesh(mesh):
        program = make_program(config, model, plan.sparse, mesh)
        batch = abstract_batch(config, mesh)
        given = memory.arguments(program.abstract, batch)
        lowered = program.take_step.lower(program.abstract, batch)
    start = time.perf_counter()
    compiled, refusal = _compile(lowered)
    seconds = time.perf_counter() - start
    flops = training_flops(model, config.data.length, config.data.max_predictions)
    flops *= config.train.batch * config.data.length / count
    if refusal:
        given = given | {memory.TEMPORARY: _refused_bytes(refusal)}
        return Check(topology, config, plan, Memory(given, available), refusal, flops, 0., 0., 0.,
                     0, (), (), seconds)
    needed = (memory.of_compiled(given, compiled) if topology.is_tpu else
              memory.estimated(given, config, model, plan))
    text, costs = hlo.Program(compiled.as_text()), compiled.cost_analysis()
    exchanges = _exchanges(text, topology, mesh)
    return Check(topology, config, plan, Memory(needed, available), '', flops,
                 costs['flops'], costs['bytes accessed'], text.uncounted_bytes(),
                 text.unknown_loops(), exchanges,
                 table_sized([exchange.collective for exchange in exchanges], plan, model), seconds)


def _compile(lowered):
    """The compiled step, or what its compiler said for want of memory.

    Without JAX's cache: programs for other machines cannot be read back from it.
    """
    cache = jax.config.jax_compilation_cache_dir
    jax.config.update('jax_compilation_cache_dir', None)
    compilation_cache.reset_cache()
    try:
        return lowered.compile(), ''
    except jax.errors.JaxRuntimeError as error:
        if 'RESOURCE_EXHAUSTED' not in str(error):
            raise
        return None, str(error)
    finally:
        jax.config.update('jax_compilation_cache_dir', cache)
        compilation_cache.reset_cache()


def _exchanges(text, topology, mesh):
    places = [device.coords if topology.is_tpu else (number,)
              for number, device in enumerate(mesh.devices.reshape(-1))]
    exchanges = []
    for one in text.collectives(mesh.size):
        rate = chips.link_rate(topology, [places[i] for i in one.groups[0]])
        exchanges.append(Exchange(one, one.axes(dict(mesh.shape)), one.bytes_sent / rate))
    return tuple(exchanges)


def table_sized(
    collectives: list[Collective], plan: Plan, model: BertConfig,
) -> tuple[str, ...]:
    """The collectives of an array with all rows of a value table, or with whole rows of a shard.

    By shape alone: tokens that are as many can look the same. Dense updates must add up the
    replicas' gradients of a table, so those are no find.
    """
    if not model.memory_layers:
        return ()
    _, slots, width = tables_of(model)
    rows, columns = slots // plan.shards.rows, width // plan.shards.columns

    def is_table(dims):
        if len(dims) < 2:
            return dims == (slots,) and plan.shards.rows > 1
        *_, height, breadth = dims
        return breadth % columns == 0 and (height == slots or height == rows and breadth == width)

    return tuple(f'{one.kind} of {shape}' for one in collectives for shape in one.shapes
                 if is_table(shape.dims) and (plan.sparse or one.kind != 'all-reduce'))


def _refused_bytes(refusal):
    """The memory that a compiler's refusal says was needed."""
    amount = re.search(r'(?:required for HLO temporaries \(|Used )([\d.]+)([KMGT])', refusal)
    return int(float(amount[1]) * 1024 ** (1 + 'KMGT'.index(amount[2]))) if amount else 0

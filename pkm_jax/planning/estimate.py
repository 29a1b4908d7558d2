"""Compiles the training step of a configuration for devices that are not here, and measures it."""

import re
import time
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache
from jax.stages import Lowered

from pkm_jax.configuration.run import Run
from pkm_jax.memory.embedding_bag import even_passes
from pkm_jax.mesh import make_mesh, slice_of
from pkm_jax.models.interface import ModelConfig, table_paths
from pkm_jax.planning import chips, device_memory, hlo
from pkm_jax.planning.chips import Topology
from pkm_jax.planning.device_memory import DeviceMemory
from pkm_jax.planning.hlo import Collective
from pkm_jax.planning.traffic import Traffic
from pkm_jax.training.layout import Layout, lay_out, tables_of
from pkm_jax.training.program import abstract_batch, make_program
from pkm_jax.training.start import compilation_cache as compilation_cache_folder


class Transfer(NamedTuple):
    """A collective of a step, the mesh axes that it crosses, and its seconds at the links' rate."""
    collective: Collective
    axes: str
    seconds: float


class Estimate(NamedTuple):
    """A training step on a topology. All amounts are one device's, for one step."""
    topology: Topology
    run: Run
    layout: Layout
    memory: DeviceMemory
    refusal: str            # of the compiler for want of memory: nothing below is known then
    flops: float            # model FLOPs (`Run.flops_per_step`)
    counted_flops: float    # by XLA's cost analysis: loop bodies once, no custom calls
    counted_bytes: float    # of all operands and results by the same, on the chip too
    traffic: dict[str, int]     # bytes to and from HBM of a TPU's program, by what they are for
    unknown_loops: int      # of which the iterations are not known
    own_reads: int | None   # iterations taken for loops over the reads of one owner of rows
    transfers: tuple[Transfer, ...]
    table_sized: tuple[str, ...]    # collectives of whole tables, or of whole rows or columns
    compile_seconds: float

    @property
    def moved_bytes(self) -> int:
        """HBM traffic of a step, of a TPU's program."""
        return sum(self.traffic.values())

    @property
    def seconds(self) -> dict[str, float]:
        """Of a step at the chip's peak rates, by what takes them; for GPUs without HBM, of which a
        program for CPUs says nothing."""
        chip = self.topology.chip
        return {'arithmetic': self.flops / chip.flops, 'HBM': self.moved_bytes / chip.bandwidth,
                'links': sum(transfer.seconds for transfer in self.transfers)}

    @property
    def step_seconds(self) -> float:
        """The longer of arithmetic and HBM, which overlap, and the links after them."""
        seconds = self.seconds
        return max(seconds['arithmetic'], seconds['HBM']) + seconds['links']

    @property
    def hours(self) -> float:
        """Of all `train.steps`, without evaluations, checkpoints and starts."""
        return self.run.train.steps * self.step_seconds / 3600

    @property
    def fits(self) -> bool:
        return not self.refusal and self.memory.fits


def estimate(run: Run, topology: Topology) -> Estimate:
    """The step that `loop.train` would take in this run on that topology.

    For a TPU it is compiled by the TPU's compiler, with and without norms of updates, and what that
    says is passed on. For GPUs it is
    compiled for as many CPU devices: collectives are read from that, memory is estimated.

    Raises:
      Refusal: see `lay_out`, `chips.devices`.
    """
    count = topology.size
    run = run.with_vocabulary(run.task.vocab_size)      # text is not needed
    available = chips.available_bytes(topology)
    layout = lay_out(run, count, device_bytes=available, rates=chips.rates(topology))
    mesh = make_mesh(layout.shards, chips.devices(topology))
    with jax.set_mesh(mesh):
        program = make_program(run, run.model, layout.sparse, mesh)
        batch = abstract_batch(run, mesh)
        given = device_memory.arguments(program.abstract, batch,
                                        table_paths(run.model.memories))
        # Which steps of the two there are; time and traffic are those of the first.
        norms = {0: [False], 1: [True]}.get(run.log.norms_every, [False, True])
        lowered = [program.take_step.lower(program.abstract, batch, np.uint32(run.seed),
                                           all_norms=all_norms)
                   for all_norms in (norms if topology.is_tpu else norms[:1])]
    start = time.perf_counter()
    compiled, refusal = _compile(lowered)
    seconds, flops = time.perf_counter() - start, run.flops_per_step / count
    if refusal:
        given = given | {device_memory.TEMPORARY: _refused_bytes(refusal)}
        return Estimate(topology, run, layout, DeviceMemory(given, available), refusal, flops, 0.,
                        0., {}, 0, None, (), (), seconds)
    needed = (device_memory.of_compiled(given, compiled[0], compiled[-1]) if topology.is_tpu else
              device_memory.estimated(given, run, layout))
    own_reads = _own_reads(run, layout)
    text = hlo.Module(compiled[0].as_text(), own_reads, topology.slices)
    costs = compiled[0].cost_analysis()
    transfers = _transfers(text, topology, mesh)
    return Estimate(topology, run, layout, DeviceMemory(needed, available), '', flops,
                    costs['flops'], costs['bytes accessed'],
                    Traffic(text).by_part() if topology.is_tpu else {}, text.unknown_loops(),
                    own_reads, transfers,
                    table_sized([one.collective for one in transfers], layout, run.model), seconds)


def _own_reads(run, layout):
    """Passes over the reads of one's own rows, if reads are spread evenly over the owners."""
    memories, rows = list(run.model.memories.values()), layout.shards.rows
    if not memories or rows == 1:
        return None
    config = memories[0].config
    tokens = run.tokens_per_step // run.train.gradient_accumulation_steps
    return even_passes(tokens, config.heads * config.top_k, rows)


def _compile(lowered):
    """The compiled steps, or what their compiler said for want of memory.

    Without JAX's cache: programs for other machines cannot be read back from it.
    """
    cache = compilation_cache_folder()
    jax.config.update('jax_compilation_cache_dir', None)
    compilation_cache.reset_cache()
    try:
        with ThreadPoolExecutor() as pool:
            return list(pool.map(Lowered.compile, lowered)), ''
    except jax.errors.JaxRuntimeError as error:
        if 'RESOURCE_EXHAUSTED' not in str(error):
            raise
        return [], str(error)
    finally:
        jax.config.update('jax_compilation_cache_dir', cache)
        compilation_cache.reset_cache()


def _transfers(text, topology, mesh):
    places = [(*device.coords, slice_of(device)) if topology.is_tpu else (number,)
              for number, device in enumerate(mesh.devices.reshape(-1))]
    transfers = []
    for one in text.collectives(mesh.size):
        rate = chips.link_rate(topology, [places[i] for i in one.groups[0]])
        transfers.append(Transfer(one, one.axes(dict(mesh.shape)), one.bytes_sent / rate))
    return tuple(transfers)


def table_sized(
    collectives: list[Collective], layout: Layout, model: ModelConfig,
) -> tuple[str, ...]:
    """The collectives of an array with all rows of a value table, or with whole rows of a shard.

    By shape alone: tokens that are as many can look the same. Dense updates must add up the
    replicas' gradients of a table, so those are no find.
    """
    if not model.memories:
        return ()
    _, slots, width = tables_of(model.memories)
    rows, columns = slots // layout.shards.rows, width // layout.shards.columns

    def is_table(dims):
        if len(dims) < 2:
            return dims == (slots,) and layout.shards.rows > 1
        *_, height, breadth = dims
        return breadth % columns == 0 and (height == slots or height == rows and breadth == width)

    return tuple(f'{one.kind} of {shape}' for one in collectives for shape in one.shapes
                 if is_table(shape.dims) and (layout.sparse or one.kind != 'all-reduce'))


def _refused_bytes(refusal):
    """The memory that a compiler's refusal says was needed."""
    amount = re.search(r'(?:required for HLO temporaries \(|Used )([\d.]+)([KMGT])', refusal)
    return int(float(amount[1]) * 1024 ** (1 + 'KMGT'.index(amount[2]))) if amount else 0

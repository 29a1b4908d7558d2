"""Compiles the programs of a run for devices that are not here, and measures them."""

import re
import time
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import numpy as np

from pkm_jax.configuration.run import Run
from pkm_jax.memory.embedding_bag import even_passes
from pkm_jax.mesh import make_mesh, slice_of
from pkm_jax.models.interface import ModelConfig, table_paths
from pkm_jax.planning import chips, device_memory, hlo
from pkm_jax.planning.chips import Topology
from pkm_jax.planning.device_memory import DeviceMemory
from pkm_jax.planning.hlo import Collective
from pkm_jax.planning.traffic import Traffic
from pkm_jax.refusal import is_out_of_memory
from pkm_jax.training.layout import Layout, lay_out, tables_of
from pkm_jax.training.program import abstract_batch, make_program
from pkm_jax.training.start import uncached

STEP, NORMS, FIRST, EVALUATION = 'step', 'step with norms', 'first state', 'evaluation'


class Transfer(NamedTuple):
    """A collective of a step, the mesh axes that it crosses, and its seconds at the links' rate."""
    collective: Collective
    axes: str
    seconds: float


class Compilation(NamedTuple):
    """What became of a program: compiled, or refused by its compiler for want of memory."""
    compiled: jax.stages.Compiled | None
    refusal: str
    seconds: float


class Estimate(NamedTuple):
    """A run on a topology. Amounts are one device's; all but the memory are of a training step."""
    topology: Topology
    run: Run
    layout: Layout
    memory: dict[str, DeviceMemory]     # by program: the step, and on TPUs what else there is
    refusals: dict[str, str]    # of the compiler for want of memory, by program
    compile_seconds: dict[str, float]   # by program, all side by side
    # Of a step that was refused nothing below is known.
    flops: float            # model FLOPs (`Run.flops_per_step`)
    counted_flops: float    # by XLA's cost analysis: loop bodies once, no custom calls
    counted_bytes: float    # of all operands and results by the same, on the chip too
    traffic: dict[str, int]     # bytes to and from HBM of a TPU's program, by what they are for
    unknown_operands: tuple[str, ...]   # which that program does not define: 0 bytes in `traffic`
    unknown_loops: int      # of which the iterations are not known
    own_reads: int | None   # iterations taken for loops over the reads of one owner of rows
    transfers: tuple[Transfer, ...]
    table_sized: tuple[str, ...]    # collectives of whole tables, or of whole rows or columns

    @property
    def largest(self) -> str:
        """The program that needs most memory; of those that were refused, if any was."""
        refused = self.memory.keys() & self.refusals.keys()
        return max(refused or self.memory, key=lambda name: self.memory[name].total)

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
        return not self.refusals and all(one.fits for one in self.memory.values())


def estimate(run: Run, topology: Topology) -> Estimate:
    """The programs that `loop.train` would run on that topology.

    For a TPU they are compiled by the TPU's compiler, the step with and without norms of updates,
    and what that says is passed on. For GPUs the step is compiled for as many CPU devices:
    collectives are read from that, memory is estimated.

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
        given = device_memory.arguments(program.abstract, batch, table_paths(run.model.memories))
        steps = _steps(program, run, batch, topology.is_tpu)
        others = _others(program, run, mesh, given) if topology.is_tpu else {}
    found = _compile(steps | {name: lowered for name, (lowered, *_) in others.items()})
    memory = {STEP: _step_memory(given, found, run, layout, topology)} | {
        name: _memory(beside, passed, found[name])
        for name, (_, beside, passed) in others.items() if name in found}
    known = (
        topology, run, layout, {name: DeviceMemory(one, available) for name, one in memory.items()},
        {name: one.refusal for name, one in found.items() if one.refusal},
        {name: one.seconds for name, one in found.items()}, run.flops_per_step / count)
    step, own_reads = found[STEP].compiled, _own_reads(run, layout)
    if step is None:
        return Estimate(*known, 0., 0., {}, (), 0, None, (), ())
    text, costs = hlo.Module(step.as_text(), own_reads, topology.slices), step.cost_analysis()
    traffic, transfers = Traffic(text), _transfers(text, topology, mesh)
    moved = traffic.by_part() if topology.is_tpu else {}
    return Estimate(*known, costs['flops'], costs['bytes accessed'], moved,
                    tuple(sorted(traffic.unknown)), text.unknown_loops(), own_reads, transfers,
                    table_sized([one.collective for one in transfers], layout, run.model))


def _steps(program, run, batch, is_tpu):
    """By name the lowered steps; that with norms only where there is one without too."""
    norms = {0: [False], 1: [True]}.get(run.log.norms_every, [False, True])
    return {name: program.take_step.lower(program.abstract, batch, np.uint32(run.seed),
                                          all_norms=all_norms)
            for name, all_norms in zip((STEP, NORMS), norms if is_tpu else norms[:1])}


def _others(program, run, mesh, given):
    """By name the other lowered programs, what lies on a device beside each, and how much of that
    it takes or returns."""
    batch = abstract_batch(run, mesh, rows=run.train.micro_batch)
    totals, state = program.totals(batch), program.abstract
    return {
        FIRST: (program.initialise.lower(np.uint32(run.seed)),
                *device_memory.of_first_state(given)),
        EVALUATION: (program.count.lower(state.params, state.batch_stats, batch, totals),
                     *device_memory.of_evaluation(state, batch, totals,
                                                  table_paths(run.model.memories)))}


def _step_memory(given, found, run, layout, topology):
    if not topology.is_tpu:
        return device_memory.estimated(given, run, layout, chips.rates(topology))
    steps = [found[name] for name in (STEP, NORMS) if name in found]
    refused = next((one.refusal for one in steps if one.refusal), '')
    if refused:
        return given | {device_memory.TEMPORARY: _refused_bytes(refused)}
    return device_memory.of_compiled(given, steps[0].compiled, steps[-1].compiled)


def _memory(beside, passed, found):
    """Of a program other than the step."""
    if found.refusal:
        return beside | {device_memory.TEMPORARY: _refused_bytes(found.refusal)}
    return device_memory.with_program(beside, passed, found.compiled)


def _own_reads(run, layout):
    """Passes over the reads of one's own rows, if reads are spread evenly over the owners."""
    memories, rows = list(run.model.memories.values()), layout.shards.rows
    if not memories or rows == 1:
        return None
    config = memories[0].config
    tokens = run.tokens_per_step // run.train.gradient_accumulation_steps
    return even_passes(tokens, config.heads * config.top_k, rows)


def _compile(lowered):
    """What becomes of each program, side by side."""
    with uncached(), ThreadPoolExecutor(len(lowered)) as pool:
        return dict(zip(lowered, pool.map(_compile_one, lowered.values())))


def _compile_one(lowered):
    start = time.perf_counter()
    try:
        compiled, refusal = lowered.compile(), ''
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        compiled, refusal = None, str(error)
    return Compilation(compiled, refusal, time.perf_counter() - start)


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

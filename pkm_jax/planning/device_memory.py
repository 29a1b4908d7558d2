"""What the programs of a run keep in the memory of one device, by kind.

Beside a program lies the state of the run, also what the program does not take: an evaluation needs
no moments, and has to leave them where they are.
"""

import math
from collections.abc import Collection
from typing import NamedTuple

import jax

from pkm_jax.configuration.run import Run
from pkm_jax.mesh import bytes_on_device
from pkm_jax.models.interface import flatten, parameter_of, path_of
from pkm_jax.training.layout import Layout, compact_bytes, work_of
from pkm_jax.training.layout_time import Rates
from pkm_jax.training.state import TrainState
from pkm_jax.training.step import Totals

KINDS = ('value tables', 'backbone parameters', 'optimizer state of value tables',
         'optimizer state of the backbone', 'batch', 'statistics and marks')
COUNTS = 'usage counts'
TEMPORARY = 'temporaries: activations, gradients'
PROGRAM = 'program and padding of arrays'
NORMS = 'more in steps with norms of updates'


class DeviceMemory(NamedTuple):
    """Bytes on one device; what there is to fill."""
    bytes: dict[str, int]
    available: int

    @property
    def total(self) -> int:
        return sum(self.bytes.values())

    @property
    def fits(self) -> bool:
        return self.total <= self.available


def arguments(state: TrainState, batch: dict[str, jax.ShapeDtypeStruct],
              tables: Collection[str]) -> dict[str, int]:
    """Bytes per device of the abstract arrays that a step is given, by kind; it returns as much.

    `tables` are the paths of the value tables among the parameters.
    """
    parameters, by_kind = flatten(state.params), dict.fromkeys(KINDS, 0)
    by_kind['value tables'] = bytes_on_device([parameters[path] for path in tables])
    by_kind['backbone parameters'] = bytes_on_device(state.params) - by_kind['value tables']
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.optimizer):
        of_table = parameter_of(path_of(path), parameters) in tables
        by_kind[f'optimizer state of {"value tables" if of_table else "the backbone"}'] += (
            bytes_on_device(leaf))
    by_kind['batch'] = bytes_on_device(batch)
    by_kind['statistics and marks'] = bytes_on_device(
        (state.step, state.batch_stats, state.last_selected))
    return by_kind


def of_compiled(
    given: dict[str, int], usual: jax.stages.Compiled, with_norms: jax.stages.Compiled,
) -> dict[str, int]:
    """All memory of the usual step and what the one with all norms needs beyond it, from what
    their compiler says."""
    needed = with_program(given, sum(given.values()), usual)
    beyond = sum(with_program(given, sum(given.values()), with_norms).values())
    return needed | {NORMS: max(beyond - sum(needed.values()), 0)}


def with_program(
    beside: dict[str, int], passed: int, compiled: jax.stages.Compiled,
) -> dict[str, int]:
    """What lies on a device while a program runs, by what its compiler says: `beside` and what it
    needs itself. It takes or returns `passed` bytes of `beside`."""
    said = compiled.memory_analysis()
    returned = said.output_size_in_bytes - said.alias_size_in_bytes
    return {**beside, TEMPORARY: said.temp_size_in_bytes,
            PROGRAM: said.argument_size_in_bytes - passed + returned
            + said.generated_code_size_in_bytes}


def of_first_state(given: dict[str, int]) -> tuple[dict[str, int], int]:
    """What lies on a device when a state has been made, by kind, and how much of it that program
    returns: all."""
    state = {kind: size for kind, size in given.items() if kind != 'batch'}
    return state, sum(state.values())


def of_evaluation(
    state: TrainState, batch: dict[str, jax.ShapeDtypeStruct], totals: Totals,
    tables: Collection[str],
) -> tuple[dict[str, int], int]:
    """What lies on a device in an evaluation, by kind, and how much of it the program takes."""
    beside = arguments(state, batch, tables) | {COUNTS: bytes_on_device(totals)}
    return beside, bytes_on_device((state.params, state.batch_stats, batch, totals))


def estimated(given: dict[str, int], run: Run, layout: Layout, rates: Rates) -> dict[str, int]:
    """All of a step's memory where it cannot be compiled: the model's activations of a micro-batch,
    and `gradients`. Norms need the updates, as large as gradients, when activations are gone.
    `rates` are those of the devices."""
    sequences = run.train.micro_batch // math.prod(layout.shards)
    activations = run.model.activation_bytes(sequences, run.task.length, run.task.predictions())
    changes = gradients(given, run, layout, rates)
    return {**given, TEMPORARY: activations + changes,
            NORMS: max(changes - activations, 0) if run.log.norms_every else 0}


def gradients(given: dict[str, int], run: Run, layout: Layout, rates: Rates) -> int:
    """Bytes of all gradients on one device, float32: of a table dense, or compact.

    A dense table that is read in a narrower dtype is rounded once in a step; that copy stays until
    the backward pass has read it. For compact rows every device sorts the reads of the whole
    micro-batch: slots and weights as gathered and as sorted, 16 bytes a read.
    """
    dense = given['backbone parameters']
    if not run.model.memories:
        return dense
    work = work_of(run)[0]
    if not layout.sparse:
        ours, read_as = work.itemsize, work.read.itemsize
        rounded = given['value tables'] * read_as // ours if read_as < ours else 0
        return dense + given['value tables'] + rounded
    return (dense + 16 * work.read.tokens * work.read.reads
            + compact_bytes(layout.shards, work, rates))

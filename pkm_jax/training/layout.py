"""How the value tables of a run are split and updated: as configured, else by arithmetic."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pkm_jax.configuration.run import Parts, Run
from pkm_jax.memory.bytes_sent import Read
from pkm_jax.memory.kernels import GPU_COLUMNS
from pkm_jax.memory.replica_exchange import replica_exchange
from pkm_jax.mesh import Shards
from pkm_jax.models.interface import MemorySite
from pkm_jax.optimizers.build import values_state_bytes
from pkm_jax.processes import hosts
from pkm_jax.refusal import Refusal
from pkm_jax.training.layout_time import NOT_KNOWN, Rates, Work, rates_here, seconds_by_layout

# Float32 arrays of the touched rows in a sparse update: gradient, moments, new values. By the TPU's
# compiler lazy Adam keeps 3.5, rowwise Adam 2.5 to 3.5 and Adagrad 2 in plain jnp; with a kernel,
# or where every row has its place, all keep the gradient alone. The others then stand for what the
# kernels of the read and collectives make of it: so the pod's whole step on v6e comes within 1 % of
# what was compiled (docs/results.md). GPUs: `_column_of_gpus`.
COMPACT_ARRAYS = 4
# Columns of a shard: below that reads are short, and rows are split instead.
NARROWEST = 128


class Layout(NamedTuple):
    """How many parts there are of what, whether updates are sparse, and why."""
    shards: Shards
    sparse: bool
    reasons: tuple[str, ...]    # lines for the log


class Candidate(NamedTuple):
    """A layout, and what tables take in it: bytes of a device, and seconds of a step
    (`layout_time.seconds_by_layout`)."""
    shards: Shards
    bytes: float
    seconds: float


class TableSizes(NamedTuple):
    """The value tables of a model: their number, rows S and columns V."""
    number: int
    slots: int
    width: int


def lay_out(
    run: Run, devices: int, processes: int = 1, device_bytes: int | None = None,
    rates: Rates = NOT_KNOWN,
) -> Layout:
    """The layout of a run over some devices of `device_bytes` of memory (None: not known), which
    compute and send at these rates.

    Raises:
      Refusal: what is configured cannot be; the message names the field, its value, the remedy.
    """
    train, sites = run.train, run.model.memories
    if train.micro_batch % devices:
        raise Refusal(f'A batch of {train.micro_batch} examples (train.batch = {train.batch} / '
                      f'train.gradient_accumulation_steps = {train.gradient_accumulation_steps}) '
                      f'does not divide over {devices} devices: choose a multiple of '
                      f'{devices * train.gradient_accumulation_steps}.')
    if train.batch % processes:
        raise Refusal(f'train.batch = {train.batch} does not divide over {processes} processes.')
    if not sites:
        return Layout(Shards(data=devices), False, ())
    work, why_sparse = work_of(run)
    possible = candidates(run, work, devices, rates)
    shards, why_shards = _choose(possible, run.tables.shards, device_bytes, rates)
    reasons = [f'value tables: {work.tables} of {work.read.slots:,} × {work.read.width:,}, '
               f'{why_sparse}; {why_shards}']
    if work.sparse and shards.data > 1:
        what, received = replica_exchange(shards, *work.read)
        choices = ', '.join(f'{count:,} bytes as {name}' for name, count in received.items())
        reasons.append(f'{shards.data} replicas of a table exchange {what}: each receives {choices}'
                       f' a micro-batch and memory')
    return Layout(shards, work.sparse, tuple(reasons))


def lay_out_here(run: Run) -> Layout:
    """`lay_out` over all devices of this machine or cluster, for which all processes ask."""
    known = [size for size in hosts.all_say(bytes_of_device()) if size is not None]
    return lay_out(run, jax.device_count(), jax.process_count(), min(known, default=None),
                   rates_here())


def bytes_of_device() -> int | None:
    """Memory of a device of this machine, or None where it does not say."""
    return (jax.local_devices()[0].memory_stats() or {}).get('bytes_limit')


def tables_of(sites: dict[Any, MemorySite]) -> TableSizes:
    """The value tables of a model that has memories, all of one size."""
    first = next(iter(sites.values()))
    return TableSizes(len({site.table for site in sites.values()}), first.config.slots,
                  first.value_width)


def compact_bytes(shards: Shards, work: Work, rates: Rates) -> int:
    """Bytes on a device of the rows that the reads of each micro-batch can touch, all their
    gradients and what an update makes of the sum."""
    read, shard, part = work.read, work.read.slots // shards.rows, work.read.width // shards.columns
    reads = read.tokens * read.reads
    # GPUs read other widths in plain jnp, and replicas that exchange rows sum them so.
    exchanged = replica_exchange(shards, *read).what
    if rates.known_gpus and part % GPU_COLUMNS == 0 and exchanged != 'rows':
        column = _column_of_gpus(work, shard, reads)
    else:
        column = 4 * min(shard, reads) * (COMPACT_ARRAYS + (work.steps if work.steps > 1 else 0))
    return work.tables * column * part


def _column_of_gpus(work, shard, reads):
    """Bytes of a column of rows where GPUs read and update by kernels: gradients alone.

    An update changes a row where it is (`optimizers/gpu_rows.py`; without Triton plain jnp does,
    and takes more), and gradients are made in the dtype of the table. Where a table has several, of
    micro-batches and of memories that share it, all are there beside their sum in float32. So the
    temporaries of whole steps come within 30 % of what was compiled for an H200 (docs/results.md,
    2026-11-30).
    """
    parts = work.steps * work.memories // work.tables
    total = 4 * min(shard, parts * reads) if parts > 1 else 0
    return work.itemsize * parts * min(shard, reads) + total


def work_of(run: Run) -> tuple[Work, str]:
    """What a step of a run with memories does with its value tables, and why as sparse updates or
    as dense ones."""
    train, sites = run.train, run.model.memories
    tables, memory = tables_of(sites), next(iter(sites.values())).config
    reads = memory.heads * memory.top_k
    sparse, why = _choose_updates(run, memory, tables, train.batch * run.task.length * reads)
    itemsize = jnp.dtype(memory.values_dtype).itemsize
    read = Read(train.micro_batch * run.task.length, reads, tables.slots, tables.width,
                itemsize if sparse else jnp.dtype(run.model.dtype).itemsize,
                jnp.dtype(memory.weights_dtype).itemsize)
    return Work(read, len(sites), tables.number, train.gradient_accumulation_steps, itemsize,
                values_state_bytes(train, sparse, tables.width), sparse,
                train.values_optimizer.startswith('rowwise')), why


def candidates(run: Run, work: Work, devices: int, rates: Rates) -> list[Candidate]:
    """The layouts that a configuration allows, those of fewer parts and more columns first;
    columns as long as a shard keeps NARROWEST of them, on GPUs a multiple of GPU_COLUMNS.

    Raises:
      Refusal: there is none.
    """
    asked, tables = run.tables.shards, tables_of(run.model.memories)
    possible = [Shards(devices // (rows * columns), rows, columns)
                for group in range(1, devices + 1) if devices % group == 0
                for columns in range(group, 0, -1) if group % columns == 0
                for rows in (group // columns,)
                if tables.width % columns == 0 and tables.slots % rows == 0
                and asked.columns in (0, columns) and asked.rows in (0, rows)
                and (asked.columns or columns == 1 or _is_wide(tables.width, columns, rates))]
    if not possible:
        raise Refusal(
            f'memory.shards.rows = {asked.rows}, memory.shards.columns = {asked.columns}: their '
            f'product must divide the {devices} devices, rows the {tables.slots:,} slots and '
            f'columns the {tables.width} columns of a table. 0 leaves a number to the program.')
    return [Candidate(shards, _table_bytes(shards, work, rates),
                      seconds_by_layout(shards, work, rates)) for shards in possible]


def _is_wide(width, parts, rates):
    columns = width // parts
    by_kernels = rates.may_be_gpus and width % GPU_COLUMNS == 0
    return columns % GPU_COLUMNS == 0 if by_kernels else columns >= NARROWEST


def _table_bytes(shards, work, rates):
    """Bytes on a device of its parts of the tables, their optimizer state and gradients."""
    parts = work.tables * work.read.slots * work.read.width / (shards.rows * shards.columns)
    if not work.sparse:
        return parts * (work.itemsize + work.state + 4)
    return parts * (work.itemsize + work.state) + compact_bytes(shards, work, rates)


def _choose_updates(run, memory, tables, reads):
    """Whether updates are sparse, and why: `auto` by whether a step can reach every row."""
    updates, dtype = run.tables.updates, memory.values_dtype
    if updates == 'dense' and dtype != 'float32':
        raise Refusal(f'memory.values_dtype = {dtype!r} with memory.updates = {updates!r}: only '
                      f"sparse updates round a bfloat16 table stochastically. Set 'float32'.")
    if updates != 'auto':
        return updates == 'sparse', f'{updates} updates as configured'
    if dtype != 'float32':
        return True, f'sparse updates, which a {dtype} table needs'
    sparse = reads < tables.slots
    return sparse, (f'{"sparse" if sparse else "dense"} updates, as the {reads:,} reads of a step '
                    f'{"cannot" if sparse else "can"} reach every row')


def _choose(possible: list[Candidate], asked: Parts, device_bytes: int | None, rates: Rates,
            ) -> tuple[Shards, str]:
    """The layout of the least time among those that take half of a device's memory or less, and
    why; of those whose copies of a table lie within a slice, where there are any.

    Where none fits, the most parts.
    """
    possible = [one for one in possible if not rates.crosses(one.shards)] or possible
    budget = math.inf if device_bytes is None else device_bytes / 2
    fitting = sorted((one for one in possible if one.bytes <= budget),
                     key=lambda one: one.seconds)
    best = fitting[0] if fitting else max(
        possible, key=lambda one: one.shards.rows * one.shards.columns)
    why = (f'{best.bytes / 1e9:,.2f} GB a device with optimiser state and gradient, in '
           f'{_parts(best)} parts by rows and columns')
    if asked.rows and asked.columns:
        return best.shards, why + ', as configured'
    limit = ('no limit of memory is known' if device_bytes is None else
             f'half of a device is {budget / 1e9:,.2f} GB')
    if not fitting:
        return best.shards, f'{why}, the most there are ({limit})'
    if len(possible) == 1:
        return best.shards, f'{why}, all that there are ({limit})'
    next_best = (f'; next {_parts(fitting[1])}, {rates.said(fitting[1].seconds)}'
                 if len(fitting) > 1 else '; no other fits')
    return best.shards, (f'{why}, the least time by estimate of those that fit ({limit}): '
                         f'{rates.said(best.seconds)} a step{next_best}')


def _parts(candidate):
    return f'{candidate.shards.rows} × {candidate.shards.columns}'

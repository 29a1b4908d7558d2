"""How the value tables of a run are split and updated: as configured, else by arithmetic."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pkm_jax.configuration.run import Parts, Run
from pkm_jax.memory.replica_exchange import replica_exchange
from pkm_jax.mesh import Shards
from pkm_jax.models.interface import MemorySite
from pkm_jax.optimizers.build import values_state_bytes
from pkm_jax.refusal import Refusal

# Float32 arrays of the touched rows in a sparse update: gradient, moments, new values. By the TPU's
# compiler lazy Adam keeps 3.5, rowwise Adam 2.5 to 3.5 and Adagrad 2; where every row has its place
# all keep the gradient alone; there the others stand for what kernels and collectives make of it:
# so the pod's whole step on v6e comes within 1 % of what was compiled (docs/results.md).
COMPACT_ARRAYS = 4
NARROWEST = 128     # columns of a shard: below that reads are short, and rows are split instead


class Layout(NamedTuple):
    """How many parts there are of what, whether updates are sparse, and why."""
    shards: Shards
    sparse: bool
    reasons: tuple[str, ...]    # lines for the log


class TableSizes(NamedTuple):
    """The value tables of a model: their number, rows S and columns V."""
    number: int
    slots: int
    width: int


def lay_out(
    run: Run, devices: int, processes: int = 1, device_bytes: int | None = None,
) -> Layout:
    """The layout of a run over some devices of `device_bytes` of memory (None: not known).

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
    tables, memory = tables_of(sites), next(iter(sites.values())).config
    tokens, reads = train.micro_batch * run.task.length, memory.heads * memory.top_k
    sparse, why_sparse = _choose_updates(run, memory, tables, train.batch * run.task.length * reads)
    itemsize = jnp.dtype(memory.values_dtype).itemsize
    per_number = itemsize + values_state_bytes(train, sparse, tables.width) + (0 if sparse else 4)
    numbers = tables.number * tables.slots * tables.width

    def size(shards):
        compact = compact_bytes(shards, tables, tokens * reads, train.gradient_accumulation_steps)
        return numbers * per_number / (shards.rows * shards.columns) + (compact if sparse else 0)

    shards, why_shards = _choose_shards(run.tables.shards, tables, devices, size, device_bytes)
    reasons = [f'value tables: {tables.number} of {tables.slots:,} × {tables.width:,}, '
               f'{why_sparse}; {why_shards}']
    if sparse and shards.data > 1:
        what, received = replica_exchange(
            shards, tokens, reads, tables.slots, tables.width, itemsize,
            jnp.dtype(memory.weights_dtype).itemsize)
        choices = ', '.join(f'{count:,} bytes as {name}' for name, count in received.items())
        reasons.append(f'{shards.data} replicas of a table exchange {what}: each receives {choices}'
                       f' a micro-batch and memory')
    return Layout(shards, sparse, tuple(reasons))


def bytes_of_device() -> int | None:
    """Memory of a device of this machine, or None where it does not say."""
    return (jax.local_devices()[0].memory_stats() or {}).get('bytes_limit')


def tables_of(sites: dict[Any, MemorySite]) -> TableSizes:
    """The value tables of a model that has memories, all of one size."""
    first = next(iter(sites.values()))
    return TableSizes(len({site.table for site in sites.values()}), first.config.slots,
                  first.value_width)


def compact_bytes(shards: Shards, tables: TableSizes, reads: int, accumulation_steps: int) -> int:
    """Bytes on a device of the rows that `reads` reads of each micro-batch can touch, all their
    gradients and what an update makes of the sum."""
    rows = min(tables.slots // shards.rows, reads)
    arrays = COMPACT_ARRAYS + (accumulation_steps if accumulation_steps > 1 else 0)
    return 4 * arrays * tables.number * rows * tables.width // shards.columns


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


def _choose_shards(shards: Parts, tables: TableSizes, devices: int, size: Callable[[Shards], float],
                   device_bytes: int | None) -> tuple[Shards, str]:
    """The layout, and why, for tables that need `size(layout)` bytes of a device; zeros of the
    configuration are chosen.

    The fewest shards that take half of a device's memory or less: columns as long as a shard keeps
    NARROWEST of them, rows beyond.
    """
    possible = [Shards(devices // (rows * columns), rows, columns)
                for group in range(1, devices + 1) if devices % group == 0
                for columns in range(group, 0, -1) if group % columns == 0
                for rows in (group // columns,)
                if tables.width % columns == 0 and tables.slots % rows == 0
                and shards.columns in (0, columns) and shards.rows in (0, rows)
                and (shards.columns or columns == 1 or tables.width // columns >= NARROWEST)]
    if not possible:
        raise Refusal(
            f'memory.shards.rows = {shards.rows}, memory.shards.columns = {shards.columns}: their '
            f'product must divide the {devices} devices, rows the {tables.slots:,} slots and '
            f'columns the {tables.width} columns of a table. 0 leaves a number to the program.')
    budget = math.inf if device_bytes is None else device_bytes / 2
    best = next((layout for layout in possible if size(layout) <= budget),
                max(possible, key=lambda layout: layout.rows * layout.columns))
    why = (f'{size(best) / 1e9:,.2f} GB a device with optimiser state and gradient, in '
           f'{best.rows} × {best.columns} parts by rows and columns')
    if shards.rows and shards.columns:
        return best, why + ', as configured'
    limit = ('no limit of memory is known' if device_bytes is None else
             f'half of a device is {budget / 1e9:,.2f} GB')
    found = 'the fewest that fit' if size(best) <= budget else 'the most there are'
    return best, f'{why}, {found} ({limit})'

"""How the value tables of a run are split and updated: as configured, else by arithmetic."""

import math
from typing import NamedTuple

import jax.numpy as jnp
import ml_collections

from pkm_jax.memory.replica_exchange import replica_exchange
from pkm_jax.mesh import Shards
from pkm_jax.models.bert import BertConfig

UPDATES = ('auto', 'dense', 'sparse')
# Bytes of state that each optimizer of a table keeps per number in it.
DENSE_STATE = {'adam': 8, 'sgd': 0}
SPARSE_STATE = {'adam': 8, 'sgd': 0, 'rowwise_adam': 4, 'rowwise_adagrad': 0}
# Float32 arrays of the touched rows in a sparse update: gradient, moment, step, new values.
COMPACT_ARRAYS = 4
NARROWEST = 128     # columns of a shard: below that reads are short, and rows are split instead


class Plan(NamedTuple):
    """How many parts there are of what, whether updates are sparse, and why."""
    shards: Shards
    sparse: bool
    reasons: tuple[str, ...]    # lines for the log


class Tables(NamedTuple):
    """The value tables of a model: their number, rows S and columns V."""
    number: int
    slots: int
    width: int


def make_plan(
    config: ml_collections.ConfigDict, model: BertConfig, devices: int,
    device_bytes: int | None = None,
) -> Plan:
    """The plan of a configuration for some devices of `device_bytes` of memory (None: not known).

    Raises:
      ValueError: what is configured cannot be; the message names the field, its value, the remedy.
    """
    if not model.memory_layers:
        return Plan(Shards(data=devices), False, ())
    tables = tables_of(model)
    tokens = config.train.batch // config.train.accumulate * config.data.length
    reads = model.memory.heads * model.memory.top_k
    sparse, why_sparse = _choose_updates(config, model, tables, tokens * reads)
    states = SPARSE_STATE if sparse else DENSE_STATE
    if config.train.values_optimizer not in states:
        raise ValueError(f'train.values_optimizer = {config.train.values_optimizer!r} is none of '
                         f'{tuple(states)}, which {"sparse" if sparse else "dense"} updates of '
                         f'memory.values have (memory.updates = {config.memory.updates!r}).')
    itemsize = jnp.dtype(model.memory.values_dtype).itemsize
    per_number = itemsize + states[config.train.values_optimizer] + (0 if sparse else 4)

    numbers = tables.number * tables.slots * tables.width

    def size(shards):
        compact = compact_bytes(shards, tables, tokens * reads, config.train.accumulate)
        return numbers * per_number / (shards.rows * shards.columns) + (compact if sparse else 0)

    shards, why_shards = _choose_shards(config.memory.shards, tables, devices, size, device_bytes)
    reasons = [f'value tables: {tables.number} of {tables.slots:,} × {tables.width:,}, '
               f'{why_sparse}; {why_shards}']
    if sparse and shards.data > 1:
        what, received = replica_exchange(
            shards, tokens, reads, tables.slots, tables.width, itemsize,
            jnp.dtype(model.memory.weights_dtype).itemsize)
        choices = ', '.join(f'{count:,} bytes as {name}' for name, count in received.items())
        reasons.append(f'{shards.data} replicas of a table exchange {what}: each receives {choices}'
                       f' a part of a step and memory')
    return Plan(shards, sparse, tuple(reasons))


def tables_of(model: BertConfig) -> Tables:
    """The value tables of a model that has a memory."""
    return Tables(1 if model.shared_values else len(model.memory_layers), model.memory.slots,
                  model.memory.value_width or model.width)


def compact_bytes(shards: Shards, tables: Tables, reads: int, accumulate: int) -> int:
    """Bytes on a device of the rows that `reads` reads of each part of a step can touch, all parts'
    gradients and what an update makes of their sum."""
    rows = min(tables.slots // shards.rows, reads)
    arrays = COMPACT_ARRAYS + (accumulate if accumulate > 1 else 0)
    return 4 * arrays * tables.number * rows * tables.width // shards.columns


def _choose_updates(config, model, tables, reads):
    """Whether updates are sparse, and why: `auto` by whether a step can reach every row."""
    updates, dtype = config.memory.updates, model.memory.values_dtype
    reads *= config.train.accumulate
    if updates not in UPDATES:
        raise ValueError(f'memory.updates = {updates!r} is none of {UPDATES}.')
    if updates == 'dense' and dtype != 'float32':
        raise ValueError(f'memory.values_dtype = {dtype!r} with memory.updates = {updates!r}: only '
                         f"sparse updates round a bfloat16 table stochastically. Set 'float32'.")
    if updates != 'auto':
        return updates == 'sparse', f'{updates} updates as configured'
    if dtype != 'float32':
        return True, f'sparse updates, which a {dtype} table needs'
    sparse = reads < tables.slots
    return sparse, (f'{"sparse" if sparse else "dense"} updates, as the {reads:,} reads of a step '
                    f'{"cannot" if sparse else "can"} reach every row')


def _choose_shards(shards, tables, devices, size, device_bytes):
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
        raise ValueError(
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

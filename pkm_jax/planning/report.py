"""A `Check` in words and tables."""

import collections
import math

import jax
import numpy as np

from pkm_jax.planning import memory
from pkm_jax.planning.check import Check

SMALL = 0.01    # shares of the links' time below this are summed up


def report(check: Check, name: str) -> str:
    """Everything that a check found, with the verdict at the end."""
    parts = [[_title(check, name), *check.plan.reasons], _memory(check)]
    if not check.refusal:
        parts += [_collectives(check), _step(check)]
    return '\n\n'.join('\n'.join(part) for part in [*parts, verdict(check)])


def _title(check, name):
    shards = ', '.join(f'{axis} {size}' for axis, size in check.plan.shards._asdict().items())
    how = 'compiled' if check.topology.is_tpu else 'compiled for as many CPU devices'
    return (f'{name} on {check.topology.name}: {math.prod(check.topology.shape)} devices as '
            f'{shards}; {how} in {check.compile_seconds:.0f} s, jax {jax.__version__}')


def _memory(check):
    needed = check.memory
    lines = [f'{"memory of a device":44}{"GB":>10}' + ('' if check.topology.is_tpu else
                                                       '   estimated: nothing here is compiled')]
    lines += [f'  {kind:42}{_gb(size):>10}' for kind, size in needed.bytes.items()]
    return [*lines, f'  {"in all":42}{_gb(needed.total):>10}   of {_gb(needed.available)}']


def _collectives(check):
    if not check.exchanges:
        return ['no collectives']
    sums = collections.defaultdict(lambda: np.zeros(3))     # of times, bytes and seconds, by line
    for one, axes, seconds in check.exchanges:
        sums[one.kind, _largest(one.shapes), axes] += one.times, one.bytes_sent, seconds
    total = sum(sums.values())
    lines = [f'{"collectives of a step":23} {"of":24} {"along":24} {"MB sent":>9} {"ms":>8} '
             f'{"of the step":>12}']
    smaller = np.zeros(3)
    for key, of_line in sorted(sums.items(), key=lambda item: -item[1][2]):
        if of_line[2] < SMALL * total[2]:
            smaller += of_line
        else:
            lines.append(_row(*key, of_line, check))
    if smaller[0]:
        lines.append(_row('smaller', '', '', smaller, check))
    return [*lines, _row('in all', '', '', total, check)]


def _row(kind, shapes, axes, sums, check):
    times, sent, seconds = sums
    return (f'  {times:4.0f} {kind:18} {shapes:24} {axes:24} {sent / 1e6:>9,.1f} '
            f'{seconds * 1e3:>8.2f} {seconds / check.step_seconds:>12.1%}')


def _largest(shapes):
    """The largest of several arrays, and the number of others."""
    largest = str(max(shapes, key=lambda shape: shape.bytes))
    return largest + (f' +{len(shapes) - 1}' if len(shapes) > 1 else '')


def _step(check):
    chip, seconds = check.topology.chip, check.seconds
    tokens = check.config.train.batch * check.config.data.length
    loops = (f', {check.unknown_loops} loops of unknown length as one iteration'
             if check.unknown_loops else '')
    moved = (f'{_gb(check.counted_bytes)} GB as XLA counts (also what stays on the chip; loop '
             f'bodies once), {_gb(check.loop_bytes)} GB in their other iterations{loops}, at '
             f'{chip.bandwidth / 1e9:,.0f} GB/s' if check.topology.is_tpu else
             'not known: the program for CPUs moves other bytes than that for GPUs')
    return [
        'a step of a device, at peak rates',
        f'  arithmetic  {_ms(seconds["arithmetic"])}   {check.flops / 1e12:.3f} TFLOP of the model '
        f'at {chip.flops / 1e12:,.0f} TFLOP/s (XLA counts {check.counted_flops / 1e12:.3f}: loop '
        f'bodies once)',
        f'  HBM         {_ms(seconds["HBM"])}   {moved}',
        f'  links       {_ms(seconds["links"])}   ring algorithms, at {chip.links / 1e9:,.0f} GB/s '
        f'over all links',
        f'  estimate    {_ms(check.step_seconds)}   the longer of arithmetic and HBM, then the links'
        f': {tokens / check.step_seconds:,.0f} tokens/s of all devices']


def _ms(seconds):
    return f'{seconds * 1e3:9.2f} ms'


def verdict(check: Check) -> list[str]:
    """Whether it fits, by how much, what to change where not, and what is worth a warning."""
    lines = [f'WARNING: {what}: as large as a table, or a shard of one with whole rows'
             for what in check.table_sized]
    needed = check.memory
    if check.fits:
        return [*lines, f'FITS: {_gb(needed.total)} of {_gb(needed.available)} GB, '
                        f'{needed.total / needed.available:.0%}']
    said = f' The compiler: {check.refusal.splitlines()[0]}' if check.refusal else ''
    over = max(needed.total - needed.available, 0)
    return [*lines, f'DOES NOT FIT: {_gb(needed.total)} GB or more of {_gb(needed.available)} GB, '
                    f'{_gb(over)} GB too much. {advice(check)}{said}']


def advice(check: Check) -> str:
    """What to change, by the kind of memory that takes most."""
    sizes, config = check.memory.bytes, check.config
    tables = sizes['value tables'] + sizes['optimizer state of value tables']
    backbone = sizes['backbone parameters'] + sizes['optimizer state of the backbone']
    changes = []
    if sizes.get(memory.TEMPORARY, 0) > max(tables, backbone):
        changes += ['a larger train.accumulate or smaller train.batch']
        if not config.model.remat:
            changes += ['model.remat = True']
        if config.model.attention_dropout:
            changes += ['model.attention_dropout = 0']
        if check.plan.sparse and check.plan.shards.data > 1:
            changes += ['more memory.shards, which split the rows of an update too']
    elif tables > backbone:
        changes += ["memory.values_dtype = 'bfloat16'", "train.values_optimizer = 'rowwise_adam' "
                    "(both with memory.updates = 'sparse')", 'more memory.shards or devices']
    else:
        changes += ['train.split_backbone = True']
    return f'Try {", ".join(changes)}.'


def _gb(size):
    return f'{size / 1e9:.2f}'

"""An `Estimate` in words and tables."""

import collections

import jax
import numpy as np

from pkm_jax.planning import device_memory
from pkm_jax.planning.estimate import STEP, Estimate

SMALL = 0.01    # shares of the links' time below this are summed up


def text_of(estimate: Estimate, name: str, price: float = 0.) -> str:
    """Everything that an estimate found, with the verdict at the end; `price` is that of a chip for
    an hour, 0: not named."""
    parts = [[_title(estimate, name), *estimate.layout.reasons], _memory(estimate)]
    if STEP not in estimate.refusals:
        parts += [_traffic(estimate)] if estimate.traffic else []
        parts += [_collectives(estimate), [*_step(estimate), _whole_run(estimate, price)]]
    return '\n\n'.join('\n'.join(part) for part in [*parts, verdict(estimate)])


def _title(estimate, name):
    shards = ', '.join(f'{axis} {size}' for axis, size in estimate.layout.shards._asdict().items())
    how = 'compiled' if estimate.topology.is_tpu else 'compiled for as many CPU devices'
    slices = f'{estimate.topology.slices} slices of ' if estimate.topology.slices > 1 else ''
    seconds = max(estimate.compile_seconds.values())
    return (f'{name} on {slices}{estimate.topology.name}: {estimate.topology.size} devices as '
            f'{shards}; {how} in {seconds:.0f} s, jax {jax.__version__}')


def _memory(estimate):
    """By kind and program; and how long each was compiled."""
    programs = estimate.memory
    kinds = dict.fromkeys(kind for one in programs.values() for kind in one.bytes)
    times = ', '.join(f'{name} {time:.0f} s' for name, time in estimate.compile_seconds.items())
    lines = [_cells('memory of a device, GB', programs) + (
        '' if estimate.topology.is_tpu else '   estimated: nothing here is compiled')]
    lines += [_cells(f'  {kind}', (_gb(one.bytes[kind]) if kind in one.bytes else ''
                                   for one in programs.values())) for kind in kinds]
    return [*lines, _cells('  in all', (_gb(one.total) for one in programs.values())) +
            f'   of {_gb(programs[STEP].available)}',
            *([f'compiled side by side: {times}'] if len(programs) > 1 else [])]


def _cells(label, cells):
    return f'{label:44}' + ''.join(f'{cell:>12}' for cell in cells)


def _traffic(estimate):
    """HBM traffic by what it is for; no less than SMALL of it each."""
    total, rate = estimate.moved_bytes, estimate.topology.chip.bandwidth
    lines = [f'{"between HBM and the chip in a step":72}{"GB":>8} {"ms":>8}']
    shown = {part: size for part, size in estimate.traffic.items() if size >= SMALL * total}
    rest = total - sum(shown.values())
    return lines + [f'  {part:70}{_gb(size):>8} {size / rate * 1e3:>8.2f}' for part, size in [
        *shown.items(), *([('smaller', rest)] if rest else []), ('in all', total)]]


def _collectives(estimate):
    if not estimate.transfers:
        return ['no collectives']
    sums = collections.defaultdict(lambda: np.zeros(3))     # of times, bytes and seconds, by line
    for one, axes, seconds in estimate.transfers:
        sums[one.kind, _largest(one.shapes), axes] += one.times, one.bytes_sent, seconds
    total = np.sum(list(sums.values()), axis=0)
    lines = [f'{"collectives of a step":23} {"of":24} {"along":24} {"MB sent":>9} {"ms":>8} '
             f'{"of the step":>12}']
    smaller = np.zeros(3)
    for key, of_line in sorted(sums.items(), key=lambda item: -item[1][2]):
        if of_line[2] < SMALL * total[2]:
            smaller += of_line
        else:
            kind, shapes, axes = key
            lines.append(_row(kind, shapes, axes, of_line, estimate))
    if smaller[0]:
        lines.append(_row('smaller', '', '', smaller, estimate))
    return [*lines, _row('in all', '', '', total, estimate)]


def _row(kind, shapes, axes, sums, estimate):
    times, sent, seconds = sums
    return (f'  {times:4.0f} {kind:18} {shapes:24} {axes:24} {sent / 1e6:>9,.1f} '
            f'{seconds * 1e3:>8.2f} {seconds / estimate.step_seconds:>12.1%}')


def _largest(shapes):
    """The largest of several arrays, and the number of others."""
    largest = str(max(shapes, key=lambda shape: shape.bytes))
    return largest + (f' +{len(shapes) - 1}' if len(shapes) > 1 else '')


def _step(estimate):
    chip, seconds = estimate.topology.chip, estimate.seconds
    tokens = estimate.run.tokens_per_step
    loops = (f', {estimate.unknown_loops} loops of unknown length as one iteration'
             if estimate.unknown_loops else '')
    if estimate.own_reads:
        loops += f' (passes over own reads: {estimate.own_reads}, as if spread evenly)'
    moved = (f'{_gb(estimate.moved_bytes)} GB of arrays in HBM{loops} at '
             f'{chip.bandwidth / 1e9:,.0f} GB/s (XLA counts {_gb(estimate.counted_bytes)} GB: what '
             f'stays on the chip too, loop bodies once)' if estimate.topology.is_tpu else
             'not known: the program for CPUs moves other bytes than that for GPUs')
    lines = ['a step of a device, at peak rates']
    if estimate.unknown_operands:
        lines.append(f'  WARNING: {len(estimate.unknown_operands)} operands whose size the program '
                     f'does not tell count as 0 bytes of HBM traffic: '
                     f'{", ".join(estimate.unknown_operands)}')
    return [
        *lines,
        f'  arithmetic  {_ms(seconds["arithmetic"])}   {estimate.flops / 1e12:.3f} TFLOP of the '
        f'model at {chip.flops / 1e12:,.0f} TFLOP/s (XLA counts '
        f'{estimate.counted_flops / 1e12:.3f}: loop bodies once)',
        f'  HBM         {_ms(seconds["HBM"])}   {moved}',
        f'  links       {_ms(seconds["links"])}   ring algorithms, at {chip.links / 1e9:,.0f} GB/s '
        f'over all links',
        f'  estimate    {_ms(estimate.step_seconds)}   the longer of arithmetic and HBM, then the '
        f'links: {tokens / estimate.step_seconds:,.0f} tokens/s of all devices']


def _whole_run(estimate, price):
    hours, chips = estimate.hours, estimate.topology.chips
    money = f', {hours * chips * price:,.0f} at {price:g} for each' if price else ''
    return (f'  all {estimate.run.train.steps:,} steps by this estimate: {_days(hours)}, '
            f'{hours * chips:,.0f} chip hours{money}')


def _days(hours):
    return f'{hours / 24:,.1f} days' if hours >= 24 else f'{hours:.1f} hours'


def _ms(seconds):
    return f'{seconds * 1e3:9.2f} ms'


def verdict(estimate: Estimate) -> list[str]:
    """Whether it fits, by how much, what to change where not, and what is worth a warning."""
    lines = [f'WARNING: {what}: as large as a table, or a shard of one with whole rows'
             for what in estimate.table_sized]
    needed, which = estimate.memory[estimate.largest], estimate.largest
    of_which = '' if which == STEP else f' (the {which}, more than the step)'
    if estimate.fits:
        return [*lines, f'FITS: {_gb(needed.total)} of {_gb(needed.available)} GB, '
                        f'{needed.total / needed.available:.0%}{of_which}']
    said = ''.join(f' The compiler of the {name}: {refusal.splitlines()[0]}'
                   for name, refusal in estimate.refusals.items())
    over = needed.total - needed.available      # not known where the compiler names no size
    too_much = f', {_gb(over)} GB too much' if over > 0 else ''
    return [*lines, f'DOES NOT FIT: {_gb(needed.total)} GB or more of {_gb(needed.available)} GB'
                    f'{of_which}{too_much}. {advice(estimate)}{said}']


def advice(estimate: Estimate) -> str:
    """What to change, by the kind of memory that takes most."""
    sizes, model = estimate.memory[estimate.largest].bytes, estimate.run.model
    tables = sizes['value tables'] + sizes['optimizer state of value tables']
    backbone = sizes['backbone parameters'] + sizes['optimizer state of the backbone']
    changes = []
    if sizes.get(device_memory.TEMPORARY, 0) > max(tables, backbone):
        changes += ['a larger train.gradient_accumulation_steps or smaller train.batch']
        of_step = estimate.largest == STEP
        if of_step:
            changes += [f'model.{saving.field} = {saving.value}' for saving in model.savings()]
        if of_step and estimate.layout.sparse and estimate.layout.shards.data > 1:
            changes += ['more memory.shards, which split the rows of an update too']
    elif tables > backbone:
        changes += ["memory.values_dtype = 'bfloat16'", "train.values_optimizer = 'rowwise_adam' "
                    "(both with memory.updates = 'sparse')", 'more memory.shards or devices']
    else:
        changes += ['train.fsdp = True']
    return f'Try {", ".join(changes)}.'


def _gb(size):
    return f'{size / 1e9:.2f}'

"""What the runs say about the finding of Kim & Jung 2020 (docs/method.md, section 3)."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from pkm_jax.report.runs import RunRecord, thousands

CLEAR = 0.01    # from here on two top-1 usages count as different: one percentage point


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Whether the finding holds in two of the runs; None where the numbers cannot say."""
    holds: bool | None
    title: str
    text: str
    top1: tuple[tuple[RunRecord, float], ...] = ()
    eval_tokens: int = 0


def verdicts(runs: Sequence[RunRecord]) -> list[Verdict]:
    """Whether memory added to pretrained weights uses more slots than replacement from scratch.

    One verdict for every two such runs with memories in the same layers, in the order of the runs;
    a single one, that there is none, where no two are such.
    """
    added = [run for run in runs if run.placement == 'add' and run.init_from]
    scratch = [run for run in runs if run.placement == 'replace' and not run.init_from]
    pairs = [(a, b) for a in added for b in scratch if a.layers == b.layers]
    if not pairs:
        return [Verdict(None, 'No verdict',
                        'The comparison needs a run with memory added to pretrained weights and '
                        'one from scratch with memory in replacement, in the same layers and '
                        f'evaluated; here are {len(added)} and {len(scratch)}.')]
    return [_compare(*pair) for pair in pairs]


def _compare(ours: RunRecord, theirs: RunRecord) -> Verdict:
    both = _same_step(ours, theirs)
    if both is None:
        return Verdict(None, 'No verdict yet',
                       f'{ours.name} and {theirs.name} have no evaluation at the same step.')
    (a, b), steps = both
    if a['eval_tokens'] != b['eval_tokens']:
        return Verdict(None, 'No verdict',
                       f'{ours.name} was evaluated over T = {thousands(a["eval_tokens"])} tokens '
                       f'and {theirs.name} over {thousands(b["eval_tokens"])}: usage grows with T, '
                       'so the two cannot be compared.')
    return _judge(ours, a, theirs, b, steps)


def _same_step(ours: RunRecord, theirs: RunRecord) -> tuple[tuple[dict, dict], str] | None:
    """The latest evaluations of both after as many steps, and how these were counted."""
    mine = {record['step']: record for record in ours.memory_evals}
    other = {record['step']: record for record in theirs.memory_evals}
    before = ours.start_step
    if before and max(mine) + before == max(other):
        steps = (f'After {max(other):,} steps each in all '
                 f'({before:,} of {ours.name}’s without memory)')
        return (mine[max(mine)], other[max(other)]), steps
    common = mine.keys() & other.keys()
    if not common:
        return None
    steps = f'After {max(common):,} steps with memory each'
    if before:
        steps += f' ({ours.name} had {before:,} steps without memory before)'
    return (mine[max(common)], other[max(common)]), steps


def _judge(ours: RunRecord, a: dict, theirs: RunRecord, b: dict, steps: str) -> Verdict:
    one, two = _mean_usage(a, 'top_1_usage'), _mean_usage(b, 'top_1_usage')
    gap = one - two
    if gap >= CLEAR:
        title = 'Yes: added + pretrained uses more of its slots'
        difference = f'{gap * 100:.1f} percentage points more'
        difference += f', {one / two:.2f} times as many' if two else ''
    elif gap > -CLEAR:
        title = 'No: added + pretrained and replaced + scratch use their slots alike'
        difference = (f'a difference of {gap * 100:+.1f} percentage points, too little to tell '
                      'them apart')
    else:
        title = 'No: added + pretrained uses fewer of its slots'
        difference = f'{-gap * 100:.1f} percentage points fewer'
    where = ' and '.join(map(ours.title, ours.layers))
    where = f'mean of {where}' if len(ours.layers) > 1 else where
    text = (f'{steps}, {ours.name} (memory added to pretrained weights) has {one:.1%} of its slots '
            f'in use by top-1 usage and {theirs.name} (memory in replacement, from scratch) '
            f'{two:.1%}: {difference}. Measured over T = {thousands(a["eval_tokens"])} evaluation '
            f'tokens, {where}; uniform picks would reach {_mean_usage(a, "ceiling"):.1%}. ')
    text += _compare_losses(ours, a['loss'], theirs, b['loss'])
    return Verdict(gap >= CLEAR, title, text, ((ours, one), (theirs, two)), a['eval_tokens'])


def _compare_losses(ours: RunRecord, a: float, theirs: RunRecord, b: float) -> str:
    if not (math.isfinite(a) and math.isfinite(b)):
        return f'Their losses ({a:.3f} and {b:.3f}) cannot be compared.'
    if ours.loss_name != theirs.loss_name:
        return (f'Their losses cannot be compared: {ours.loss_name["name"]} and '
                f'{theirs.loss_name["name"]}.')
    unit = f' {ours.loss_name["unit"]}'.rstrip()
    if f'{a:.3f}' == f'{b:.3f}':
        return (f'Their evaluation losses are the same ({a:.3f}{unit}). '
                'One run of each: no error bars.')
    better, low, high = (ours, a, b) if a < b else (theirs, b, a)
    return (f'{better.name} has the better evaluation loss, {low:.3f} against {high:.3f}{unit}. '
            'One run of each: no error bars.')


def _mean_usage(record: dict[str, Any], key: str) -> float:
    """A usage metric of one evaluation, averaged over the memories."""
    return math.fsum(memory[key] for memory in record['memory'].values()) / len(record['memory'])

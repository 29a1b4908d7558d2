"""A task's metrics and the usage of memories, over a fixed set of tokens."""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pkm_jax.memory.usage import (
    SlotCounts,
    host_counts,
    no_counts,
    uniform_ceiling,
    usage_metrics,
    used_shares,
)
from pkm_jax.models.interface import MemorySite
from pkm_jax.tasks.interface import Batch, Data, Task
from pkm_jax.training.state import TrainState
from pkm_jax.training.step import Totals


class Evaluation(NamedTuple):
    """What an evaluation finds."""
    values: dict[str, Any]              # of the line 'eval' in metrics.jsonl
    counts: dict[Any, SlotCounts]       # of each memory's slots
    outputs: dict[str, np.ndarray]      # the task's, of each example


def evaluate(
    state: TrainState, batches: Iterable[Batch], count: Callable, task: Task,
    sites: dict[Any, MemorySite], data: Data, split: str, examples: int, dead_after: int = 0,
) -> Evaluation:
    """Evaluates a state over batches of a split of the data.

    `count` is `step.eval_step` with everything but its arrays given; `examples` are real, and what
    comes after them in the batches fills the last one. Usage is also recorded after 1, 2, 4, …
    batches, since it grows with the tokens it is measured over.
    """
    totals, seen, outputs, number = None, [], [], 0
    for number, batch in enumerate(batches, 1):
        if totals is None:
            totals = _no_totals(count, state, batch, sites)
        totals, of_batch = count(state.params, state.batch_stats, batch, totals)
        outputs.append(of_batch)
        if number & (number - 1) == 0:
            seen.append(_seen(totals))
    if number & (number - 1):
        seen.append(_seen(totals))
    totals, seen, outputs = jax.device_get((totals, seen, outputs))
    joined = jax.tree.map(lambda *parts: np.concatenate(parts)[:examples], *outputs)
    values: dict[str, Any] = {**task.evaluation(totals.sums, joined, data, split),
                              'eval_tokens': int(totals.tokens)}
    if sites:
        values['memory'] = {str(name): _memory_values(name, counts, seen, sites[name].config)
                            for name, counts in totals.counts.items()}
    for name, last in state.last_selected.items():
        values['memory'][str(name)]['dead'] = float(jax.device_get(
            _share_dead(last, state.step, dead_after)))
    return Evaluation(values, totals.counts, joined)


def _no_totals(count, state, batch, sites):
    """Zeros of what `count` sums, whatever the task's sums are."""
    counts = {name: no_counts(site.config.slots) for name, site in sites.items()}
    empty = Totals({}, jnp.zeros((), jnp.int32), counts)
    # Sums of the first batch tell which there are: the task names them where it makes them.
    sums = jax.eval_shape(functools.partial(count, state.params, state.batch_stats, batch),
                          empty)[0].sums
    return empty._replace(sums=jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), sums))


def _seen(totals):
    """Tokens so far, and by memory the usage over them."""
    return totals.tokens, {name: used_shares(counts) for name, counts in totals.counts.items()}


@functools.partial(jax.jit, static_argnames='after')
def _share_dead(last_selected, step, after):
    return jnp.mean(last_selected < step - after)


def _memory_values(name, counts, seen, memory):
    def ceiling(tokens):
        return float(uniform_ceiling(memory.slots, int(tokens), memory.heads))

    curve = [[int(tokens), *map(float, shares[name]), ceiling(tokens)] for tokens, shares in seen]
    return {**usage_metrics(counts), 'ceiling': curve[-1][3], 'slots': memory.slots,
            'heads': memory.heads, 'k': memory.top_k, 'curve': curve}


def save_counts(path, counts: SlotCounts) -> None:
    """count, top1 [S] int64 and mass [S] float64 of one memory, for the report."""
    counts = host_counts(counts)
    np.savez_compressed(path, count=counts.selected, top1=counts.best, mass=counts.mass)

"""A task's metrics and the usage of memories, over a fixed set of tokens."""

import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pkm_jax.memory.usage import (
    SlotCounts,
    host_counts,
    on_host,
    uniform_ceiling,
    usage_metrics,
    used_shares,
)
from pkm_jax.models.interface import MemorySite
from pkm_jax.tasks.interface import Batch, Data, Task
from pkm_jax.training.program import Program
from pkm_jax.training.state import TrainState


class Evaluation(NamedTuple):
    """What an evaluation finds."""
    values: dict[str, Any]              # of the line 'eval' in metrics.jsonl
    counts: dict[Any, SlotCounts]       # of each memory's slots
    outputs: dict[str, np.ndarray]      # the task's, of each example


def evaluate(
    state: TrainState, batches: Iterable[Batch], program: Program, task: Task,
    sites: dict[Any, MemorySite], data: Data, split: str, examples: int, dead_after: int = 0,
) -> Evaluation:
    """Evaluates a state over batches of a split of the data.

    `examples` are real, and what comes after them in the batches fills the last one. Usage is also
    recorded after 1, 2, 4, … batches, since it grows with the tokens it is measured over.
    """
    totals, seen, outputs, number = None, [], [], 0
    for number, batch in enumerate(batches, 1):
        if totals is None:
            totals = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype,
                                                         device=leaf.sharding),
                                  program.totals(batch))
        totals, of_batch = program.count(state.params, state.batch_stats, batch, totals)
        outputs.append(of_batch)
        if number & (number - 1) == 0:
            seen.append(_seen(totals))
    if number & (number - 1):
        seen.append(_seen(totals))
    counts = on_host(totals.counts)
    totals, seen, outputs = jax.device_get((totals._replace(counts={}), seen, outputs))
    joined = jax.tree.map(lambda *parts: np.concatenate(parts)[:examples], *outputs)
    values: dict[str, Any] = {**task.evaluation(totals.sums, joined, data, split),
                              'eval_tokens': int(totals.tokens)}
    if sites:
        values['memory'] = {str(name): _memory_values(name, of_one, seen, sites[name].config)
                            for name, of_one in counts.items()}
    for name, last in state.last_selected.items():
        values['memory'][str(name)]['dead'] = float(jax.device_get(
            _share_dead(last, state.step, dead_after)))
    return Evaluation(values, counts, joined)


def _seen(totals):
    """Tokens so far, and by memory the usage over them; the totals' memory is used again."""
    return (jnp.copy(totals.tokens),
            {name: used_shares(counts) for name, counts in totals.counts.items()})


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

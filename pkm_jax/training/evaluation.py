"""Masked-LM quality and memory usage over a fixed set of tokens."""

import functools
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np

from pkm_jax.memory.usage import (SlotCounts, host_counts, no_counts, uniform_ceiling,
                                  usage_metrics, used_shares)
from pkm_jax.models.bert import BertConfig
from pkm_jax.training.state import TrainState
from pkm_jax.training.step import Batch, Totals


def evaluate(
    state: TrainState, batches: Iterable[Batch], step: Callable, config: BertConfig,
    dead_after: int = 0,
) -> tuple[dict, dict[int, SlotCounts]]:
    """The 'eval' values of metrics.jsonl, and the counts of each memory's slots.

    `step` is `step.eval_step` with everything but its arrays given. Usage is also recorded after
    1, 2, 4, … batches, since it grows with the tokens it is measured over.
    """
    totals = _no_totals(config)
    seen = []
    number = 0
    for number, batch in enumerate(batches, 1):
        totals = step(state.params, state.statistics, batch, totals)
        if number & (number - 1) == 0:
            seen.append(_seen(totals))
    if number & (number - 1):
        seen.append(_seen(totals))
    totals, seen = jax.device_get((totals, seen))
    loss = float(totals.loss / totals.predictions)
    values = {'loss': loss, 'accuracy': float(totals.correct / totals.predictions),
              'perplexity': float(np.exp(np.float64(loss))), 'eval_tokens': int(totals.tokens)}
    if totals.counts:
        values['memory'] = {str(layer): _memory_values(layer, counts, seen, config.memory)
                            for layer, counts in totals.counts.items()}
    for layer, last in state.last_selected.items():
        values['memory'][str(layer)]['dead'] = float(jax.device_get(
            _share_dead(last, state.step, dead_after)))
    return values, totals.counts


def _no_totals(config):
    zero = jnp.zeros(())
    return Totals(zero, zero, zero, jnp.zeros((), jnp.int32),
                  {layer: no_counts(config.memory.slots) for layer in config.memory_layers})


def _seen(totals):
    """Tokens so far, and by layer the usage over them."""
    return totals.tokens, {layer: used_shares(counts) for layer, counts in totals.counts.items()}


@functools.partial(jax.jit, static_argnames='after')
def _share_dead(last_selected, step, after):
    return jnp.mean(last_selected < step - after)


def _memory_values(layer, counts, seen, memory):
    def ceiling(tokens):
        return float(uniform_ceiling(memory.slots, int(tokens), memory.heads))

    curve = [[int(tokens), *map(float, shares[layer]), ceiling(tokens)] for tokens, shares in seen]
    return {**usage_metrics(counts), 'ceiling': curve[-1][3], 'slots': memory.slots,
            'heads': memory.heads, 'k': memory.top_k, 'curve': curve}


def save_counts(path, counts: SlotCounts) -> None:
    """count, top1 [S] int64 and mass [S] float64 of one memory, for the report."""
    counts = host_counts(counts)
    np.savez_compressed(path, count=counts.selected, top1=counts.best, mass=counts.mass)

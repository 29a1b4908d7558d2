"""One training step and one evaluation step, as pure functions."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, Int32, Key

from pkm_jax.memory.sharded import merge, put_rows
from pkm_jax.memory.sparse_rows import SparseRows, rows_of
from pkm_jax.memory.usage import SlotCounts, count_slots, mark_selected
from pkm_jax.training.sparse_updates import apply_updates
from pkm_jax.training.state import TrainState, whole

Batch = dict[str, Array]


class Totals(NamedTuple):
    """Sums over evaluation batches."""
    loss: Float[Array, '']
    correct: Float[Array, '']
    predictions: Float[Array, '']
    tokens: Int32[Array, '']
    counts: dict[int, SlotCounts]


def train_step(
    state: TrainState, batch: Batch, *, graph: nnx.GraphDef,
    optimizer: optax.GradientTransformation, seed: int, accumulate: int, sparse: bool = False,
) -> tuple[TrainState, dict[str, Array]]:
    """The state after one update on the mean masked-LM loss of `batch`, and its metrics.

    With `accumulate` > 1 the batch is computed in that many parts, each weighing as many
    predictions as it has; batch norms and their running statistics see the parts in turn.
    `sparse`: gradients of value tables reach the optimizer as SparseRows.
    """
    steps = jax.random.split(jax.random.key(seed))[1]   # the seed's own key drew the weights
    key, rounding = jax.random.split(jax.random.fold_in(steps, state.step))
    predictions = jnp.maximum(jnp.sum(batch['mlm_weights']), 1)
    deltas = {}
    if sparse:
        model = nnx.merge(graph, state.params, state.statistics)
        deltas = model.no_deltas(batch['tokens'].size // accumulate)

    def part(statistics, last_selected, batch, key):
        differentiate = jax.value_and_grad(masked_lm, (0, 1), has_aux=True)
        (loss, (correct, reads)), (gradient, rows) = differentiate(
            state.params, deltas, statistics, batch, key, graph, predictions)
        rows = {layer: SparseRows(ids, rows[layer], count)
                for layer, (ids, count) in _touched(reads).items()}
        gradient = _with_tables(gradient, dict.fromkeys(rows))
        last_selected = {layer: _mark(last, reads[layer], _real(batch), state.step)
                         for layer, last in last_selected.items()}
        return (gradient, loss, correct), rows, _new_statistics(statistics, reads), last_selected

    if accumulate == 1:
        sums, rows, statistics, last_selected = part(
            state.statistics, state.last_selected, batch, key)
        rows = jax.tree.map(lambda leaf: leaf[None], rows)
    else:
        def add_part(carry, inputs):
            sums, *rest = carry
            new, rows, *rest = part(*rest, *inputs)
            return (jax.tree.map(jnp.add, sums, new), *rest), rows

        start = _with_tables(jax.tree.map(jnp.zeros_like, state.params), dict.fromkeys(deltas))
        parts = jax.tree.map(lambda a: rearrange(a, '(b part) ... -> part b ...', part=accumulate),
                             batch)
        (sums, statistics, last_selected), rows = jax.lax.scan(
            add_part, ((start, jnp.zeros(()), jnp.zeros(())), state.statistics,
                       state.last_selected), (parts, jax.random.split(key, accumulate)))

    gradient, loss, correct = sums
    gradient = _with_tables(gradient, _by_table(rows, state.params))
    updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.params)
    params = apply_updates(state.params, updates, rounding)
    metrics = {'loss': loss, 'accuracy': correct / predictions,
               'grad_norm': optax.tree.norm(rows_of(gradient))}
    return TrainState(state.step + 1, params, statistics, optimizer_state, last_selected), metrics


def eval_step(
    params: dict, statistics: dict, batch: Batch, totals: Totals, *, graph: nnx.GraphDef,
) -> Totals:
    """`totals` with one batch added; no dropout, running statistics."""
    loss, (correct, reads) = masked_lm(params, {}, statistics, batch, None, graph, 1.)
    return Totals(
        totals.loss + loss, totals.correct + correct,
        totals.predictions + jnp.sum(batch['mlm_weights']),
        totals.tokens + jnp.sum(batch['lengths']),
        {layer: count_slots(counts, reads[layer], _real(batch))
         for layer, counts in totals.counts.items()})


def masked_lm(
    params: dict, deltas: dict, statistics: dict, batch: Batch, key: Key[Array, ''] | None,
    graph: nnx.GraphDef, predictions: Float[Array, ''] | float,
) -> tuple[Float[Array, ''], tuple]:
    """Cross-entropy summed over the masked words of a batch, divided by `predictions`.

    Also the number of words guessed right, and what the memories read. For `deltas` see `Bert`.
    """
    model = nnx.merge(graph, whole(params), statistics)
    states, reads = model(batch['tokens'], batch['segments'], batch['lengths'],
                          deterministic=key is None, rngs=key, deltas=deltas)
    logits = model.mlm_logits(states, batch['mlm_positions'])
    labels, weights = batch['mlm_labels'], batch['mlm_weights']
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    correct = jnp.sum((jnp.argmax(logits, axis=-1) == labels) * weights)
    return jnp.sum(losses * weights) / predictions, (correct, reads)


def _real(batch: Batch):
    """Which of the B·L tokens are no padding."""
    positions = jnp.arange(batch['tokens'].shape[1])[None]
    return rearrange(positions < batch['lengths'][:, None], 'b l -> (b l)')


def _new_statistics(statistics, reads):
    """The running statistics that the memories of a training step returned, nested as before."""
    if not statistics:
        return {}
    return {'layers': {layer: {'memory': {'query_norm': read.batch_stats}}
                       for layer, read in reads.items()}}


def _touched(reads):
    """{layer: ids and count of the rows it read} of the memories that were given a delta."""
    return {layer: read.touched for layer, read in reads.items() if read.touched}


def _mark(last_selected, reads, real, step):
    """`mark_selected`; of sparse updates by the rows alone, at a cost that S does not change."""
    if not reads.touched:
        return mark_selected(last_selected, reads, real, step)
    ids, _ = reads.touched
    return put_rows(last_selected, ids, jnp.full(ids.shape, step))


def _with_tables(tree, tables):
    """A tree like the parameters, with the value tables of some layers replaced."""
    if not tables:
        return tree
    layers = dict(tree['layers'])
    for layer, table in tables.items():
        memory = dict(layers[layer]['memory'])
        if 'values' in memory:
            layers[layer] = {**layers[layer], 'memory': {**memory, 'values': table}}
    return {**tree, 'layers': layers}


def _by_table(rows, params):
    """{layer that owns a table: its summed SparseRows}, of rows in parts by layer that read it."""
    tables = {layer: params['layers'][layer]['memory']['values'] for layer in rows
              if 'values' in params['layers'][layer]['memory']}
    summed = {}
    for owner, table in tables.items():
        readers = [owner] if len(tables) > 1 else list(rows)    # a shared table is the only one
        parts = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *(rows[r] for r in readers))
        only = len(parts.ids) == 1
        summed[owner] = jax.tree.map(lambda leaf: leaf[0], parts) if only else merge(
            parts, len(table))
    return summed

"""One training step and one evaluation step, as pure functions."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Bool, Float, Int32, UInt32

from pkm_jax.memory.sharded import merge, no_delta, put_rows, rows_dtype
from pkm_jax.memory.sparse_rows import SparseRows, rows_of
from pkm_jax.memory.usage import SlotCounts, count_slots, mark_selected
from pkm_jax.models.interface import MemorySite, ModelConfig, at, replaced, table_paths
from pkm_jax.optimizers.groups import group_norms
from pkm_jax.optimizers.skips import is_sound, params_if, rows_if, state_if
from pkm_jax.optimizers.sparse import apply_updates, norms_of
from pkm_jax.tasks.interface import Batch, Task
from pkm_jax.training.state import TrainState, gathered

Sites = dict[Any, MemorySite]       # the memories of a model by name


class Totals(NamedTuple):
    """Sums over evaluation batches."""
    sums: dict[str, Float[Array, '']]   # 'loss', 'terms' and the task's own
    tokens: Int32[Array, '']
    counts: dict[Any, SlotCounts]       # by memory


def train_step(
    state: TrainState, batch: Batch, seed: UInt32[Array, ''] | np.uint32, *, task: Task,
    graph: nnx.GraphDef, model: ModelConfig, optimizer: optax.GradientTransformation,
    accumulation_steps: int = 1, sparse: bool = False, all_norms: bool = True,
) -> tuple[TrainState, dict[str, Any]]:
    """The state after one update on the mean loss of `batch`, and its metrics.

    The batch is computed in `accumulation_steps` micro-batches, each of which weighs as many terms
    as it has; batch norms and their running statistics see them in turn. `sparse`: gradients of
    value tables reach the optimizer as SparseRows. The metrics 'norms' hold norms by group of
    parameters: the gradient's, and with `all_norms` those of update and new parameters. The `seed`
    of the run is no constant of the program: runs of other seeds find it compiled.

    Where loss or gradient is not finite, or the loss above its limit (`optimizers.skips`), the
    metric 'skipped' is 1 and the state that of before, but for its step.
    """
    steps = jax.random.split(jax.random.key(seed))[1]    # the other drew the weights
    key, rounding = jax.random.split(jax.random.fold_in(steps, state.step))
    terms = jnp.maximum(task.terms(batch), 1)
    sites = model.memories
    tables = table_paths(sites)
    gradient, sums, rows, batch_stats, last_selected = _differentiate(
        state, batch, key, terms, task=task, graph=graph, config=model,
        accumulation_steps=accumulation_steps, sparse=sparse)

    with jax.named_scope('update'):
        gradient = _with_tables(gradient, sites, _summed(rows, sites, state.params))
        loss, norm = sums['loss'] / terms, optax.tree.norm(rows_of(gradient))
        sound = is_sound(loss, norm, state.optimizer)
        updates, optimizer_state = optax.with_extra_args_support(optimizer).update(
            rows_if(sound, gradient, state.params), state.optimizer, state.params, loss=loss,
            rounding=rounding)
        params = apply_updates(state.params, updates, rounding)
        metrics = {**task.metrics({**sums, 'terms': terms}), 'skipped': (~sound).astype(jnp.int32),
                   'grad_norm': norm, 'norms': {'grad_norm': group_norms(gradient, tables)}}
        if all_norms:
            metrics['norms'] |= _norms_of_change(updates, params, tables, sparse)
        if sparse:
            last_selected = {name: _mark_rows(last, rows[name].ids, state.step, sound)
                             for name, last in state.last_selected.items()}
        else:
            last_selected = state_if(sound, last_selected, state.last_selected)
        return TrainState(
            state.step + 1, params_if(sound, updates, params, state.params),
            state_if(sound, batch_stats, state.batch_stats),
            state_if(sound, optimizer_state, state.optimizer), last_selected), metrics


def _differentiate(state, batch, key, terms, *, task, graph, config, accumulation_steps, sparse):
    """Of the sum of losses over `terms`: the gradient, without tables where these are `sparse`; the
    task's sums; by memory the SparseRows of each micro-batch, stacked, of one too; running
    statistics; and marks of selected slots, where `sparse` those of before: rows mark later."""
    sites = config.memories
    tables = table_paths(sites)
    deltas = _no_deltas(sites, task.real(batch).size // accumulation_steps) if sparse else {}

    def loss_of(params, deltas, batch_stats, batch, key):
        params = gathered(_with_rounded_words(params, config), tables)
        model = nnx.merge(graph, params, batch_stats)
        outcome = task.outcome(model, batch, deterministic=False, rngs=key, deltas=deltas)
        stats = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
        loss = outcome.loss / terms
        return loss, ({'loss': outcome.loss, **outcome.sums}, outcome.reads, stats)

    def without_tables(tree):
        """With nothing in the place of tables whose gradients are rows."""
        return _with_tables(tree, sites, dict.fromkeys(_owners(sites)) if sparse else {})

    def micro_step(batch_stats, last_selected, batch, key):
        (gradient, rows), (sums, reads, batch_stats) = jax.grad(loss_of, (0, 1), has_aux=True)(
            state.params, deltas, batch_stats, batch, key)
        rows = {name: SparseRows(reads[name].touched.ids, rows[name], reads[name].touched.count)
                for name in rows}
        if not sparse:
            last_selected = {name: mark_selected(last, reads[name], task.real(batch), state.step)
                             for name, last in last_selected.items()}
        return (without_tables(gradient), sums), rows, batch_stats, last_selected

    before = state.batch_stats, state.last_selected
    if accumulation_steps == 1:
        totals, rows, *rest = micro_step(*before, batch, key)
        return *totals, jax.tree.map(lambda leaf: leaf[None], rows), *rest

    inputs = (jax.tree.map(lambda a: rearrange(a, '(b n) ... -> n b ...', n=accumulation_steps),
                           batch), jax.random.split(key, accumulation_steps))
    _, (sums, *_) = jax.eval_shape(loss_of, state.params, deltas, state.batch_stats,
                                   *jax.tree.map(lambda a: a[0], inputs))
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype),
                         (without_tables(state.params), sums))

    def add_micro_step(carry, inputs):
        totals, *rest = carry
        new, rows, *rest = micro_step(*rest, *inputs)
        return (jax.tree.map(jnp.add, totals, new), *rest), rows

    carry, rows = jax.lax.scan(add_micro_step, (zeros, *before), inputs)
    totals, *rest = carry
    return *totals, rows, *rest


def eval_step(
    params: dict, batch_stats: dict, batch: Batch, totals: Totals, *, task: Task,
    graph: nnx.GraphDef, sites: Sites,
) -> tuple[Totals, dict[str, Array]]:
    """`totals` with one batch added, and the task's outputs by example; no dropout, running
    statistics."""
    model = nnx.merge(graph, gathered(params, table_paths(sites)), batch_stats)
    outcome = task.outcome(model, batch, deterministic=True)
    sums = {'loss': outcome.loss, 'terms': task.terms(batch), **outcome.sums}
    real = task.real(batch)
    counts = {name: count_slots(counts, outcome.reads[name], real)
              for name, counts in totals.counts.items()}
    sums = {name: totals.sums.get(name, 0) + value for name, value in sums.items()}
    return (Totals(sums, totals.tokens + jnp.sum(real, dtype=jnp.int32), counts),
            outcome.outputs)


def _with_rounded_words(params, config):
    """With the word embedding in the compute dtype, to which look-ups and logits round it anyway.

    Rounded once, both parts of its gradient are added before devices sum it: in bfloat16 a third of
    the bytes, or without logits of words half.
    """
    path = config.word_embedding
    return replaced(params, path, at(params, path).astype(config.dtype)) if path else params


def _no_deltas(sites, tokens):
    """By memory, the zeros that stand for the rows which that many tokens can touch, in the dtype
    in which these are made: to widen them before a kernel reads them would take another array."""
    def zeros(site):
        config, like = site.config, jax.ShapeDtypeStruct
        reads = tokens, config.heads * config.top_k
        dtype = rows_dtype(like((config.slots, site.value_width), jnp.dtype(config.values_dtype)),
                           like(reads, jnp.dtype(config.weights_dtype)))
        return no_delta(config.slots, site.value_width, math.prod(reads), dtype=dtype)

    return {name: zeros(site) for name, site in sites.items()}


def _mark_rows(
    last_selected: Int32[Array, 'S'], ids: Int32[Array, 'n rows'], step: Int32[Array, ''],
    sound: Bool[Array, ''],
) -> Int32[Array, 'S']:
    """`mark_selected` of the rows that each of n micro-batches touched, at a cost that S does not
    change; of none unless `sound`."""
    def mark(last, ids):
        return put_rows(last, ids, jnp.full(ids.shape, step)), None

    ids = jnp.where(sound, ids, len(last_selected))
    if len(ids) == 1:
        return mark(last_selected, ids[0])[0]
    return jax.lax.scan(mark, last_selected, ids)[0]


def _owners(sites: Sites) -> dict[Any, list]:
    """The memories whose path a value table has, each with all that read the table."""
    readers: dict[Any, list] = {}
    for name, site in sites.items():
        owner = next(other for other, at in sites.items() if at.table == site.table)
        readers.setdefault(owner, []).append(name)
    return readers


def _with_tables(tree: dict, sites: Sites, tables: dict[Any, Any]) -> dict:
    """A tree like the parameters, with other nodes for the value tables of these memories."""
    for name, table in tables.items():
        tree = replaced(tree, sites[name].table, table)
    return tree


def _summed(rows: dict[Any, SparseRows], sites: Sites, params: dict) -> dict[Any, SparseRows]:
    """By owner of a table its SparseRows, of rows in micro-batches by memory that read them."""
    summed = {}
    for owner, readers in (_owners(sites) if rows else {}).items():
        parts = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *(rows[r] for r in readers))
        only = len(parts.ids) == 1
        summed[owner] = jax.tree.map(lambda leaf: leaf[0], parts) if only else merge(
            parts, len(at(params, sites[owner].table)))
    return summed


def _norms_of_change(updates, params, tables, sparse):
    """Norms of an update and of the parameters after it, by group.

    They take 3 to 7 % of a step of BERT-base on an H100, since a dense update has to be written to
    be summed. Of a table of which few rows change there is no norm: to pass over it would take
    longer than the step.
    """
    norms = {'update_norm': group_norms(norms_of(updates), tables),
             'param_norm': group_norms(params, tables)}
    if sparse:
        del norms['param_norm']['values']
    return norms

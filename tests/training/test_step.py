"""One step: accumulation, weighting, statistics, and what evaluation sums."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

from pkm_jax.data.labelled import Labelled
from pkm_jax.memory import embedding_bag as bag
from pkm_jax.memory.layer import MemoryConfig
from pkm_jax.memory.usage import NEVER, no_counts
from pkm_jax.mesh import OWN
from pkm_jax.models.bert import BertConfig
from pkm_jax.models.interface import table_paths
from pkm_jax.optimizers import rules
from pkm_jax.optimizers.build import OptimizerConfig, make_optimizer
from pkm_jax.tasks.masked_lm import MaskedLM
from pkm_jax.training import evaluation, step
from pkm_jax.training.program import Program, options_of
from pkm_jax.training.state import initial_state, model_graph

LENGTH, PREDICTIONS = 8, 3
TASK = MaskedLM(length=LENGTH, max_predictions=PREDICTIONS)
NO_DATA = Labelled('', 0, {})       # the task's metrics are of its sums alone
pytestmark = pytest.mark.usefixtures('compile_once')


@functools.cache    # what it returns compiles once for each shape
def setup(query_norm='layer', rate=0., track_dead=False):
    config = BertConfig(
        vocab_size=40, layers=2, width=16, attention_heads=2, feed_forward_width=16, max_length=8,
        dropout=rate, attention_dropout=rate, memory_layers=(1,), placement='add',
        memory=MemoryConfig(sub_keys=5, heads=2, top_k=2, query_width=6, query_norm=query_norm))
    optimizer = optax.sgd(1.)
    state = jax.jit(functools.partial(initial_state, config=config, optimizer=optimizer,
                                      track_dead=track_dead))(0)

    def take(state, batch, micro_steps=1):
        return step.train_step(
            state, batch, np.uint32(0), task=TASK, graph=model_graph(config), model=config,
            optimizer=optimizer, accumulation_steps=micro_steps)

    return config, state, jax.jit(take, static_argnames='micro_steps')


def evaluate(state, batches, config, **options):
    graph, sites = model_graph(config), config.memories
    count = jax.jit(functools.partial(step.eval_step, task=TASK, graph=graph, sites=sites))
    program = Program(graph, state, jax.jit(initial_state), jax.jit(step.train_step), count,
                      {name: no_counts(site.config.slots) for name, site in sites.items()})
    examples = sum(len(batch['tokens']) for batch in batches)
    values, counts, _ = evaluation.evaluate(state, batches, program, TASK, sites, NO_DATA,
                                            'validation', examples, **options)
    return values, counts


def batch(rows=8, seed=0):
    """Rows of different lengths, with different numbers of predictions."""
    rng = np.random.default_rng(seed)
    asked = np.arange(PREDICTIONS)[None] < rng.integers(0, PREDICTIONS + 1, (rows, 1))
    return {'tokens': jnp.asarray(rng.integers(5, 40, (rows, LENGTH)), jnp.int32),
            'segments': jnp.zeros((rows, LENGTH), jnp.int32),
            'lengths': jnp.asarray(rng.integers(4, LENGTH + 1, rows), jnp.int32),
            'mlm_positions': jnp.asarray(rng.integers(0, 4, (rows, PREDICTIONS)), jnp.int32),
            'mlm_labels': jnp.asarray(rng.integers(5, 40, (rows, PREDICTIONS)), jnp.int32),
            'mlm_weights': jnp.asarray(asked, jnp.float32)}


def test_look_ups_and_logits_add_their_gradients_of_words_before_these_are_widened():
    """So devices sum one array of the compute dtype, and not two of which one is in float32."""
    config = BertConfig(vocab_size=40, layers=1, width=16, attention_heads=2, feed_forward_width=16,
                        max_length=8, dropout=0., attention_dropout=0., dtype='bfloat16')
    optimizer = optax.sgd(1.)
    state = jax.eval_shape(functools.partial(initial_state, config=config, optimizer=optimizer,
                                             track_dead=False), 0)
    with jax.numpy_dtype_promotion('standard'):     # which the gradient of jax's attention needs
        program = str(jax.make_jaxpr(functools.partial(
            step.train_step, task=TASK, graph=model_graph(config), model=config,
            optimizer=optimizer))(state, batch(), np.uint32(0)))
    assert re.findall(r':(.*)\[40,16\] = add_any', program) == ['bf16']


@pytest.mark.parametrize('micro_steps', [2, pytest.param(4, marks=pytest.mark.slow)])
def test_accumulated_parts_equal_one_big_batch(micro_steps):
    """Parts hold different numbers of predictions: their means must not be averaged."""
    _, state, take = setup()
    whole, metrics = take(state, batch())
    parts, same = take(state, batch(), micro_steps)
    for ours, theirs in zip(jax.tree.leaves(parts), jax.tree.leaves(whole)):
        np.testing.assert_allclose(ours, theirs, atol=2e-6)
    for ours, theirs in zip(jax.tree.leaves(same), jax.tree.leaves(metrics), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)


@pytest.mark.slow
def test_running_statistics_see_the_parts_in_turn():
    _, state, take = setup('batch')
    once = jax.tree.leaves(take(state, batch())[0].batch_stats)
    twice = jax.tree.leaves(take(state, batch(), 2)[0].batch_stats)
    start = jax.tree.leaves(state.batch_stats)
    assert len(once) == len(twice) == len(start) == 2
    # The running variance starts at 1: 0.9 of it is left after one update, 0.81 after two.
    np.testing.assert_allclose(np.mean(twice[1] - .81 * start[1]),
                               1.9 * np.mean(once[1] - .9 * start[1]), rtol=0.2)


def test_loss_is_the_mean_over_predictions():
    config, state, take = setup()
    data = batch()
    _, metrics = take(state, data)
    by_row = [take(state, {k: v[i:i + 1] for k, v in data.items()})[1]['loss'] for i in range(8)]
    weights = np.asarray(data['mlm_weights']).sum(1)
    np.testing.assert_allclose(metrics['loss'], np.sum(np.asarray(by_row) * weights) / weights.sum(),
                               rtol=1e-5)


def test_padding_and_unasked_predictions_change_nothing():
    _, state, take = setup('batch')
    data = batch()
    real = np.arange(LENGTH)[None] < np.asarray(data['lengths'])[:, None]
    changed = dict(data, tokens=jnp.where(real, data['tokens'], 39 - data['tokens']),
                   mlm_labels=jnp.where(data['mlm_weights'] > 0, data['mlm_labels'], 1))
    for ours, theirs in zip(jax.tree.leaves(take(state, changed)), jax.tree.leaves(take(state, data))):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.slow
def test_dropout_differs_by_step_and_part_and_is_reproducible():
    _, state, take = setup(rate=0.5)
    first = take(state, batch())[1]['loss']
    assert take(state, batch())[1]['loss'] == first
    assert take(state._replace(step=state.step + 1), batch())[1]['loss'] != first
    twin = jax.tree.map(lambda a: jnp.repeat(a[:4], 2, axis=0), batch())    # equal parts
    parts = take(state, twin, 2)[1]['loss']
    assert parts != take(state, jax.tree.map(lambda a: a[:4], batch()))[1]['loss']


def test_slots_read_are_marked_with_the_step():
    _, state, take = setup(track_dead=True)
    state = take(state._replace(step=state.step + 4), batch())[0]
    marks = np.asarray(state.last_selected[1])
    assert set(marks) == {NEVER, 4} and int(state.step) == 5


def test_evaluation_sums_over_batches():
    config, state, take = setup('batch', track_dead=True)
    one, two = batch(seed=1), batch(seed=2)
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), one, two)
    split, split_counts = evaluate(state, [one, two], config, dead_after=1)
    whole, whole_counts = evaluate(state, [both], config, dead_after=1)
    for name in ('loss', 'accuracy', 'perplexity', 'eval_tokens'):
        assert split[name] == pytest.approx(whole[name], rel=1e-5)
    np.testing.assert_array_equal(split_counts[1].selected, whole_counts[1].selected)
    np.testing.assert_array_equal(split_counts[1].best, whole_counts[1].best)
    use = split['memory']['1']
    assert use['dead'] == 1.0       # nothing was trained yet
    assert [point[0] for point in use['curve']] == [int(one['lengths'].sum()), split['eval_tokens']]
    assert use['ceiling'] == pytest.approx(1 - (1 - 1 / 25) ** (split['eval_tokens'] * 2))
    assert np.log(split['perplexity']) == pytest.approx(split['loss'])


def test_rows_of_length_zero_count_nowhere():
    config, state, _ = setup('batch')
    data = batch()
    empty = jax.tree.map(lambda a: jnp.zeros_like(a[:3]), data)
    filled = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), data, empty)
    ours = evaluate(state, [filled], config)
    theirs = evaluate(state, [data], config)
    assert ours[0]['loss'] == pytest.approx(theirs[0]['loss'], rel=1e-6)
    assert ours[0]['eval_tokens'] == theirs[0]['eval_tokens']
    np.testing.assert_array_equal(ours[1][1].selected, theirs[1][1].selected)


H200 = AbstractMesh((1, 1, 1), OWN.names, (AxisType.Auto,) * 3,
                    abstract_device=AbstractDevice('NVIDIA H200', 132, 'gpu'))


def sparse_setup(values_dtype='bfloat16'):
    """A step that updates rows of a table wide enough for kernels, and its state."""
    config = BertConfig(
        vocab_size=40, layers=1, width=16, attention_heads=2, feed_forward_width=16, max_length=8,
        memory_layers=(0,), placement='add', memory=MemoryConfig(
            sub_keys=5, heads=2, top_k=2, query_width=6, value_width=128,
            values_dtype=values_dtype))
    optimizer = make_optimizer(OptimizerConfig(warmup=1, values_optimizer='rowwise_adam', clip=.1),
                               10, table_paths(config.memories), config.is_backbone, sparse=True)
    state = jax.jit(functools.partial(initial_state, config=config, optimizer=optimizer,
                                      track_dead=False))(np.uint32(0))

    def take(state, batch, micro_steps=1):
        return step.train_step(
            state, batch, np.uint32(0), task=TASK, graph=model_graph(config), model=config,
            optimizer=optimizer, accumulation_steps=micro_steps, sparse=True)

    return state, take


@pytest.mark.parametrize('values_dtype, micro_steps, mesh, dtype', [
    ('bfloat16', 1, H200, 'bfloat16'), ('bfloat16', 2, H200, 'float32'),
    ('float32', 1, H200, 'float32'), ('bfloat16', 1, None, 'float32')])
def test_rows_reach_the_update_in_the_dtype_in_which_they_are_made(
        monkeypatch, values_dtype, micro_steps, mesh, dtype):
    """On GPUs that of the table, but where rows of micro-batches are added up."""
    (state, take), data = sparse_setup(values_dtype), batch()
    found, update = [], rules.update_rows
    monkeypatch.setattr(rules, 'update_rows', lambda *arguments, **settings: (
        found.append(arguments[5].dtype), update(*arguments, **settings))[1])
    with use_abstract_mesh(mesh or AbstractMesh((), ())):
        jax.eval_shape(functools.partial(take, micro_steps=micro_steps), state, data)
    assert found == [dtype]


@pytest.mark.parametrize('micro_steps', [1, pytest.param(2, marks=pytest.mark.slow)])
def test_narrow_rows_change_nothing_to_the_bit(monkeypatch, micro_steps):
    """Of two steps by the kernels of GPUs, interpreted, whose rows are in bfloat16 or widened."""
    state, take = sparse_setup()
    gradients, update = bag._compact_choice, rules.update_rows
    monkeypatch.setattr(bag, '_compact_choice', lambda _, *arrays, **settings: gradients(
        'gpu', *arrays, **settings))
    monkeypatch.setattr(rules, 'update_rows', lambda _, *arrays, **settings: update(
        'gpu', *arrays, **settings))

    def steps(dtype):
        monkeypatch.setattr(step, 'rows_dtype', lambda *_: jnp.dtype(dtype))
        run = jax.jit(functools.partial(take, micro_steps=micro_steps))
        first, metrics = run(state, batch())
        state_and_metrics = dict(enumerate((*run(first, batch(seed=1)), metrics)))
        return jax.tree_util.tree_leaves_with_path(state_and_metrics)

    narrow, wide = steps('bfloat16'), steps('float32')
    for (path, one), (_, other) in zip(narrow, wide, strict=True):
        np.testing.assert_array_equal(*(np.asarray(array, np.float32) for array in (one, other)),
                                      err_msg=jax.tree_util.keystr(path))


def test_several_gpus_alone_sum_gradients_where_they_lie(monkeypatch):
    for case in (('gpu', 1), ('tpu', 2), ('cpu', 2)):
        assert options_of(*case) is None, case
    monkeypatch.setenv('XLA_FLAGS', '--xla_disable_hlo_passes=fusion,dce --xla_dump_to=here')
    assert options_of('gpu', 2) == {
        'xla_disable_hlo_passes': 'fusion,dce,all-reduce-contiguous'}

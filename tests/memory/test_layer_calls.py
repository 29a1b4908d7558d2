"""How the layer can be called: shapes, masks, modes, randomness, and JAX's transformations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pkm_jax.memory.layer import MemoryConfig, ProductKeyMemory
from pkm_jax.memory.sparse_rows import SparseRows
from pkm_jax.memory.usage import count_slots, no_counts
from pkm_jax.refusal import Refusal

WIDTH = 12
SIZES = dict(sub_keys=7, heads=3, top_k=4, query_width=10)


def build(seed=0, **changes):
    return ProductKeyMemory(MemoryConfig(**SIZES | changes), WIDTH, rngs=nnx.Rngs(seed))


def inputs(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(*shape, WIDTH)), jnp.float32)


def stats_of(memory):
    return jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(memory, nnx.BatchStat)))


def assert_close(got, want):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, want)


@pytest.mark.parametrize('shape', [(), (24,), (2, 12), (2, 3, 4)])
def test_any_leading_shape_reads_the_same(shape):
    memory, flat = build(), inputs(24)
    x = flat.reshape(*shape, WIDTH) if shape else flat[0]
    mask = jnp.arange(24) % 5 > 0
    y, reads = memory.read(x, mask.reshape(shape) if shape else mask[0], deterministic=True)
    want, want_reads = memory.read(flat, mask, deterministic=True)
    tokens = max(int(np.prod(shape)), 1)
    assert y.shape == x.shape and reads.slots.shape == (tokens, 3, 4)
    assert_close(y.reshape(-1, WIDTH), want[:tokens])
    np.testing.assert_array_equal(reads.slots, want_reads.slots[:tokens])
    assert_close(reads.weights, want_reads.weights[:tokens])


@pytest.mark.parametrize('norm', ['none', 'layer', 'batch'])
@pytest.mark.parametrize('sparse', [False, True])
def test_no_tokens_read_nothing(norm, sparse):
    memory, x = build(query_norm=norm), inputs(2, 0)
    before = stats_of(memory)
    y, reads = memory.read(x, delta=memory.no_delta(0) if sparse else None)
    assert y.shape == (2, 0, WIDTH) and reads.slots.shape == reads.weights.shape == (0, 3, 4)
    assert not sparse or (reads.touched.ids.shape == (0,) and reads.touched.count.tolist() == [0])
    memory.update_batch_stats(reads.batch_stats)
    jax.tree.map(np.testing.assert_array_equal, stats_of(memory), before)
    graph, params, rest = nnx.split(memory, nnx.Param, ...)
    gradients = jax.grad(lambda params: nnx.merge(graph, params, rest).read(
        x, delta=memory.no_delta(0) if sparse else None)[0].sum())(params)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradients))


def test_states_of_another_width_are_refused_naming_both():
    with pytest.raises(Refusal, match=r'width 12 .*\(2, 9, 13\), of width 13'):
        build()(jnp.ones((2, 9, 13)))


def test_counts_for_a_table_of_another_size_are_refused():
    _, reads = build().read(inputs(2, 9))
    with pytest.raises(Refusal, match='Counts of 64 slots for reads of a table of 49'):
        count_slots(no_counts(64), reads, jnp.ones((2, 9), bool))


def test_no_mask_is_a_mask_of_all():
    memory, x = build(), inputs(2, 9)
    everything = memory.read(x, jnp.ones((2, 9), bool))
    jax.tree.map(np.testing.assert_array_equal, memory.read(x), everything)


def test_a_call_is_the_read_and_updates_batch_statistics():
    memory, x, mask = build(), inputs(2, 9), jnp.arange(9)[None] < jnp.asarray([[9], [4]])
    before = stats_of(memory)
    y, reads = memory.read(x, mask)
    jax.tree.map(np.testing.assert_array_equal, stats_of(memory), before)    # changes nothing
    np.testing.assert_array_equal(memory(x, mask), y)
    after = stats_of(memory)['query_norm']
    assert reads.batch_stats.keys() == after.keys() == {'mean', 'var'}
    jax.tree.map(np.testing.assert_array_equal, after, reads.batch_stats)
    assert not np.array_equal(after['mean'], before['query_norm']['mean'])


def test_deterministic_is_the_attribute_unless_the_call_says_so():
    memory, x = build(), inputs(9)
    training, evaluation = (memory.read(x, deterministic=d)[0] for d in (False, True))
    assert not np.allclose(training, evaluation)
    np.testing.assert_array_equal(memory.read(x)[0], training)
    memory.eval()
    np.testing.assert_array_equal(memory.read(x)[0], evaluation)
    np.testing.assert_array_equal(memory.read(x, deterministic=False)[0], training)
    before = stats_of(memory)
    memory(x)
    jax.tree.map(np.testing.assert_array_equal, stats_of(memory), before)
    memory.train()
    np.testing.assert_array_equal(memory.read(x)[0], training)


def test_randomness_is_taken_as_flax_does_and_asked_for_only_where_it_is_needed():
    memory, x = build(value_dropout=.5), inputs(9)
    by_key = memory.read(x, rngs=jax.random.key(3))[0]
    assert np.mean(by_key == 0) > .2
    stream = nnx.Rngs(dropout=7)
    key = nnx.Rngs(dropout=7).dropout()
    np.testing.assert_array_equal(memory.read(x, rngs=stream)[0], memory.read(x, rngs=key)[0])
    assert not np.array_equal(memory.read(x, rngs=stream)[0], memory.read(x, rngs=key)[0])
    memory.read(x, rngs=nnx.Rngs(dropout=7).dropout)
    memory.read(x, deterministic=True)
    with pytest.raises(Refusal, match='needs rngs'):
        memory.read(x)


def test_a_mask_of_another_shape_is_refused():
    with pytest.raises(Refusal, match=r'mask \(9,\) of tokens \(2, 9\)'):
        build()(inputs(2, 9), jnp.ones(9, bool))


def test_nnx_jit_and_grad_update_batch_statistics():
    memory, plain, x = build(), build(), inputs(2, 9)

    @nnx.jit
    def step(memory, x):
        return nnx.grad(lambda memory: jnp.sum(memory(x) ** 2))(memory)

    gradients = step(memory, x)
    plain(x)
    assert_close(stats_of(memory), stats_of(plain))
    assert all(np.asarray(leaf).any() for leaf in jax.tree.leaves(gradients['values']))


@pytest.mark.parametrize('policy', [None, jax.checkpoint_policies.dots_saveable])
def test_gradients_under_checkpoint_are_the_same(policy):
    memory, x = build(value_dropout=.3), inputs(2, 9)
    graph, params, rest = nnx.split(memory, nnx.Param, ...)

    def loss(params, x, remat):
        def run(params, x):
            y, reads = nnx.merge(graph, params, rest).read(x, rngs=jax.random.key(0))
            return y, reads.batch_stats
        y, stats = (jax.checkpoint(run, policy=policy) if remat else run)(params, x)
        return jnp.sum(y ** 2), stats

    differentiate = jax.jit(jax.grad(loss, (0, 1), has_aux=True), static_argnums=2)
    assert_close(differentiate(params, x, True), differentiate(params, x, False))


def test_nnx_remat_of_a_call_updates_batch_statistics():
    memory, plain, x = build(), build(), inputs(2, 9)
    gradient = nnx.grad(lambda memory: jnp.sum(nnx.remat(lambda m, x: m(x))(memory, x) ** 2))(memory)
    want = nnx.grad(lambda memory: jnp.sum(memory(x) ** 2))(plain)
    assert_close(stats_of(memory), stats_of(plain))
    assert_close(nnx.to_pure_dict(gradient), nnx.to_pure_dict(want))


@pytest.mark.parametrize('sparse', [False, True])
def test_a_sweep_over_stacked_parameters(sparse):
    """jax.vmap over three memories, values and gradients, against one at a time."""
    memories, x = [build(seed) for seed in range(3)], inputs(2, 9)
    graph = nnx.split(memories[0])[0]
    states = [nnx.split(memory)[1] for memory in memories]

    def loss(state, x):
        memory = nnx.merge(graph, state)

        def read(state, delta):
            y, reads = nnx.merge(graph, state).read(x, delta=delta)
            return jnp.sum(y ** 3), (y, reads)

        delta = memory.no_delta(18) if sparse else None
        return jax.grad(read, (0, 1) if sparse else 0, has_aux=True)(state, delta)

    together = jax.vmap(loss, (0, None))(jax.tree.map(lambda *a: jnp.stack(a), *states), x)
    for n, state in enumerate(states):
        assert_close(jax.tree.map(lambda a: a[n], together), loss(state, x))


def test_sparse_gradients_are_the_rows_of_the_dense_one():
    memory, x = build(), inputs(2, 2)
    graph, params, rest = nnx.split(memory, nnx.Param, ...)

    def loss(params, delta):
        y, reads = nnx.merge(graph, params, rest).read(x, delta=delta)
        return jnp.sum(y ** 3), reads.touched

    dense, nothing = jax.grad(loss, has_aux=True)(params, None)
    (others, rows), touched = jax.grad(loss, (0, 1), has_aux=True)(params, memory.no_delta(4))
    found = SparseRows(touched.ids, rows, touched.count)
    count = int(found.count[0])
    assert nothing is None and 0 < count < 49 and not np.asarray(others['values'][...]).any()
    table = np.zeros((50, WIDTH), np.float32)
    table[found.ids] = found.rows
    np.testing.assert_allclose(table[:49], dense['values'][...], atol=1e-6)

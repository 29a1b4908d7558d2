"""The whole layer against an independent NumPy implementation in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pkm_jax.memory.layer import MemoryConfig, ProductKeyMemory
from pkm_jax.refusal import Refusal

WIDTH, TOKENS = 12, 23
CONFIG = MemoryConfig(sub_keys=7, heads=3, top_k=4, query_width=10, query_norm='none')


def build(seed=0, **changes):
    config = MemoryConfig(**{**CONFIG.__dict__, **changes})
    model = ProductKeyMemory(config, WIDTH, rngs=nnx.Rngs(seed))
    graph, params, statistics = nnx.split(model, nnx.Param, nnx.BatchStat)
    params, statistics = nnx.to_pure_dict(params), nnx.to_pure_dict(statistics)
    rng = np.random.default_rng(seed)
    noise = lambda a: a + jnp.asarray(rng.normal(size=a.shape) * 0.3, jnp.float32)  # noqa: E731
    return graph, jax.tree.map(noise, params), jax.tree.map(lambda a: jnp.abs(noise(a)), statistics)


def inputs(seed=0, tokens=TOKENS, padding=0):
    states = np.random.default_rng(seed + 100).normal(size=(tokens, WIDTH))
    return jnp.asarray(states, jnp.float32), jnp.arange(tokens) < tokens - padding


def reference(config, params, statistics, states, real, training):
    """Read [T, D] and usage weights [T, S] by explicit search over all slots, token by token."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    stats = jax.tree.map(lambda a: np.asarray(a, np.float64), statistics)
    x, real = np.asarray(states, np.float64), np.asarray(real)
    n, half = config.sub_keys, config.query_width // 2
    query = (x @ p['query']['kernel'] + p['query']['bias']).reshape(-1, config.heads, 2, half)
    if config.query_norm != 'none':
        if config.query_norm == 'layer':
            mean, var = query.mean(-1, keepdims=True), query.var(-1, keepdims=True)
        elif training:
            mean, var = query[real].mean(0), query[real].var(0)
        else:
            mean, var = stats['query_norm']['mean'], stats['query_norm']['var']
        query = (query - mean) / np.sqrt(var + 1e-5)
        query = query * p['query_norm']['scale'] + p['query_norm']['bias']
    usage = np.zeros((len(x), n * n))
    for t in np.flatnonzero(real):
        for h in range(config.heads):
            scores = np.add.outer(p['codebooks'][h, 0] @ query[t, h, 0],
                                  p['codebooks'][h, 1] @ query[t, h, 1]).ravel()
            best = np.argsort(-scores)[:config.top_k]
            exp = np.exp(scores[best] - scores[best].max())
            usage[t, best] += exp / exp.sum()
    read = usage @ p['values']
    return (read @ p['output']['kernel'] if 'output' in p else read), usage


@pytest.mark.parametrize('query_norm', ['none', 'layer', 'batch'])
@pytest.mark.parametrize('value_width', [0, 5])
@pytest.mark.parametrize('training', [False, True])
def test_values_and_gradients(query_norm, value_width, training):
    graph, params, statistics = build(query_norm=query_norm, value_width=value_width)
    states, real = inputs(padding=6)
    direction = np.random.default_rng(5).normal(size=states.shape)

    def loss(params, states):
        model = nnx.merge(graph, params, statistics)
        read, reads = model.read(states, real, deterministic=not training)
        return jnp.sum(read * jnp.asarray(direction, jnp.float32)), (read, reads)

    (_, (read, reads)), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(params, states)
    config = nnx.merge(graph, params, statistics).config
    expected, usage = reference(config, params, statistics, states, real, training)
    np.testing.assert_allclose(read, expected, rtol=1e-4, atol=1e-5)
    ours = np.zeros_like(usage)
    np.add.at(ours, (np.arange(TOKENS)[:, None, None], np.asarray(reads.slots)), reads.weights)
    np.testing.assert_allclose(ours, usage, atol=1e-5)

    # Each gradient is checked along one random direction, by a central difference in float64.
    rng = np.random.default_rng(6)
    leaves, tree = jax.tree.flatten((params, states))
    for i, (leaf, gradient) in enumerate(zip(leaves, jax.tree.leaves(gradients))):
        step = rng.normal(size=leaf.shape) * 1e-6

        def shifted(sign):
            moved = [np.asarray(a, np.float64) + (sign * step if j == i else 0)
                     for j, a in enumerate(leaves)]
            moved_params, moved_states = jax.tree.unflatten(tree, moved)
            return np.sum(direction * reference(config, moved_params, statistics, moved_states,
                                                real, training)[0])

        numeric = (shifted(1) - shifted(-1)) / 2
        np.testing.assert_allclose(np.sum(gradient * step), numeric, rtol=2e-3, atol=1e-9)


def test_batch_norm_does_not_see_padding():
    graph, params, statistics = build(query_norm='batch')
    states, _ = inputs()
    padded = jnp.concatenate([states, jnp.full((9, WIDTH), 1e3)])
    real = jnp.arange(len(padded)) < len(states)
    model = nnx.merge(graph, params, statistics)
    alone, alone_reads = model.read(states)
    read, reads = model.read(padded, real)
    np.testing.assert_allclose(read[:len(states)], alone, atol=1e-5)
    np.testing.assert_array_equal(read[len(states):], 0)
    np.testing.assert_array_equal(reads.weights[len(states):], 0)
    for ours, theirs in zip(jax.tree.leaves(reads.batch_stats),
                            jax.tree.leaves(alone_reads.batch_stats)):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_running_statistics_are_those_of_torch():
    """new = 0.9 · old + 0.1 · batch, the variance unbiased."""
    graph, params, statistics = build(query_norm='batch')
    states, real = inputs(padding=4)
    reads = nnx.merge(graph, params, statistics).read(states, real)[1]
    weights = jax.tree.map(np.asarray, params['query'])
    query = np.asarray(states) @ weights['kernel'] + weights['bias']
    query = query.reshape(TOKENS, 3, 2, 5)[:-4]
    old = statistics['query_norm']
    np.testing.assert_allclose(reads.batch_stats['mean'], .9 * old['mean'] + .1 * query.mean(0),
                               rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(reads.batch_stats['var'],
                               .9 * old['var'] + .1 * query.var(0, ddof=1), rtol=1e-4)


def test_initialisation():
    params = nnx.to_pure_dict(nnx.state(ProductKeyMemory(
        MemoryConfig(sub_keys=64, heads=2, top_k=8, query_width=32), 48, rngs=nnx.Rngs(0)),
        nnx.Param))
    bound = 16 ** -.5
    assert bound * .99 < np.abs(params['codebooks']).max() <= bound
    assert abs(np.std(params['codebooks']) - bound / 3 ** .5) < 0.01 * bound
    assert abs(np.std(params['values']) - 48 ** -.5) < 0.01 * 48 ** -.5
    assert len({float(b) for b in params['codebooks'][:, :, 0, 0].ravel()}) == 4


def test_dropout_acts_on_input_query_and_value_and_keeps_the_mean():
    for name in ('input_dropout', 'query_dropout', 'value_dropout'):
        graph, params, statistics = build(**{name: 0.5})
        states, real = inputs()
        model = nnx.merge(graph, params, statistics)
        plain = model(states, real, deterministic=True)
        reads = jnp.stack([model(states, real, rngs=jax.random.key(i)) for i in range(3)])
        assert all(not np.allclose(plain, r) for r in reads)
        if name == 'value_dropout':
            zero = np.asarray(reads == 0)
            assert 0.35 < zero.mean() < 0.65
            np.testing.assert_allclose(reads[~zero], np.broadcast_to(plain * 2, reads.shape)[~zero],
                                       rtol=1e-5)


@pytest.mark.parametrize('field, value, message', [
    ('top_k', 8, 'memory.top_k = 8 must lie within 1..sub_keys, and memory.sub_keys is 7.'),
    ('top_k', 0, 'memory.top_k = 0 must be 1 or more.'),
    ('query_width', 9, 'memory.query_width = 9 must be even: each half of a query searches one '
     'codebook.'),
    ('query_norm', 'group', "memory.query_norm = 'group' is none of ('none', 'layer', 'batch')."),
    ('heads', 0, 'memory.heads = 0 must be 1 or more.'),
    ('value_width', -1, 'memory.value_width = -1 must be 0 or more.'),
    ('value_dropout', 1.0, 'memory.value_dropout = 1.0 must be 0 or more and at most '
     '0.9999847412109375.'),
    ('query_dropout', 0.999999, 'memory.query_dropout = 0.999999 must be 0 or more and at most '
     '0.9999847412109375.'),
    ('values_dtype', 'float16', "memory.values_dtype = 'float16' is none of "
     "('float32', 'bfloat16')."),
])
def test_bad_settings_are_refused_by_name(field, value, message):
    with pytest.raises(Refusal) as refused:
        MemoryConfig(**{**CONFIG.__dict__, field: value})
    assert str(refused.value) == message


def test_every_setting_says_what_it_is():
    assert all(field.metadata['help'] for field in dataclasses.fields(MemoryConfig))


def test_temporaries_of_the_whole_layer():
    """T = 4,096, H·K = 128, V = 768: forward and backward under 1/8 of the gathered rows."""
    config = MemoryConfig(sub_keys=64, query_width=128)
    abstract = nnx.eval_shape(lambda: ProductKeyMemory(config, 768, rngs=nnx.Rngs(0)))
    graph, params, statistics = nnx.split(abstract, nnx.Param, nnx.BatchStat)
    params, statistics = nnx.to_pure_dict(params), nnx.to_pure_dict(statistics)

    def loss(params, states):
        model = nnx.merge(graph, params, statistics)
        return jnp.sum(model.read(states)[0] ** 2)

    states = jax.ShapeDtypeStruct((4096, 768), jnp.float32)
    statistics = jax.tree.map(lambda a: jnp.zeros(a.shape), statistics)
    compiled = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(params, states).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4096 * 128 * 768 * 4 / 8

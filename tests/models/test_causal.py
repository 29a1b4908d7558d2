"""The decoder against NumPy in float64, and what it must not see."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pkm_jax.memory.layer import MemoryConfig
from pkm_jax.models.causal import Causal, CausalConfig, rotated
from pkm_jax.models.interface import at, flatten, replaced
from pkm_jax.refusal import Refusal
from tests.memory.test_layer import reference as memory_reference

PLAIN = CausalConfig(vocab_size=40, layers=2, width=16, attention_heads=2, feed_forward_width=24,
                     max_length=10, dropout=0., attention_dropout=0., norm_epsilon=1e-5)
ADD = dataclasses.replace(PLAIN, memory_layers=(1,), placement='add', memory=MemoryConfig(
    sub_keys=5, heads=2, top_k=3, query_width=6, query_norm='layer'))
LENGTHS = jnp.array([10, 6])


def tokens(seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(5, 40, (2, 10)), jnp.int32)


def norm(x, p):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * p['scale'] + p['bias']


def gelu(x):
    return x * .5 * (1 + np.vectorize(math.erf)(x / np.sqrt(2)))


def linear(x, p):
    return x @ p['kernel'] + p['bias']


def turned(x, base=10_000.):
    """[B, L, H, d] as complex numbers (i, i + d / 2), turned."""
    half = x.shape[-1] // 2
    angle = np.arange(x.shape[1])[:, None] * base ** (-np.arange(half) / half)
    z = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)[None, :, None]
    return np.concatenate([z.real, z.imag], -1)


def attended(x, p, config):
    batch, length, width = x.shape
    query, key, value = (part.reshape(batch, length, config.attention_heads, -1)
                         for part in np.split(linear(x, p['qkv']), 3, -1))
    if config.positions == 'rotary':
        query, key = turned(query), turned(key)
    scores = np.einsum('bqhd,bkhd->bhqk', query, key) / np.sqrt(query.shape[-1])
    place = np.arange(length)
    seen = (place[None] <= place[:, None])[None, None] & (
        place[None] < np.asarray(LENGTHS)[:, None])[:, None, None]
    scores = np.where(seen, scores, -1e30)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return linear(np.einsum('bhqk,bkhd->bqhd', weights, value).reshape(x.shape), p['output'])


def reference(model, config):
    """States by formula, with the reference of the memory's own tests."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64),
                     nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    x = p['embeddings']['word']['embedding'][np.asarray(tokens())]
    if config.positions == 'learned':
        x = x + p['embeddings']['position']['embedding']
    for block in p['layers'].values():
        x = x + attended(norm(x, block['attention_norm']), block['attention'], config)
        h, total = norm(x, block['norm']), x
        if 'feed_forward' in block:
            total = total + linear(gelu(linear(h, block['feed_forward']['up'])),
                                   block['feed_forward']['down'])
        if 'memory' in block:
            real = np.arange(10)[None] < np.asarray(LENGTHS)[:, None]
            read, _ = memory_reference(config.memory, block['memory'], {}, h.reshape(20, -1),
                                       real.reshape(-1), training=False)
            total = total + read.reshape(h.shape)
        x = total
    return norm(x, p['norm']), p['embeddings']['word']['embedding']


@pytest.mark.parametrize('positions', ['rotary', 'learned'])
@pytest.mark.parametrize('placement', ['none', 'add', 'replace'])
def test_states_and_logits_are_those_of_the_formula(positions, placement):
    base = PLAIN if placement == 'none' else dataclasses.replace(ADD, placement=placement)
    config = dataclasses.replace(base, positions=positions)
    model = Causal(config, nnx.Rngs(0))
    states, reads = model(tokens(), LENGTHS)
    expected, words = reference(model, config)
    real = np.arange(10)[None] < np.asarray(LENGTHS)[:, None]
    np.testing.assert_allclose(np.asarray(states)[real], expected[real], atol=2e-5)
    np.testing.assert_allclose(np.asarray(model.logits(states))[real],
                               (expected @ words.T)[real], atol=2e-5)
    assert set(reads) == set(config.memories)


@pytest.mark.parametrize('config', [ADD, dataclasses.replace(ADD, positions='learned')])
def test_a_token_changes_nothing_before_it(config):
    model = Causal(config, nnx.Rngs(0))
    encode = nnx.jit(lambda model, tokens: model(tokens, LENGTHS)[0])
    ours, theirs = encode(model, tokens()), encode(model, tokens().at[:, 4].set(7))
    np.testing.assert_array_equal(ours[:, :4], theirs[:, :4])
    assert (np.abs(ours[0, 4:] - theirs[0, 4:]).max(-1) > 0).all()


def test_padding_changes_nothing():
    model = Causal(ADD, nnx.Rngs(0))
    encode = nnx.jit(lambda model, tokens: model(tokens, LENGTHS)[0])
    ours, theirs = encode(model, tokens()), encode(model, tokens().at[1, 6:].set(7))
    np.testing.assert_array_equal(ours[1, :6], theirs[1, :6])


def test_rotary_products_depend_on_the_distance():
    rng = np.random.default_rng(0)
    query, key = (jnp.asarray(np.tile(rng.normal(size=(1, 1, 1, 8)), (1, 12, 1, 1)), jnp.float32)
                  for _ in range(2))
    product = np.einsum('qd,kd->qk', *(rotated(x, jnp.arange(12)[None], 100.)[0, :, 0]
                                       for x in (query, key)))
    for distance in range(-11, 12):
        np.testing.assert_allclose(np.diagonal(product, distance), product[
            max(0, -distance), max(0, distance)], atol=1e-5)
    assert np.std(product[0]) > .1


@pytest.mark.slow
@pytest.mark.parametrize('changes', [
    {}, {'placement': 'replace'}, {'memory_layers': (0, 1), 'shared_values': True}])
def test_rematerialised_gradients_are_the_same(changes):
    """With dropout, and batch statistics that are written outside the blocks."""
    config = dataclasses.replace(ADD, dropout=.1, attention_dropout=.1, memory=dataclasses.replace(
        ADD.memory, query_norm='batch', value_dropout=.1), **changes)

    def gradients(remat):
        graph, params, stats = nnx.split(
            Causal(dataclasses.replace(config, remat=remat), nnx.Rngs(0)), nnx.Param, nnx.BatchStat)
        params, stats = nnx.to_pure_dict(params), nnx.to_pure_dict(stats)

        def loss(params):
            model = nnx.merge(graph, params, stats)
            states, _ = model(tokens(), LENGTHS, deterministic=False, rngs=jax.random.key(1))
            weighted = states ** 2 * jnp.arange(16, dtype=jnp.float32)[None, None]
            return jnp.sum(weighted), nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))

        return jax.jit(jax.grad(loss, has_aux=True))(params)

    ours, theirs = gradients(True), gradients(False)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5)


def test_dropout_needs_a_key_and_depends_on_it():
    model = Causal(dataclasses.replace(ADD, dropout=.1), nnx.Rngs(0))

    def run(key):
        return np.asarray(model(tokens(), LENGTHS, deterministic=key is None, rngs=key)[0])

    assert np.array_equal(run(jax.random.key(1)), run(jax.random.key(1)))
    assert not np.array_equal(run(jax.random.key(1)), run(jax.random.key(2)))
    assert not np.array_equal(run(jax.random.key(1)), run(None))
    with pytest.raises(Refusal, match='needs a key'):
        model(tokens(), LENGTHS, deterministic=False)


@pytest.mark.parametrize('changes', [
    {'dropout': .1}, {'attention_dropout': .1},
    {'memory': dataclasses.replace(ADD.memory, value_dropout=.1)}])
def test_any_dropout_needs_a_key(changes):
    assert not ADD.has_dropout and dataclasses.replace(ADD, **changes).has_dropout


@pytest.mark.parametrize('place', [
    ('embeddings', 'word', 'embedding'), ('layers', 0, 'attention', 'output', 'bias'),
    ('layers', 0, 'feed_forward', 'down', 'bias')])
def test_embeddings_and_both_branches_are_dropped_from(place):
    """A model of zeros but for one array of ones: its states are constant unless some are dropped,
    and a norm makes 0 of what is constant."""
    config = dataclasses.replace(PLAIN, layers=1, dropout=.5)
    graph, params = nnx.split(Causal(config, nnx.Rngs(0)), nnx.Param)
    params = jax.tree.map(jnp.zeros_like, nnx.to_pure_dict(params))
    params['norm']['scale'] = jnp.ones(16)
    params = replaced(params, place, jnp.ones_like(at(params, place)))
    model = nnx.merge(graph, params)
    assert not np.asarray(model(tokens(), LENGTHS)[0]).any()
    states, _ = model(tokens(), LENGTHS, deterministic=False, rngs=jax.random.key(0))
    assert .4 < np.mean(np.asarray(states) > 0) < .6


@pytest.mark.parametrize('remat', [False, pytest.param(True, marks=pytest.mark.slow)])
def test_training_updates_batch_statistics_by_real_tokens(remat):
    config = dataclasses.replace(ADD, remat=remat, memory=dataclasses.replace(
        ADD.memory, query_norm='batch'))

    def statistics(given, deterministic):
        model = Causal(config, nnx.Rngs(0))
        model(given, LENGTHS, deterministic=deterministic)
        return jax.tree.leaves(nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)))

    fresh, ours, padded, other = (statistics(*call) for call in (
        (tokens(), True), (tokens(), False), (tokens().at[1, 6:].set(7), False),
        (tokens().at[1, 5].set(7), False)))
    assert len(ours) == 2
    for before, a, b, c in zip(fresh, ours, padded, other, strict=True):
        assert not np.array_equal(before, a) and not np.array_equal(a, c)
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize('shared', [False, True])
def test_memories_tables_and_words_are_where_the_configuration_says(shared):
    config = dataclasses.replace(ADD, memory_layers=(0, 1), shared_values=shared)
    params = nnx.to_pure_dict(nnx.state(Causal(config, nnx.Rngs(0)), nnx.Param))
    tables = {path for path in flatten(params) if path.endswith('/values')}
    assert tables == {'/'.join(map(str, site.table)) for site in config.memories.values()}
    assert len(tables) == 2 - shared
    assert all('codebooks' in at(params, site.path) for site in config.memories.values())
    assert at(params, config.word_embedding).shape == (40, 16)


def test_zero_scaled_memory_changes_no_bit_in_evaluation():
    plain, added = (Causal(config, nnx.Rngs(0)) for config in (
        PLAIN, dataclasses.replace(ADD, zero_start=True)))
    own = nnx.to_pure_dict(nnx.state(added, nnx.Param))
    given = nnx.to_pure_dict(nnx.state(plain, nnx.Param))

    def merged(new, old):
        return {k: merged(v, old[k]) if isinstance(v, dict) and k in old else old.get(k, v)
                for k, v in new.items()}

    nnx.update(added, merged(own, given))
    encode = nnx.jit(lambda model: model(tokens(), LENGTHS)[0])
    np.testing.assert_array_equal(encode(added), encode(plain))


def test_what_cannot_be_is_refused():
    with pytest.raises(Refusal, match="model.positions = 'rotary'.* model.width = 6"):
        CausalConfig(width=6, attention_heads=2)
    with pytest.raises(Refusal, match="model.positions = 'sine' is none of"):
        CausalConfig(positions='sine')
    with pytest.raises(Refusal, match='Sequences of 11 tokens, but model.max_length = 10'):
        Causal(PLAIN, nnx.Rngs(0))(jnp.zeros((1, 11), jnp.int32), jnp.array([11]))

"""Placement, padding, rematerialisation and refusals. Numbers are compared with the published
implementation in tests/convert."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pkm_jax.memory.layer import MemoryConfig
from pkm_jax.models.bert import Bert, BertConfig
from pkm_jax.refusal import Refusal

PLAIN = BertConfig(vocab_size=50, layers=3, width=16, attention_heads=4, feed_forward_width=32,
                   max_length=12, output_heads=('mlm', 'pooler', 'nsp', 'classifier', 'span'), classes=3)
ADD = dataclasses.replace(PLAIN, memory=MemoryConfig(sub_keys=6, heads=2, top_k=3, query_width=8),
                          memory_layers=(0, 2), placement='add')


def build(config, seed=0):
    return Bert(config, nnx.Rngs(seed))


def params_of(model):
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def batch(lengths=(12, 7), seed=0):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(5, 50, (len(lengths), 12))
    segments = (np.arange(12) >= 6) * np.ones_like(tokens)
    return jnp.asarray(tokens, jnp.int32), jnp.asarray(segments, jnp.int32), jnp.asarray(lengths)


def with_backbone_of(plain, config):
    """A model of `config` whose parameters are those of `plain` wherever it has them."""
    model = build(config, seed=1)
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    own, given = nnx.to_pure_dict(params), params_of(plain)

    def merged(new, old):
        return {k: merged(v, old[k]) if isinstance(v, dict) else old[k]
                for k, v in new.items() if k in old} | {k: new[k] for k in new.keys() - old.keys()}

    return nnx.merge(graph, merged(own, given), nnx.to_pure_dict(rest))


@pytest.mark.parametrize('dtype', [pytest.param('float32', marks=pytest.mark.slow), 'bfloat16'])
@pytest.mark.parametrize('deterministic', [
    pytest.param(True, marks=pytest.mark.slow), False])
def test_added_memory_with_zero_scale_changes_no_bit(dtype, deterministic):
    no_dropout = dict(dtype=dtype, dropout=0., attention_dropout=0.)
    plain = build(dataclasses.replace(PLAIN, **no_dropout))
    added = with_backbone_of(plain, dataclasses.replace(ADD, zero_start=True, **no_dropout))
    @nnx.jit
    def outputs(model):
        states, _ = model(*batch(), deterministic=deterministic)
        return (states, model.mlm_logits(states, jnp.asarray([[1, 2], [0, 3]])),
                model.nsp_logits(states), model.class_logits(states), model.span_logits(states))

    for ours, theirs in zip(outputs(added), outputs(plain)):
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))
    assert not np.array_equal(with_backbone_of(plain, ADD)(*batch())[0], plain(*batch())[0])


def test_replace_has_no_feed_forward_and_add_keeps_it():
    replaced = params_of(build(dataclasses.replace(ADD, placement='replace')))['layers']
    assert ['feed_forward' in replaced[i] for i in range(3)] == [False, True, False]
    added = params_of(build(ADD))['layers']
    assert all('feed_forward' in added[i] for i in range(3))
    assert ['memory' in added[i] for i in range(3)] == [True, False, True]


@pytest.mark.parametrize('placement', ['add', 'replace'])
def test_block_is_the_sum_it_claims(placement):
    """Output norm over attention-normed states, feed-forward and memory, put together by hand."""
    model = build(dataclasses.replace(ADD, placement=placement))
    block = model.layers[0]
    states = jnp.asarray(np.random.default_rng(0).normal(size=(2, 12, 16)), jnp.float32)
    lengths = jnp.asarray([12, 7])
    h = block.attention_norm(states + block.attention.output(
        block.attention(states, lengths, None)))
    real = jnp.arange(12)[None] < lengths[:, None]
    total = h + block.memory(h, real, deterministic=True)
    if placement == 'add':
        total += block.feed_forward.down(block.feed_forward(h))
    np.testing.assert_allclose(block(states, lengths, None, None)[0], block.output_norm(total),
                               atol=1e-6)


@pytest.mark.parametrize('training', [False, True])
def test_padding_is_invisible(training):
    """What fills the padding changes neither the states of real tokens nor any statistic."""
    def model(*arguments):
        model = build(dataclasses.replace(ADD, dropout=0., attention_dropout=0.))
        return model(*arguments, deterministic=not training)

    tokens, segments, lengths = batch(lengths=(9, 4))
    real = np.arange(12)[None] < np.asarray(lengths)[:, None]
    other = jnp.where(real, tokens, 49 - tokens)
    (states, reads), (others, other_reads) = (model(t, segments, lengths)
                                              for t in (tokens, other))
    np.testing.assert_array_equal(np.asarray(states)[real], np.asarray(others)[real])
    for layer in (0, 2):
        np.testing.assert_array_equal(reads[layer].slots[real.reshape(-1)],
                                      other_reads[layer].slots[real.reshape(-1)])
        assert not np.asarray(reads[layer].weights)[~real.reshape(-1)].any()
        for ours, theirs in zip(jax.tree.leaves(reads[layer].batch_stats),
                                jax.tree.leaves(other_reads[layer].batch_stats)):
            np.testing.assert_array_equal(ours, theirs)
    assert bool(jax.tree.leaves(reads[0].batch_stats)) == training


@pytest.mark.parametrize('training', [False, True])
def test_attention_dropout_path_equals_the_fused_one_without_dropout(training):
    """A rate of 1e-7 takes the materialised path and drops nothing here."""
    model = build(dataclasses.replace(PLAIN, dropout=0., attention_dropout=1e-7))
    mode = dict(deterministic=not training, rngs=jax.random.key(0))
    same = build(dataclasses.replace(PLAIN, dropout=0., attention_dropout=0.))
    np.testing.assert_allclose(model(*batch(), **mode)[0], same(*batch(), **mode)[0], atol=1e-5)


@pytest.mark.slow
def test_rematerialised_gradients_are_the_same():
    def gradients(remat):
        model = build(dataclasses.replace(ADD, remat=remat))
        graph, params, rest = nnx.split(model, nnx.Param, ...)

        def loss(params):
            states, reads = nnx.merge(graph, params, nnx.to_pure_dict(rest))(
                *batch(), deterministic=False, rngs=jax.random.key(3))
            return jnp.sum(states ** 3), reads

        return jax.jit(jax.grad(loss, has_aux=True))(nnx.to_pure_dict(params))

    for ours, theirs in zip(jax.tree.leaves(gradients(True)), jax.tree.leaves(gradients(False))):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_dropout_needs_a_key_and_depends_on_it():
    model = build(ADD)

    def run(key):
        return np.asarray(model(*batch(), deterministic=key is None, rngs=key)[0])

    assert np.array_equal(run(None), run(None))
    assert np.array_equal(run(jax.random.key(1)), run(jax.random.key(1)))
    assert not np.array_equal(run(jax.random.key(1)), run(jax.random.key(2)))
    assert not np.array_equal(run(jax.random.key(1)), run(None))
    with pytest.raises(Refusal, match='needs a key'):
        model(*batch(), deterministic=False)


@pytest.mark.parametrize('remat', [False, True])
def test_a_call_in_training_updates_the_memories_statistics(remat):
    def statistics(model):
        return jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)))

    model = build(dataclasses.replace(ADD, remat=remat))
    before = statistics(model)
    model(*batch())
    jax.tree.map(np.testing.assert_array_equal, statistics(model), before)
    _, reads = nnx.jit(lambda model: model(*batch(), deterministic=False,
                                           rngs=jax.random.key(0)))(model)
    after = statistics(model)['layers']
    for layer in (0, 2):
        jax.tree.map(np.testing.assert_array_equal, after[layer]['memory']['query_norm'],
                     reads[layer].batch_stats)
    assert after[2]['memory']['query_norm']['mean'].any()


def test_shared_values_are_one_table():
    layers = params_of(build(dataclasses.replace(ADD, shared_values=True)))['layers']
    assert 'values' in layers[0]['memory'] and 'values' not in layers[2]['memory']
    assert 'codebooks' in layers[2]['memory']


def test_untied_decoder():
    model = build(dataclasses.replace(PLAIN, tied=False))
    states = jnp.ones((1, 12, 16))
    before = model.mlm_logits(states, jnp.zeros((1, 1), jnp.int32))
    model.embeddings.word.embedding[...] *= 2
    np.testing.assert_array_equal(model.mlm_logits(states, jnp.zeros((1, 1), jnp.int32)), before)


def test_shapes_of_the_heads():
    model = build(PLAIN)
    states, reads = model(*batch())
    assert reads == {}
    assert model.mlm_logits(states, jnp.zeros((2, 4), jnp.int32)).shape == (2, 4, 50)
    assert model.nsp_logits(states).shape == (2, 2)
    assert model.class_logits(states).shape == (2, 3)
    assert model.span_logits(states).shape == (2, 12, 2)


def test_bfloat16_computes_over_float32_parameters():
    model = build(dataclasses.replace(ADD, dtype='bfloat16'))
    assert {a.dtype for a in jax.tree.leaves(params_of(model))} == {jnp.dtype('float32')}
    states, _ = model(*batch())
    assert states.dtype == jnp.bfloat16
    assert model.mlm_logits(states, jnp.zeros((2, 4), jnp.int32)).dtype == jnp.float32
    half, full = build(dataclasses.replace(PLAIN, dtype='bfloat16')), build(PLAIN)
    np.testing.assert_allclose(half(*batch())[0].astype(jnp.float32), full(*batch())[0], atol=0.1)


@pytest.mark.parametrize('changes, message', [
    (dict(width=18), r'width = 18 does not divide into model.attention_heads = 4'),
    (dict(memory_layers=(0, 3)), r'memory.layers = \(0, 3\).* 0\.\.2'),
    (dict(memory_layers=(1, 1)), r'\(1, 1\)'),
    (dict(memory_layers=()), r"placement = 'add' with memory.layers = \(\)"),
    (dict(placement='beside'), r"'beside' is none of"),
    (dict(output_heads=('mlm', 'lm')), r"'lm'"),
    (dict(output_heads=('nsp',)), r"read the 'pooler'"),
    (dict(dropout=1.), r'model.dropout = 1.0'),
    (dict(attention_dropout=.999999), r'model.attention_dropout = 0.999999'),
])
def test_impossible_configurations_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(ADD, **changes)


def test_too_long_a_sequence_is_refused():
    model = build(PLAIN)
    tokens = jnp.zeros((1, 13), jnp.int32)
    with pytest.raises(ValueError, match='13 tokens, but model.max_length = 12'):
        model(tokens, tokens, jnp.asarray([13]))

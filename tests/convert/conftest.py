"""Small random models of every kind, and their comparison with what PyTorch computed."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pkm_jax.convert.tensors import ConversionLog, ForeignModel, expected, unflatten
from pkm_jax.memory.layer import MemoryConfig
from pkm_jax.models.bert import BertConfig
from pkm_jax.models.interface import abstract_model

SMALL = BertConfig(
    vocab_size=30, layers=3, width=8, attention_heads=2, feed_forward_width=12, max_length=9,
    memory=MemoryConfig(sub_keys=4, heads=2, top_k=3, query_width=4))
VARIANTS = {
    'encoder': dict(output_heads=('pooler',)),
    'masked_lm': dict(output_heads=('mlm',), norm_epsilon=1e-5),
    'pretraining_untied': dict(output_heads=('mlm', 'pooler', 'nsp'), tied=False),
    'classifier': dict(output_heads=('pooler', 'classifier'), classes=3),
    'span': dict(output_heads=('span',)),
    'tokens': dict(output_heads=('token_classifier',), classes=4),
    'added': dict(memory_layers=(0, 2), placement='add', zero_start=True),
    'replacing': dict(memory_layers=(1,), placement='replace', output_heads=('pooler',)),
    'shared': dict(memory_layers=(2, 1), placement='add', shared_values=True),
    'projected': dict(memory_layers=(1, 2), placement='add', memory=MemoryConfig(
        sub_keys=4, heads=2, top_k=3, query_width=4, value_width=6, query_norm='layer')),
}


def make(**changes) -> ForeignModel:
    config = dataclasses.replace(SMALL, **changes)
    rng = np.random.default_rng(0)

    def draw(path, shape):
        noise = 0.2 * rng.normal(size=shape)
        near_one = path.endswith(('/scale', '/var'))
        return np.asarray(np.abs(1 + noise) if near_one else noise, np.float32)

    params, statistics = (unflatten({path: draw(path, leaf.shape) for path, leaf in tree.items()})
                          for tree in expected(config))
    return ForeignModel(config, params, statistics, ConversionLog())


@pytest.fixture
def random_model():
    """A small random model; arguments change its configuration."""
    return make


@pytest.fixture(params=VARIANTS)
def each_model(request):
    """A small random model of each kind in turn."""
    return make(**VARIANTS[request.param])


@pytest.fixture
def assert_equal_to_golden():
    return check


def outputs(pretrained, tokens, segments, lengths) -> dict[str, np.ndarray]:
    """Everything that make_goldens.py records, computed by our model."""
    config = pretrained.config
    graph = nnx.split(abstract_model(config), ...)[0]
    model = nnx.merge(graph, *jax.tree.map(jnp.asarray, (pretrained.params, pretrained.statistics)))
    states = [model.embeddings(tokens, segments, None)]
    for block in model.layers:
        states.append(block(states[-1], lengths, None, None)[0])
    final, _ = model(tokens, segments, lengths)
    np.testing.assert_array_equal(final, states[-1])
    found = {'states': np.stack(states)}
    everywhere = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    heads = config.output_heads
    if 'pooler' in heads:
        found['pooled'] = model.pooled(final)
    if 'mlm' in heads:
        found['mlm'] = model.mlm_logits(final, everywhere)
    if 'nsp' in heads:
        found['seq_relationship_logits'] = model.nsp_logits(final)
    if 'classifier' in heads:
        found['logits'] = model.class_logits(final)
    if 'token_classifier' in heads:
        found['logits'] = model.token_logits(final)
    if 'span' in heads:
        found['start_logits'], found['end_logits'] = np.moveaxis(model.span_logits(final), 2, 0)
    return found


def check(pretrained, golden: dict) -> None:
    batch = [jnp.asarray(golden[name], jnp.int32) for name in ('tokens', 'segments', 'lengths')]
    found = outputs(pretrained, *batch)
    if 'mlm' in found:
        name = 'prediction_logits' if 'prediction_logits' in golden else 'logits'
        stride = -(-found['mlm'].shape[-1] // golden[name].shape[-1])
        found[name] = found.pop('mlm')[..., ::stride]
    real = np.arange(golden['tokens'].shape[1]) < golden['lengths'][:, None]
    compared = set(golden) - {'tokens', 'segments', 'lengths'}
    assert compared <= set(found), 'the model lacks a head that the golden file has'
    for name in compared:
        ours, theirs = np.asarray(found[name]), golden[name]
        if name == 'states':
            ours, theirs = ours[:, real], theirs[:, real]
        elif ours.shape[:2] == real.shape:
            ours, theirs = ours[real], theirs[real]
        np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=1e-6, err_msg=name)

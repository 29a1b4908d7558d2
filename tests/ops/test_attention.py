"""Attention, with and without dropout of its weights, against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pkm_jax.models.bert import BertConfig
from pkm_jax.ops import attention
from pkm_jax.ops.attention import attend

LENGTHS = jnp.asarray([7, 3, 0])


def draw():
    rng = np.random.default_rng(0)
    return (jnp.asarray(rng.normal(size=(3, 7, 2, 4)), jnp.float32) for _ in range(3))


def expected(query, key, value, causal):
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    scores = np.einsum('bqhd,bkhd->bhqk', query, key) / 2
    seen = np.arange(7)[None] < np.maximum(LENGTHS, 1)[:, None]
    seen = np.broadcast_to(seen[:, None, None], scores.shape)
    seen = seen & (np.tri(7, dtype=bool) if causal else True)
    weights = np.where(seen, np.exp(scores), 0)
    return np.einsum('bhqk,bkhd->bqhd', weights / weights.sum(-1, keepdims=True), value)


@pytest.mark.parametrize('causal', [False, True])
@pytest.mark.parametrize('rate', [0., 1e-7])
def test_equals_numpy(causal, rate):
    """A rate of 1e-7 takes the path that materialises the weights, and drops nothing here."""
    query, key, value = draw()
    got = attend(query, key, value, LENGTHS, rate, jax.random.key(0), causal=causal)
    np.testing.assert_allclose(got, expected(query, key, value, causal), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('rate', [0., 1e-7])
def test_causal_attention_does_not_look_ahead(rate):
    query, key, value = draw()
    ahead = jax.grad(lambda value: jnp.sum(attend(
        query, key, value, LENGTHS, rate, jax.random.key(0), causal=True)[:, :4]))(value)
    assert not np.asarray(ahead[:, 4:]).any() and np.asarray(ahead[:, :4]).any()


@pytest.mark.parametrize('flags, found', [
    ('--xla_gpu_deterministic_ops=true', '--xla_gpu_deterministic_ops'),
    ('--xla_dump_to=a --xla_gpu_exclude_nondeterministic_ops --xla_b=1',
     '--xla_gpu_exclude_nondeterministic_ops'),
    ('--xla_gpu_deterministic_ops=true --xla_gpu_deterministic_ops=false', ''), ('', '')])
def test_cudnn_is_not_used_where_every_run_shall_be_the_same(flags, found, monkeypatch):
    """XLA cannot run it there."""
    monkeypatch.setenv('XLA_FLAGS', flags)
    monkeypatch.setattr(attention.jax, 'default_backend', lambda: 'gpu')
    used = []
    monkeypatch.setattr(attention, '_attend', lambda query, *_, causal, implementation: (
        used.append(implementation) or query))
    jax.eval_shape(lambda *arrays: attend(*arrays, LENGTHS, 0., None),
                   *(x.astype(jnp.bfloat16) for x in draw()))
    assert attention.deterministic_flag() == found and ('cudnn' in used) == (not found)
    config = BertConfig(attention_dropout=0., dtype='bfloat16')
    said, = config.fast_paths('gpu')
    assert said.endswith(f'under {found}') if found else said == 'attention: fused (cuDNN)'


def test_cudnn_is_chosen_by_the_platform_of_the_lowering(monkeypatch):
    """On a machine with a GPU, of whose two implementations here each has a mark of its own."""
    monkeypatch.setattr(attention.jax, 'default_backend', lambda: 'gpu')
    monkeypatch.setattr(attention, '_attend', lambda query, *_, causal, implementation: query * (
        {'cudnn': 123, 'xla': 321}[implementation]))

    def lowered(platform, dtype):
        query, key, value = (x.astype(dtype) for x in draw())
        return jax.jit(attend, static_argnums=(4, 5)).trace(
            query, key, value, LENGTHS, 0., None).lower(lowering_platforms=(platform,)).as_text()

    for platform, dtype, mark in [('cuda', jnp.bfloat16, '1.23'), ('tpu', jnp.bfloat16, '3.2'),
                                  ('cuda', jnp.float32, '3.21')]:
        text = lowered(platform, dtype)
        assert mark in text and ('1.23' in text) == (mark == '1.23'), (platform, dtype)

"""The read's kernels for Mosaic GPU, interpreted, against float64; which programs have them."""
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from pkm_jax.memory.embedding_bag import compact_gradients, embedding_bag
from pkm_jax.memory.kernels.gpu import backend, embedding_bag_backward
from pkm_jax.memory.kernels.gpu import embedding_bag as kernel
from pkm_jax.refusal import Refusal
from tests.memory.kernels.test_embedding_bag import LIMIT, error, expected, make, random_slots

pytestmark = pytest.mark.filterwarnings('ignore:The Pallas Triton backend:DeprecationWarning')
needs_mosaic = pytest.mark.skipif(not hasattr(plgpu, 'InterpretGPUParams'),
                                  reason='needs Mosaic GPU of jax 0.11 or later')
H100 = AbstractMesh((), (), abstract_device=AbstractDevice('NVIDIA H100 80GB HBM3', 132, 'gpu'))
HOT = np.where(np.random.default_rng(3).random((5, 5)) < 0.6, 5, random_slots(5, 5, 9))


@needs_mosaic
@pytest.mark.parametrize('dtype', ['bfloat16', pytest.param('float32', marks=pytest.mark.slow)])
def test_sums_agree_with_float64(dtype):
    from pkm_jax.memory.kernels.gpu import mosaic_forward
    values, slots, weights, gradient = make(random_slots(5, 4, 9), 9, 256, dtype)
    got = mosaic_forward.sum_rows(values, slots, weights, stripe_bytes=512, stages=2, rows=2,
                                  interpret=True)
    assert got.dtype == values.dtype
    assert error(got, expected(values, slots, weights, gradient)[0]) < LIMIT[dtype]


@needs_mosaic
@pytest.mark.parametrize('dtype, compact', [
    ('bfloat16', False), *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        ('float32', False), ('bfloat16', True), ('float32', True)))])
def test_gradients_agree_with_float64(dtype, compact, monkeypatch):
    """With segments that are cut, chunks without a segment's start, and an empty one."""
    from pkm_jax.memory.kernels.gpu import mosaic_backward
    monkeypatch.setattr(mosaic_backward, 'CHUNK', 4)
    for sizes in 'TILE', 'PIECES':
        monkeypatch.setattr(embedding_bag_backward, sizes, 4)
    values, slots, weights, gradient = make(HOT, 30, 128, dtype)
    _, table, by_weight = expected(values, slots, weights, gradient)
    if compact:
        ids, found, count, by_read = embedding_bag_backward.rows_that_were_read(
            values, slots, weights, gradient, mosaic=True, interpret=True)
        np.testing.assert_array_equal(ids[:count], np.unique(slots))
        assert np.all(np.asarray(ids[count:]) == len(values))
        rows = np.zeros_like(table)
        rows[ids[:count]] = np.asarray(found[:count], np.float64)
    else:
        rows, by_read = embedding_bag_backward.dense_gradients(
            values, slots, weights, gradient, mosaic=True, interpret=True)
        assert np.all(np.asarray(rows)[np.setdiff1d(np.arange(30), slots)] == 0)
    assert error(by_read, by_weight) < LIMIT['float32']
    assert error(rows, table) < LIMIT[dtype]


def lowered(function):
    """How often which backend is called in a program for an H100."""
    like = jax.ShapeDtypeStruct
    arrays = (like((64, 256), jnp.bfloat16), like((8, 4), jnp.int32), like((8, 4), jnp.float32),
              like((8, 256), jnp.bfloat16))
    jax.clear_caches()      # which know no settings
    with use_abstract_mesh(H100):
        text = jax.jit(function).trace(*arrays).lower(lowering_platforms=('cuda',)).as_text()
    return len(re.findall('@mosaic_gpu', text)), len(re.findall('custom_call @.*triton', text))


def read_and_gradients(values, slots, weights, gradient):
    out, pull = jax.vjp(lambda values, weights: embedding_bag(values, slots, weights),
                        values, weights)
    return out, pull(gradient)


@needs_mosaic
def test_programs_have_the_backend_that_is_asked_for(monkeypatch):
    monkeypatch.delenv(backend.SETTING, raising=False)
    assert lowered(read_and_gradients) == (0, 5)
    monkeypatch.setenv(backend.SETTING, '1')
    assert lowered(read_and_gradients) == (2, 3)    # those of chunks' bounds and hot sums stay
    assert lowered(compact_gradients)[0] == 1


def test_a_setting_that_is_neither(monkeypatch):
    monkeypatch.setenv(backend.SETTING, 'yes')
    with pytest.raises(Refusal, match='PKM_JAX_MOSAIC_GPU=yes: 1 has Mosaic GPU make the reads, 0 '):
        backend.uses_mosaic(*shapes(64, 128))


def shapes(tokens, reads, width=256, dtype=jnp.bfloat16):
    like = jax.ShapeDtypeStruct
    return like((64, width), dtype), like((tokens, reads), jnp.int32)


@pytest.mark.parametrize('arguments, version, reason', [
    ((64, 3), (0, 11, 2), None), ((67, 128), (0, 12, 0), None), ((3, 4), (0, 11, 2), '3 tokens'),
    ((67, 3), (0, 11, 2), '67 tokens of 3 reads'), ((64, 128), (0, 10, 2), 'Mosaic GPU by jax 0.'),
    ((64, 128, 1024, jnp.float32), (0, 11, 2), None),
    ((64, 128, 2048, jnp.float32), (0, 11, 2), 'rows of 8192 bytes (at most 6656)')])
def test_what_mosaic_cannot_do_is_said_and_stays_with_triton(arguments, version, reason, monkeypatch,
                                                             caplog):
    assert not backend.uses_mosaic(*shapes(*arguments))     # is not asked
    monkeypatch.setenv(backend.SETTING, '1')
    monkeypatch.setattr(jax, '__version_info__', version)
    backend._say_once.cache_clear()
    assert backend.uses_mosaic(*shapes(*arguments)) == (reason is None)
    assert reason is None and not caplog.text or f'is not for {reason}' in caplog.text
    assert kernel.unsupported(*shapes(*arguments)) is None

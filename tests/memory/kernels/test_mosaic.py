"""The read's kernels for Mosaic GPU, interpreted, against float64; which programs have any."""
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from pkm_jax.memory.embedding_bag import compact_gradients, embedding_bag
from pkm_jax.memory.kernels.gpu import backend, embedding_bag_backward, retrieval
from pkm_jax.memory.kernels.gpu import embedding_bag as kernel
from pkm_jax.memory.product_keys import top_k_product_keys
from pkm_jax.ops import gpu
from pkm_jax.ops.gpu import add_norm
from pkm_jax.refusal import Refusal
from tests.memory.kernels.searches import make as make_search
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
@pytest.mark.parametrize('reads, slots, chunk', [
    (100, 9, 8), (97, 200, 8), (40, 1, 4), (5, 3, 8), (9, 0, 4)])
def test_chunks_begin_where_the_other_backend_has_them(reads, slots, chunk):
    """And where the reads of `slots`, which is none, begin, they end."""
    from pkm_jax.memory.kernels.gpu import mosaic_rows
    slot = jax.random.randint(jax.random.key(reads), (reads,), 0, slots + 1)
    slot = jnp.sort(slot).at[-3:].set(slots)
    cut, end = mosaic_rows.cuts(slot, slots, chunk)
    want_cut, want_end = embedding_bag_backward._cuts(slot, slots, chunk, interpret=True)
    np.testing.assert_array_equal(cut, want_cut)
    np.testing.assert_array_equal(end, want_end[:len(cut)])
    assert np.all(np.diff(cut) >= 0) and cut[-1] == np.sum(slot < slots)


@needs_mosaic
def test_segments_that_are_cut_are_added_up_and_rows_without_a_read_cleared():
    """One segment over 40 chunks, one over 2; the row of a third is left as it is."""
    from pkm_jax.memory.kernels.gpu import mosaic_rows
    slot = jnp.repeat(jnp.array([2, 5, 6]), jnp.array([160, 8, 4]), total_repeat_length=172)
    cut, end = mosaic_rows.cuts(slot, 130, 4)
    pieces = np.random.default_rng(0).normal(size=(len(cut) - 1, 2, 128)).astype(np.float32)
    rows = jnp.full((130, 128), 7., 'bfloat16')
    got = mosaic_rows.add_pieces(rows, jnp.asarray(pieces), slot, cut, end, None, chunk_size=4,
                                 interpret=True)
    want = np.full((130, 128), 7.)
    want[2] = pieces[0, 1] + pieces[1:40, 0].sum(0)
    want[5] = pieces[40, 1] + pieces[41, 0]
    np.testing.assert_allclose(np.asarray(got, np.float32), want, rtol=1e-2, atol=1e-2)
    row_slots = jnp.full(130, 130).at[jnp.array([2, 5])].set(jnp.array([2, 5]))
    cleared = np.asarray(mosaic_rows.clear(got, row_slots, 130, interpret=True))
    np.testing.assert_array_equal(cleared[[2, 5]], np.asarray(got)[[2, 5]])
    assert not np.delete(cleared, [2, 5], 0).any()


@needs_mosaic
@pytest.mark.parametrize('dtype, compact', [
    ('bfloat16', False), ('bfloat16', True), *(pytest.param(*case, marks=pytest.mark.slow)
                                               for case in (('float32', False), ('float32', True)))])
def test_gradients_agree_with_float64(dtype, compact, monkeypatch):
    """With segments that are cut, chunks without a segment's start, an empty one, and slots of
    S, which are no reads, whatever their weight."""
    from pkm_jax.memory.kernels.gpu import mosaic_backward
    monkeypatch.setattr(mosaic_backward, 'CHUNK', 4)
    for sizes in 'TILE', 'PIECES':
        monkeypatch.setattr(embedding_bag_backward, sizes, 4)
    values, slots, weights, gradient = make(HOT, 30, 128, dtype)
    no_reads = jnp.zeros(slots.shape, bool).at[3:, :4].set(True)
    _, table, by_weight = expected(values, slots, jnp.where(no_reads, 0, weights), gradient)
    read, slots = np.unique(slots[~no_reads]), jnp.where(no_reads, 30, slots)
    if compact:
        ids, found, by_read = embedding_bag_backward.rows_that_were_read(
            values, slots, weights, gradient, mosaic=True, interpret=True)
        count = len(read)
        np.testing.assert_array_equal(ids[:count], read)
        assert np.all(np.asarray(ids[count:]) == len(values))
        rows = np.zeros_like(table)
        rows[ids[:count]] = np.asarray(found[:count], np.float64)
        whole = np.asarray(embedding_bag_backward.cleared(
            found, ids, len(values), mosaic=True, interpret=True))
        np.testing.assert_array_equal(whole[:count], found[:count])
        assert len(whole) > count and not whole[count:].any()
    else:
        rows, by_read = embedding_bag_backward.dense_gradients(
            values, slots, weights, gradient, mosaic=True, interpret=True)
        assert np.all(np.asarray(rows)[np.setdiff1d(np.arange(30), read)] == 0)
    assert error(by_read[~no_reads], by_weight[~no_reads]) < LIMIT['float32']
    assert error(rows, table) < LIMIT[dtype]


READ = tuple(jax.ShapeDtypeStruct(shape, kind) for shape, kind in (
    ((64, 256), jnp.bfloat16), ((8, 4), jnp.int32), ((8, 4), jnp.float32), ((8, 256), jnp.bfloat16)))
QUERIES = tuple(jax.ShapeDtypeStruct(shape, jnp.bfloat16)
                for shape in ((130, 2, 2, 32), (2, 2, 64, 32)))


def lowered(function, *arrays):
    """How often which backend is called in a program for an H100."""
    jax.clear_caches()      # which know no settings
    with use_abstract_mesh(H100):
        text = jax.jit(function).trace(*arrays).lower(lowering_platforms=('cuda',)).as_text()
    return len(re.findall('@mosaic_gpu', text)), len(re.findall('custom_call @.*triton', text))


def read_and_gradients(values, slots, weights, gradient):
    out, pull = jax.vjp(lambda values, weights: embedding_bag(values, slots, weights),
                        values, weights)
    return out, pull(gradient)


def search_and_gradients(query, codebooks):
    scores, pull, slots = jax.vjp(lambda *a: top_k_product_keys(*a, 4), query, codebooks,
                                  has_aux=True)
    return slots, pull(scores)


@needs_mosaic
def test_programs_have_the_backend_that_is_asked_for(monkeypatch):
    monkeypatch.delenv(backend.SETTING, raising=False)
    assert lowered(read_and_gradients, *READ) == (0, 5)
    assert lowered(search_and_gradients, *QUERIES) == (0, 3)
    monkeypatch.setenv(backend.SETTING, '1')
    assert lowered(read_and_gradients, *READ) == (4, 0)
    assert lowered(compact_gradients, *READ) == (3, 0)
    assert lowered(search_and_gradients, *QUERIES) == (3, 0)


@needs_mosaic
def test_without_triton_mosaic_has_what_it_can_and_the_rest_is_said(monkeypatch, caplog):
    monkeypatch.delenv(backend.SETTING, raising=False)
    monkeypatch.setattr(gpu, 'triton', None)
    assert lowered(read_and_gradients, *READ) == (4, 0)
    assert lowered(search_and_gradients, *QUERIES) == (3, 0)
    assert 'has no Triton backend: kernels are by Mosaic GPU' in caplog.text
    assert kernel.unsupported(*shapes(3, 4)).startswith('3 tokens (at least 4, one a warp) by jax ')
    searched = jax.eval_shape(lambda: make_search(16, 1, 64, 'float32'))
    assert retrieval.unsupported(*searched, k=4).startswith('searches in float32 (bfloat16) by jax')
    block = jax.ShapeDtypeStruct((64, 256), jnp.bfloat16)
    assert 'no Triton' in add_norm.unsupported(block, block, rate=0., epsilon=1e-5)
    with pytest.raises(Refusal, match='no Triton backend to interpret'):
        embedding_bag(*make(random_slots(5, 4, 9), 9, 128, 'bfloat16')[:3], implementation='gpu')


def test_a_setting_that_is_neither(monkeypatch):
    monkeypatch.setenv(backend.SETTING, 'yes')
    with pytest.raises(Refusal, match='PKM_JAX_MOSAIC_GPU=yes: 1 has Mosaic GPU search and read, 0 '):
        backend.uses_mosaic(*shapes(64, 128), interpret=False)


def shapes(tokens, reads, width=256, dtype=jnp.bfloat16):
    like = jax.ShapeDtypeStruct
    return like((64, width), dtype), like((tokens, reads), jnp.int32)


@pytest.mark.parametrize('arguments, version, reason', [
    ((64, 3), (0, 11, 2), None), ((67, 128), (0, 12, 0), None), ((3, 4), (0, 11, 2), '3 tokens'),
    ((67, 3), (0, 11, 2), '67 tokens of 3 reads'), ((64, 128), (0, 10, 2), 'Mosaic GPU by jax 0.'),
    ((64, 128, 1024, jnp.float32), (0, 11, 2), None),
    ((64, 128, 2048, jnp.float32), (0, 11, 2), 'rows of 8192 bytes (at most 6656)'),
    ((64, 128), (0, 11, 2), 'GPUs of compute capability 8 (9, Hopper, or later)')])
def test_what_mosaic_cannot_do_is_said_and_stays_with_triton(arguments, version, reason, monkeypatch,
                                                             caplog):
    assert not backend.uses_mosaic(*shapes(*arguments), interpret=False)     # is not asked
    if reason and 'capability' in reason:
        monkeypatch.setattr(backend, '_capability', lambda: 8)
    monkeypatch.setenv(backend.SETTING, '1')
    monkeypatch.setattr(jax, '__version_info__', version)
    assert backend.uses_mosaic(*shapes(*arguments), interpret=False) == (reason is None)
    assert reason is None and not caplog.text or f'is not for {reason}' in caplog.text
    assert kernel.unsupported(*shapes(*arguments)) is None


@pytest.mark.parametrize('tokens, n_keys, dtype, reason', [
    (128, 64, 'bfloat16', None), (130, 512, 'bfloat16', None),
    (20, 64, 'bfloat16', None), (128, 96, 'bfloat16', '96 sub-keys'),
    (128, 64, 'float32', 'searches in float32'), (128, 64, 'capability 10', 'capability 10 (9, H'),
    (128, 64, 'half of 1024', 'queries of 2048 (at most 1024)')])
def test_the_same_of_searches(tokens, n_keys, dtype, reason, monkeypatch, caplog):
    half = 1024 if 'half' in dtype else 512
    if 'capability' in dtype:
        monkeypatch.setattr(backend, '_capability', lambda: 10)
    arrays = jax.eval_shape(lambda: make_search(
        tokens, 1, n_keys, 'float32' if dtype == 'float32' else 'bfloat16', half))
    assert not backend.searches_by_mosaic(*arrays, interpret=False)          # is not asked
    monkeypatch.setenv(backend.SETTING, '1')
    monkeypatch.setattr(jax, '__version_info__', (0, 11, 2))
    assert backend.searches_by_mosaic(*arrays, interpret=False) == (reason is None)
    assert reason is None and not caplog.text or reason in caplog.text

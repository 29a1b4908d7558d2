"""The memory's kernels on a GPU: errors relative to float64, and backward passes that repeat."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import memory as benchmark
from pkm_jax.memory.embedding_bag import compact_reference, embedding_bag
from pkm_jax.memory.kernels.gpu import backend
from pkm_jax.memory.kernels.gpu import embedding_bag as kernel
from pkm_jax.memory.layer import MemoryConfig
from pkm_jax.memory.product_keys import top_k_product_keys
from tests.memory.kernels.searches import all_scores, check_gradients
from tests.memory.kernels.searches import make as make_search
from tests.memory.kernels.test_embedding_bag import LIMIT, error, expected
from tests.memory.kernels.test_embedding_bag import make as make_reads
from tests.memory.layers import check_same

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings('ignore:The Pallas Triton backend:DeprecationWarning'),
    pytest.mark.skipif(jax.default_backend() != 'gpu', reason='needs an NVIDIA GPU: '
                       'JAX_PLATFORMS=cuda pytest -m gpu'),
]


@pytest.fixture(autouse=True)
def as_in_training():
    with jax.default_matmul_precision('default'):
        yield


@pytest.mark.parametrize('dtype', ['bfloat16', 'float32'])
@pytest.mark.parametrize('check, arguments', [
    (benchmark.check_retrieval, ()), (benchmark.check_read, (False,)),
    (benchmark.check_read, (True,))], ids=['retrieval', 'read, uniform', 'read, Zipf'])
def test_errors_to_float64_and_ten_equal_backward_passes(dtype, check, arguments):
    errors, same = check(jnp.dtype(dtype), *arguments)
    assert same
    assert {name: error for name, error in errors.items()
            if error > benchmark.LIMITS[dtype]} == {}


@pytest.fixture
def mosaic(monkeypatch):
    if int(jax.devices()[0].compute_capability.split('.')[0]) != 9:
        pytest.skip('needs a Hopper GPU')
    monkeypatch.setenv(backend.SETTING, '1')
    jax.clear_caches()      # which know no settings
    yield
    jax.clear_caches()


@pytest.mark.parametrize('tokens', [20, 130, 1000])
@pytest.mark.parametrize('n_keys, k', [(64, 1), (128, 5), (192, 32)])
def test_searches_of_any_size_by_mosaic_gpu(tokens, n_keys, k, mosaic):
    """Overlapping tiles, few tokens, lists that are filled up."""
    query, codebooks = make_search(tokens, 2, n_keys, 'bfloat16', half=32)
    scores, slots = map(np.asarray, top_k_product_keys(query, codebooks, k))
    everything = all_scores(query, codebooks)
    np.testing.assert_allclose(scores, -np.sort(-everything)[..., :k], atol=1e-4)
    np.testing.assert_allclose(scores, np.take_along_axis(everything, slots, -1), atol=1e-4)
    assert (np.diff(np.sort(slots)) > 0).all()
    check_gradients(top_k_product_keys, tokens, n_keys, k, 'bfloat16', 5e-3)


@pytest.mark.parametrize('dtype', ['bfloat16', 'float32'])
@pytest.mark.parametrize('slots', [np.zeros((1000, 32), int), np.arange(32_000).reshape(-1, 32) % 7])
def test_hot_slots_by_mosaic_gpu(slots, dtype, mosaic):
    """Segments over many chunks, most rows without a read."""
    values, slots, weights, gradient = make_reads(slots, 300, 256, dtype)
    want = expected(values, slots, weights, gradient)
    out, pull = jax.vjp(lambda values, weights: embedding_bag(values, slots, weights), values,
                        weights)
    for one, other in zip((out, *pull(gradient)), want):
        assert error(one, other) < LIMIT[dtype]


@pytest.mark.parametrize('by', ['triton', 'mosaic'])
@pytest.mark.parametrize('n_slots', [300, 100_000])
@pytest.mark.parametrize('share', [.4, .999, 1])
def test_slots_of_no_row_are_no_reads(by, n_slots, share, request):
    """Whatever their weight, beside a hot last slot; rows with a place for each, and with fewer."""
    if by == 'mosaic':
        request.getfixturevalue('mosaic')
    rng = np.random.default_rng(7)
    slots = rng.integers(0, n_slots, (1000, 32))
    slots[:, :3] = n_slots - 1
    slots[rng.random(slots.shape) < share] = n_slots
    values, slots, weights, gradient = make_reads(slots, n_slots, 256, 'bfloat16')
    want = compact_reference(values, slots, jnp.where(slots < n_slots, weights, 0), gradient,
                             jnp.int32(0), tokens=1000)
    dense = jnp.zeros(values.shape).at[want[0].ids].set(want[0].rows, mode='drop'), want[1]
    got = kernel.compact_backward(values, slots, weights, gradient, jnp.int32(0), tokens=1000,
                                  interpret=False)
    got_dense = kernel.backward(values, slots, weights, gradient, owners=2, interpret=False)
    np.testing.assert_array_equal(got[0].ids, want[0].ids)
    np.testing.assert_array_equal(got[0].count, want[0].count)
    for one, other in (got[0].rows, want[0].rows), (got[1], want[1]), *zip(got_dense, dense):
        np.testing.assert_allclose(np.asarray(one, np.float32), np.asarray(other), rtol=1e-2,
                                   atol=1e-2)


@pytest.mark.parametrize('check, dtype, arguments', [
    (benchmark.check_read, 'bfloat16', (False,)), (benchmark.check_read, 'bfloat16', (True,)),
    (benchmark.check_read, 'float32', (False,)), (benchmark.check_read, 'float32', (True,)),
    (benchmark.check_retrieval, 'bfloat16', ())])
def test_the_same_by_mosaic_gpu(check, dtype, arguments, mosaic):
    errors, same = check(jnp.dtype(dtype), *arguments)
    assert same
    assert {name: error for name, error in errors.items()
            if error > benchmark.LIMITS[dtype]} == {}


@pytest.mark.parametrize('value', [-np.inf, np.nan])
def test_slots_are_distinct_whatever_the_scores(value):
    query, codebooks, _ = benchmark.queries(512, jnp.bfloat16)
    codebooks = jnp.ones_like(codebooks).at[:].set(value)
    _, slots = benchmark.retrieve(benchmark.kernel_search)(jnp.abs(query[:256]), codebooks, None)
    assert (np.diff(np.sort(slots)) > 0).all()


@pytest.mark.parametrize('sparse', [False, True])
def test_a_layer_by_kernels_is_the_layer_in_plain_jnp(sparse):
    """In float32, values and gradients; both as they are chosen here."""
    check_same(None, MemoryConfig(sub_keys=64, query_width=64), (4, 64), sparse)

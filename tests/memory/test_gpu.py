"""The memory's kernels on a GPU: errors relative to float64, and backward passes that repeat."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import memory as benchmark
from pkm_jax.memory.kernels.gpu import backend
from pkm_jax.memory.layer import MemoryConfig
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


@pytest.mark.parametrize('check, dtype, arguments', [
    (benchmark.check_read, 'bfloat16', (False,)), (benchmark.check_read, 'bfloat16', (True,)),
    (benchmark.check_read, 'float32', (False,)), (benchmark.check_read, 'float32', (True,)),
    (benchmark.check_retrieval, 'bfloat16', ())])
def test_the_same_by_mosaic_gpu(check, dtype, arguments, monkeypatch):
    if float(jax.devices()[0].compute_capability) < 9:
        pytest.skip('needs a GPU since Hopper')
    monkeypatch.setenv(backend.SETTING, '1')
    jax.clear_caches()      # which know no settings
    errors, same = check(jnp.dtype(dtype), *arguments)
    jax.clear_caches()
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

"""The memory's kernels on a GPU: errors relative to float64, and backward passes that repeat."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from benchmarks import memory as benchmark
from pkm_jax.memory.layer import MemoryConfig, ProductKeyMemory

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


@pytest.mark.parametrize('value', [-np.inf, np.nan])
def test_slots_are_distinct_whatever_the_scores(value):
    query, codebooks, _ = benchmark.queries(512, jnp.bfloat16)
    codebooks = jnp.ones_like(codebooks).at[:].set(value)
    _, slots = benchmark.retrieve(benchmark.kernel_search)(jnp.abs(query[:256]), codebooks, None)
    assert (np.diff(np.sort(slots)) > 0).all()


@pytest.mark.parametrize('sparse', [False, True])
def test_a_layer_by_kernels_is_the_layer_in_plain_jnp(sparse):
    """In float32, values and gradients; both as they are chosen here."""
    def run(implementation):
        memory = ProductKeyMemory(MemoryConfig(sub_keys=64, query_width=64), 128,
                                  implementation=implementation, rngs=nnx.Rngs(0))
        graph, params, rest = nnx.split(memory, nnx.Param, ...)
        x = jax.random.normal(jax.random.key(0), (4, 64, 128))
        delta = memory.no_delta(256) if sparse else None

        def loss(params, x, delta):
            y, reads = nnx.merge(graph, params, rest).read(x, delta=delta)
            return jnp.sum(jnp.sin(y)), (y, reads.touched)

        with jax.default_matmul_precision('highest'):
            return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(
                nnx.to_pure_dict(params), x, delta)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
                 run(None), run('xla'))

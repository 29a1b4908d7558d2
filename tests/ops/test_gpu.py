"""The kernel of the end of a block on a GPU: its errors, and backward passes that repeat."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import add_norm as benchmark
from pkm_jax.ops.attention import attend

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings('ignore:The Pallas Triton backend:DeprecationWarning'),
    pytest.mark.skipif(jax.default_backend() != 'gpu', reason='needs an NVIDIA GPU: '
                       'JAX_PLATFORMS=cuda pytest -m gpu'),
]


@pytest.mark.parametrize('width', [768, 1024])
def test_errors_to_float64_and_ten_equal_backward_passes(width):
    assert benchmark.check(width)


@pytest.mark.parametrize('causal', [False, True])
def test_fused_attention_is_that_of_plain_xla(causal):
    keys = jax.random.split(jax.random.key(0), 3)
    arrays = [jax.random.normal(key, (2, 128, 4, 64)) for key in keys]
    lengths = jnp.asarray([128, 70])

    def run(dtype):
        return attend(*(array.astype(dtype) for array in arrays), lengths, 0., None, causal=causal)

    got, want = (np.asarray(jax.jit(run, static_argnums=0)(dtype), np.float32)
                 for dtype in (jnp.bfloat16, jnp.float32))
    np.testing.assert_allclose(got[0], want[0], atol=.03)
    np.testing.assert_allclose(got[1, :70], want[1, :70], atol=.03)

"""The layer by kernels beside the layer in plain jnp."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pkm_jax import MemoryConfig, ProductKeyMemory


def check_same(implementation, config: MemoryConfig, tokens: tuple[int, int], sparse: bool):
    """Values, slots touched and gradients of 128 wide states equal plain jnp's, in float32."""
    def run(implementation):
        memory = ProductKeyMemory(config, 128, implementation=implementation, rngs=nnx.Rngs(0))
        graph, params, rest = nnx.split(memory, nnx.Param, ...)
        x = jax.random.normal(jax.random.key(0), (*tokens, 128))
        delta = memory.no_delta(tokens[0] * tokens[1]) if sparse else None

        def loss(params, x, delta):
            y, reads = nnx.merge(graph, params, rest).read(x, delta=delta)
            return jnp.sum(jnp.sin(y)), (y, reads.touched)

        with jax.default_matmul_precision('highest'):
            return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(
                nnx.to_pure_dict(params), x, delta)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
                 run(implementation), run('xla'))

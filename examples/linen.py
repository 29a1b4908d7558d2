"""The layer inside a Linen module, by Flax's bridge: python examples/linen.py"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.nnx import bridge

from pkm_jax import MemoryConfig, ProductKeyMemory

WIDTH = 16


class Model(nn.Module):
    """Somebody's Linen model."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Dense(WIDTH)(x)
        memory = bridge.to_linen(
            ProductKeyMemory, MemoryConfig(sub_keys=16, heads=2, top_k=4, query_width=16), WIDTH,
            name='memory')
        return nn.Dense(1)(x + memory(x))[..., 0]


def main() -> None:
    model = Model()
    variables = model.init(jax.random.key(0), jnp.ones((2, 4)))
    params, stats = variables['params'], {k: v for k, v in variables.items() if k != 'params'}
    optimizer = optax.adam(1e-2)
    state = optimizer.init(params)

    @jax.jit
    def train_step(params, stats, state, key):
        x = jax.random.normal(key, (64, 4))

        def loss_of(params):
            y, changed = model.apply({'params': params, **stats}, x, mutable=list(stats))
            return jnp.mean((y - jnp.sin(3 * x[:, 0])) ** 2), changed

        (loss, stats_now), gradient = jax.value_and_grad(loss_of, has_aux=True)(params)
        updates, state_now = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), {**stats, **stats_now}, state_now, loss

    losses = []
    for step in range(100):
        params, stats, state, loss = train_step(params, stats, state, jax.random.key(step))
        losses.append(float(loss))
    print(f'collections {sorted(variables)}; loss {losses[0]:.3f} -> {losses[-1]:.3f}')
    assert losses[-1] < losses[0] / 2


if __name__ == '__main__':
    main()

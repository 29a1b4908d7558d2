"""A memory inside a Linen module, by Flax's bridge from NNX.

    python examples/linen.py

Its parameters are in the collection 'params' and the running statistics of its batch norm in
'batch_stats', as those of `flax.linen.BatchNorm`; one training step updates both.
"""

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import nnx

from pkm_jax import MemoryConfig, ProductKeyMemory

WIDTH = 16


class Block(nn.Module):
    """A feed-forward layer with a memory beside it."""

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, training: bool) -> jax.Array:
        config = MemoryConfig(sub_keys=16, heads=2, top_k=4, query_width=16, value_dropout=0.1)
        memory = nnx.bridge.to_linen(ProductKeyMemory, config, WIDTH, name='memory')
        rngs = self.make_rng('dropout') if training else None
        h = nn.LayerNorm()(x)
        x = x + nn.Dense(WIDTH)(nn.gelu(nn.Dense(4 * WIDTH)(h)))
        return x + memory(h, mask, deterministic=not training, rngs=rngs)


def main() -> None:
    block, optimizer = Block(), optax.adam(1e-2)
    x, target = jax.random.normal(jax.random.key(0), (2, 4, 8, WIDTH))
    mask = jnp.arange(8) < jnp.array([8, 8, 5, 3])[:, None]
    variables = block.init(jax.random.key(1), x, mask, training=False)
    params, batch_stats = variables['params'], variables['batch_stats']

    @jax.jit
    def train_step(params, batch_stats, state, key):
        def loss_of(params):
            y, changed = block.apply({'params': params, 'batch_stats': batch_stats}, x, mask,
                                     training=True, rngs={'dropout': key}, mutable=['batch_stats'])
            return jnp.mean((y - target) ** 2, where=mask[..., None]), changed['batch_stats']

        (loss, new_stats), gradients = jax.value_and_grad(loss_of, has_aux=True)(params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), new_stats, state, loss

    def evaluate(params, batch_stats):
        y = block.apply({'params': params, 'batch_stats': batch_stats}, x, mask, training=False)
        return jnp.mean((y - target) ** 2, where=mask[..., None])

    print('params:', ', '.join(sorted(params['memory'])))
    print('batch_stats:', jax.tree.map(jnp.shape, batch_stats['memory']))
    state = optimizer.init(params)
    new_params, new_stats, state, loss = train_step(params, batch_stats, state, jax.random.key(2))
    moved = jnp.abs(new_stats['memory']['query_norm']['mean']).max()
    print(f'one step of training, loss {loss:.3f}: that of an evaluation '
          f'{evaluate(params, batch_stats):.3f} -> {evaluate(new_params, new_stats):.3f}, '
          f'running means moved by up to {moved:.3f}')


if __name__ == '__main__':
    main()

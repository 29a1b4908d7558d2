"""The layer in somebody's own transformer, under their own mesh: python examples/transformer.py

Nothing here is pkm_jax's but the memory. It is called like a feed-forward layer; its batch
statistics are updated by the call, as those of `nnx.BatchNorm` are. The mesh's axes are Auto, then
Explicit; words are one-hot because look-ups by index need `out_sharding` under Explicit axes.
"""

import math
import os

os.environ.setdefault('JAX_NUM_CPU_DEVICES', '8')

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from pkm_jax import Axes, MemoryConfig, ProductKeyMemory

WIDTH, WORDS = 32, 50
SIZES = MemoryConfig(sub_keys=16, heads=2, top_k=4, query_width=16)


class Block(nnx.Module):
    """Attention, then a memory in the place of the feed-forward layer."""

    def __init__(self, axes: Axes | None, rngs: nnx.Rngs):
        self.norms = nnx.List([nnx.LayerNorm(WIDTH, rngs=rngs) for _ in range(2)])
        self.attention = nnx.MultiHeadAttention(num_heads=4, in_features=WIDTH, decode=False,
                                                rngs=rngs)
        self.memory = ProductKeyMemory(SIZES, WIDTH, axes=axes, rngs=rngs)

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        x = x + self.attention(self.norms[0](x), mask=mask[:, None, None, :])
        return x + self.memory(self.norms[1](x), mask)


class Model(nnx.Module):
    def __init__(self, axes: Axes | None, rngs: nnx.Rngs):
        self.embedding = nnx.Linear(WORDS, WIDTH, use_bias=False, rngs=rngs)
        self.blocks = nnx.List([Block(axes, rngs) for _ in range(2)])
        self.head = nnx.Linear(WIDTH, WORDS, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x, mask = self.embedding(jax.nn.one_hot(tokens, WORDS)), tokens > 0
        for block in self.blocks:
            x = block(x, mask)
        return self.head(x)


@nnx.jit
def train_step(model: Model, optimizer: nnx.Optimizer, tokens: jax.Array) -> jax.Array:
    def loss_of(model):
        labels = jax.nn.one_hot((tokens * 7) % WORDS, WORDS)
        return optax.softmax_cross_entropy(model(tokens), labels).mean()

    loss, gradients = nnx.value_and_grad(loss_of)(model)
    optimizer.update(model, gradients)
    return loss


def train(axes: Axes | None, kind: AxisType, steps: int = 60) -> tuple[list[float], str]:
    """Losses under a mesh of two axes with names of the host's; what a device has of a table."""
    columns = math.gcd(2, jax.device_count())
    mesh = jax.make_mesh((jax.device_count() // columns, columns), ('dp', 'tp'),
                         axis_types=(kind,) * 2)
    with jax.set_mesh(mesh):
        model = Model(axes, nnx.Rngs(0))
        if axes is not None:        # a part of every table for each device along `tp`
            for block in model.blocks:
                table = block.memory.values
                table.set_value(jax.device_put(table[...], NamedSharding(mesh, axes.table)))
        optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
        losses = []
        for step in range(steps):
            tokens = jax.random.randint(jax.random.key(step), (16, 8), 1, WORDS)
            tokens = jax.device_put(tokens, NamedSharding(mesh, P('dp')))
            losses.append(float(train_step(model, optimizer, tokens)))
    memory = model.blocks[0].memory
    seen = memory.query_norm.mean[...]
    assert jnp.any(seen != 0), 'batch statistics are updated by the call'
    table = memory.values[...]
    return losses, f'{table.sharding.shard_shape(table.shape)} of {table.shape}'


if __name__ == '__main__':
    split = Axes(data=('dp',), rows=(), columns=('tp',))
    for kind in (AxisType.Auto, AxisType.Explicit):
        for name, axes in (('table split over tp', split), ('table on every device', None)):
            losses, held = train(axes, kind)
            print(f'{kind.name} axes, {name}: a device has {held}, '
                  f'loss {losses[0]:.3f} -> {losses[-1]:.3f}')
            assert losses[-1] < losses[0] / 2

"""A memory in a plain NNX transformer, trained under a mesh whose axes are not ours.

    python examples/transformer.py

Two lines of the transformer are about the memory: the one that makes it and the one that calls it.
It learns which token follows which, once with the memory's table split over the mesh's 'tp' axis
and once without a word about axes: then the table is on every device, which is logged.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from pkm_jax import Axes, MemoryConfig, ProductKeyMemory

VOCABULARY, LENGTH, WIDTH, BATCH, STEPS = 64, 16, 32, 32, 40


class Transformer(nnx.Module):
    """One pre-norm block between an embedding and logits."""

    def __init__(self, axes: Axes | None, rngs: nnx.Rngs):
        self.embed = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.attention_norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(4, WIDTH, decode=False, rngs=rngs)
        self.feed_forward_norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)
        self.memory = ProductKeyMemory(MemoryConfig(sub_keys=16, heads=2, top_k=4, query_width=16),
                                       WIDTH, axes=axes, rngs=rngs)
        self.logits = nnx.Linear(WIDTH, VOCABULARY, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.embed(tokens)
        x = x + self.attention(self.attention_norm(x), mask=nnx.make_causal_mask(tokens))
        h = self.feed_forward_norm(x)
        x = x + self.down(nnx.gelu(self.up(h))) + self.memory(h)
        return self.logits(x)


@nnx.jit
def train_step(model: Transformer, optimizer: nnx.Optimizer, tokens: jax.Array) -> jax.Array:
    def loss_of(model):
        logits = model(tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    loss, gradients = nnx.value_and_grad(loss_of)(model)
    optimizer.update(model, gradients)
    return loss


def batches() -> list[np.ndarray]:
    """Tokens [BATCH, LENGTH + 1], each followed by the one that a fixed random map says."""
    rng = np.random.default_rng(0)
    follower = rng.permutation(VOCABULARY)
    texts = [rng.integers(VOCABULARY, size=(STEPS, BATCH))]
    for _ in range(LENGTH):
        texts.append(follower[texts[-1]])
    return list(np.stack(texts, axis=-1).astype(np.int32))


def train(mesh: Mesh, axes: Axes | None) -> None:
    """Prints the losses of the first and last step, and what the training left behind."""
    model = Transformer(axes, nnx.Rngs(0))
    table = model.memory.values
    table[...] = jax.device_put(table[...], NamedSharding(mesh, axes.table if axes else P()))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    by_device = NamedSharding(mesh, P('dp'))
    losses = [train_step(model, optimizer, jax.device_put(tokens, by_device))
              for tokens in batches()]
    a_device_has = table.sharding.shard_shape(table.shape)
    moved = jnp.abs(model.memory.query_norm.mean[...]).max()
    print(f'axes = {axes}: loss {losses[0]:.2f} -> {losses[-1]:.2f}, each device has '
          f'{a_device_has} of the table {table.shape}, running means are up to {moved:.2f}')


def main() -> None:
    devices = jax.devices()
    mesh = Mesh(np.reshape(devices, (-1, math.gcd(len(devices), 2))), ('dp', 'tp'))
    with jax.set_mesh(mesh):
        train(mesh, Axes(data=('dp',), rows=(), columns=('tp',)))
        train(mesh, None)


if __name__ == '__main__':
    jax.config.update('jax_num_cpu_devices', 8)
    main()

"""A table of which only the rows that were read change, in a loop of one's own:
python examples/sparse_updates.py

The lines marked # sparse are all it takes: a `delta` of zeros stands for the rows that a call can
touch, its gradient is theirs, and the optimizer changes these rows and their moments alone.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from pkm_jax import (
    MemoryConfig,
    MemoryReads,
    ProductKeyMemory,
    SparseRows,
    apply_updates,
    lazy_adam,
)

TOKENS, WIDTH = 64, 16


class Model(nnx.Module):
    """Somebody's model."""

    def __init__(self, rngs: nnx.Rngs):
        self.up = nnx.Linear(4, WIDTH, rngs=rngs)
        self.memory = ProductKeyMemory(
            MemoryConfig(sub_keys=128, heads=2, top_k=4, query_width=16), WIDTH, rngs=rngs)
        self.down = nnx.Linear(WIDTH, 1, rngs=rngs)

    def __call__(self, x, delta=None) -> tuple[jax.Array, MemoryReads]:
        read, reads = self.memory.read(self.up(x), delta=delta)                         # sparse
        return self.down(read)[:, 0], reads


def main() -> None:
    graph, params, stats = nnx.split(Model(nnx.Rngs(0)), nnx.Param, ...)
    params = nnx.to_pure_dict(params)
    delta = nnx.merge(graph, params, stats).memory.no_delta(TOKENS)                     # sparse
    groups = {'up': 'dense', 'down': 'dense', 'memory': dict.fromkeys(params['memory'], 'dense')}
    groups['memory']['values'] = 'sparse'                                               # sparse
    optimizer = optax.partition({'dense': optax.adam(1e-2), 'sparse': lazy_adam(1e-1)}, groups)
    state = optimizer.init(params)

    @jax.jit
    def train_step(params, state, key):
        x = jax.random.normal(key, (TOKENS, 4))

        def loss_of(params, delta):
            y, reads = nnx.merge(graph, params, stats)(x, delta)
            return jnp.mean((y - jnp.sin(3 * x[:, 0])) ** 2), reads.touched

        differentiate = jax.value_and_grad(loss_of, (0, 1), has_aux=True)               # sparse
        (loss, touched), (gradient, rows) = differentiate(params, delta)                # sparse
        gradient['memory']['values'] = SparseRows(touched.ids, rows, touched.count)     # sparse
        updates, state = optimizer.update(gradient, state, params)
        return apply_updates(params, updates, key), state, loss, touched                # sparse

    before, read, losses = np.asarray(params['memory']['values']), set(), []
    for step in range(300):
        params, state, loss, touched = train_step(params, state, jax.random.key(step))
        read |= set(np.asarray(touched.ids)[:int(touched.count[0])].tolist())
        losses.append(float(loss))
    changed = np.flatnonzero((np.asarray(params['memory']['values']) != before).any(axis=1))
    print(f'loss {np.mean(losses[:10]):.3f} -> {np.mean(losses[-10:]):.3f}; of {len(before):,} '
          f'rows {len(read):,} were read and {len(changed):,} changed')
    assert set(changed.tolist()) <= read and len(read) < len(before)
    assert np.mean(losses[-10:]) < np.mean(losses[:10]) / 2


if __name__ == '__main__':
    main()

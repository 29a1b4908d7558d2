"""Sparse updates of a memory's table in a training loop of one's own, with Optax.

    python examples/sparse_updates.py

The model is somebody else's and so is the loop. Only the rows of the table that a step read get a
gradient, new moments and an update, in place, at a cost that does not depend on the table's size:
a `delta` of zeros stands for the rows that a read can touch, and its gradient is theirs. The lines
marked # sparse are all it takes; with a batch norm of queries `update_batch_stats` is one more.
"""

import jax
import numpy as np
import optax
from flax import nnx

from pkm_jax import MemoryConfig, ProductKeyMemory, SparseRows, apply_updates, lazy_adam

FACTS, WIDTH, BATCH, STEPS = 64, 16, 32, 100
SIZES = MemoryConfig(sub_keys=64, heads=2, top_k=4, query_width=16, query_norm='layer')
SPARSE, REST = lazy_adam(3e-2), nnx.All(nnx.Param, nnx.Not(nnx.PathContains('values')))    # sparse


class Recall(nnx.Module):
    """Recalls the answer to a question, both of which are numbers."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(FACTS, WIDTH, rngs=rngs)
        self.memory = ProductKeyMemory(SIZES, WIDTH, rngs=rngs)
        self.answer = nnx.Linear(WIDTH, FACTS, rngs=rngs)


@nnx.jit(donate_argnums=(0, 1, 2))     # the table is changed in place
def train_step(
    model: Recall, optimizer: nnx.Optimizer, state: optax.OptState, questions: jax.Array,
    answers: jax.Array, key: jax.Array,
) -> tuple[optax.OptState, jax.Array, jax.Array]:
    """The table's new optimizer state, the loss, and the ids of the rows that were touched."""
    def loss_of(model, delta):                                                             # sparse
        read, reads = model.memory.read(model.embed(questions), delta=delta)               # sparse
        losses = optax.softmax_cross_entropy_with_integer_labels(model.answer(read), answers)
        return losses.mean(), reads.touched                                                # sparse

    grad = nnx.value_and_grad(loss_of, argnums=(nnx.DiffState(0, REST), 1), has_aux=True)  # sparse
    (loss, touched), (dense, rows) = grad(model, model.memory.no_delta(questions.size))    # sparse
    optimizer.update(model, dense)
    updates, state = SPARSE.update(SparseRows(touched.ids, rows, touched.count), state)    # sparse
    model.memory.values[...] = apply_updates(model.memory.values[...], updates, key)       # sparse
    return state, loss, touched.ids


def main() -> None:
    rng, answer_of = np.random.default_rng(0), np.random.default_rng(1).permutation(FACTS)
    model = Recall(nnx.Rngs(0))
    state = SPARSE.init(model.memory.values[...])                                          # sparse
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=REST)                           # sparse
    before = np.array(model.memory.values[...])
    touched, losses = np.zeros(len(before), bool), []
    for step in range(STEPS):
        questions = rng.integers(FACTS, size=BATCH)
        state, loss, ids = train_step(model, optimizer, state, questions, answer_of[questions],
                                      jax.random.key(step))
        ids = np.asarray(ids)
        touched[ids[ids < len(before)]] = True      # a list is filled up with the number of rows
        losses.append(loss)
    after = np.asarray(model.memory.values[...])
    changed = (after.view(np.uint32) != before.view(np.uint32)).any(axis=1)
    assert not changed[~touched].any() and not touched.all()
    assert losses[-1] < losses[0] / 2
    print(f'loss {losses[0]:.2f} -> {losses[-1]:.2f}; of {len(before)} rows '
          f'{touched.sum()} were read, {changed.sum()} changed, and the others keep every bit')


if __name__ == '__main__':
    main()

"""Sparse updates of a memory's table in a training loop of one's own, with Optax.

    python examples/sparse_updates.py

The model is somebody else's and so is the loop. Only the rows of the table that a step read get a
gradient, optimizer state and an update, at a cost that does not depend on the table's size. The
lines marked [sparse] are what that takes; the rest is what any NNX loop with Optax has.
"""

import jax
import numpy as np
import optax
from flax import nnx

from pkm_jax import MemoryConfig, MemoryReads, ProductKeyMemory, SparseRows, apply_updates, lazy_adam

FACTS, WIDTH, BATCH, STEPS = 64, 16, 32, 100
OTHERS = nnx.All(nnx.Param, nnx.Not(nnx.PathContains('values')))                # [sparse]
SPARSE = lazy_adam(3e-2)                                                        # [sparse]


class Recall(nnx.Module):
    """Recalls the answer to a question, both of which are numbers."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(FACTS, WIDTH, rngs=rngs)
        self.memory = ProductKeyMemory(MemoryConfig(sub_keys=64, heads=2, top_k=4, query_width=16),
                                       WIDTH, rngs=rngs)
        self.answer = nnx.Linear(WIDTH, FACTS, rngs=rngs)

    def __call__(self, questions: jax.Array, delta: jax.Array) -> tuple[jax.Array, MemoryReads]:
        read, reads = self.memory.read(self.embed(questions), delta=delta)      # [sparse]
        self.memory.update_batch_stats(reads.batch_stats)
        return self.answer(read), reads


@nnx.jit(donate_argnums=(0, 1, 2))     # the table is changed in place
def train_step(
    model: Recall, optimizer: nnx.Optimizer, state: optax.OptState, questions: jax.Array,
    answers: jax.Array, key: jax.Array,
) -> tuple[optax.OptState, jax.Array, jax.Array]:
    """The new state of SPARSE, the loss, and the ids of the rows that were touched."""
    def loss_of(model, delta):
        logits, reads = model(questions, delta)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, answers)
        return losses.mean(), reads.touched

    delta = model.memory.no_delta(questions.size)                               # [sparse]
    (loss, touched), (gradients, rows) = nnx.value_and_grad(
        loss_of, argnums=(nnx.DiffState(0, OTHERS), 1), has_aux=True)(model, delta)
    optimizer.update(model, gradients)
    gradient = {'values': SparseRows(touched.ids, rows, touched.count)}         # [sparse]
    updates, state = SPARSE.update(gradient, state)                             # [sparse]
    table = apply_updates({'values': model.memory.values[...]}, updates, key)   # [sparse]
    model.memory.values[...] = table['values']                                  # [sparse]
    return state, loss, touched.ids


def main() -> None:
    rng, answer_of = np.random.default_rng(0), np.random.default_rng(1).permutation(FACTS)
    model = Recall(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=OTHERS)
    state = SPARSE.init({'values': model.memory.values[...]})                   # [sparse]
    before = np.array(model.memory.values[...])
    touched, losses = np.zeros(len(before), bool), []
    for step in range(STEPS):
        questions = rng.integers(FACTS, size=BATCH)
        state, loss, ids = train_step(model, optimizer, state, questions, answer_of[questions],
                                      jax.random.key(step))
        ids = np.asarray(ids)
        touched[ids[ids < len(before)]] = True      # a list is filled up with the number of rows
        losses.append(loss)
    changed = (np.asarray(model.memory.values[...]).view(np.uint32)
               != before.view(np.uint32)).any(axis=1)
    assert touched.any() and not touched.all()
    np.testing.assert_array_equal(changed, touched)
    print(f'loss {losses[0]:.2f} -> {losses[-1]:.2f}; {touched.sum()} of {len(before)} rows were '
          f'read and changed, the other {(~touched).sum()} keep every bit')


if __name__ == '__main__':
    main()

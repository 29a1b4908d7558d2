"""What a sparse update of a value table takes on this device, as the table grows.

    python -m benchmarks.sparse_updates [--tokens=2048] [--small]

One read, its backward pass and the update of the table, compiled as one program that changes the
table in place; medians of warm runs. First the step over the number of slots S, with the optimizers
whose state fits; then, at 2048² × 1024 in float32, lazy Adam beside the dense gradient with dense
Adam. The last lines say by how much the step grows from the smallest to the largest table (goal:
less than 15 %) and how many times as long the dense one takes (goal: 5). `--small` runs everything
on sizes that suit a CPU, as a test of this program, and in float32: on a CPU XLA passes a bfloat16
table through float32 as a whole.
"""

import argparse
import functools
import statistics
import time

import jax
import jax.numpy as jnp
import optax

from pkm_jax.memory import sharded
from pkm_jax.memory.sparse_rows import SparseRows
from pkm_jax.optimizers import sparse

READS = 128


def sparse_step(optimizer, table, state, slots, weights, gradient):
    """Read, compact gradient, update; returns table, state and the weights' gradient."""
    delta = sharded.no_delta(*table.shape, slots.size)
    read, pull, touched = jax.vjp(lambda delta, weights: sharded.sparse_embedding_bag(
        table, delta, slots, weights), delta, weights, has_aux=True)
    rows, by_weight = pull(gradient + read)     # as in training, it waits for the read
    gradients = {'values': SparseRows(touched.ids, rows, touched.count)}
    updates, state = optimizer.update(gradients, state)
    changed = sparse.apply_updates({'values': table}, updates, jax.random.key(0))
    return changed['values'], state, by_weight


def dense_step(optimizer, table, state, slots, weights, gradient):
    """The same with an ordinary gradient of the table and an ordinary optimizer."""
    read, pull = jax.vjp(lambda table, weights: sharded.embedding_bag(table, slots, weights),
                         table, weights)
    rows, by_weight = pull(gradient + read)     # as in training, it waits for the read
    updates, state = optimizer.update({'values': rows}, state)
    return optax.apply_updates({'values': table}, updates)['values'], state, by_weight


def milliseconds(step, optimizer, n_slots, width, dtype, tokens, runs=9):
    """The median of `runs` steps after two, and the bytes of temporaries."""
    keys = jax.random.split(jax.random.key(0), 3)
    slots = jax.random.randint(keys[0], (tokens, READS), 0, n_slots, jnp.int32)
    weights = jax.random.uniform(keys[1], (tokens, READS))
    gradient = jax.random.normal(keys[2], (tokens, width), dtype)
    table = jnp.zeros((n_slots, width), dtype)
    state = jax.jit(optimizer.init)({'values': table})
    run = jax.jit(functools.partial(step, optimizer), donate_argnums=(0, 1)).lower(
        table, state, slots, weights, gradient).compile()
    times = []
    for _ in range(runs + 2):
        start = time.perf_counter()
        table, state, _ = jax.block_until_ready(run(table, state, slots, weights, gradient))
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times[2:]), run.memory_analysis().temp_size_in_bytes


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--tokens', type=int, default=2048)
    parser.add_argument('--small', action='store_true')
    options = parser.parse_args()
    tokens = 16 if options.small else options.tokens
    exponents, width, dtype = (((12, 14, 16), 128, jnp.float32) if options.small else
                               ((18, 20, 22, 24), 768, jnp.bfloat16))
    print(f'{jax.devices()[0].device_kind}, jax {jax.__version__}, T = {tokens}, {READS} reads')
    print('| table | optimizer | ms | temporaries, GB |\n| --- | --- | --- | --- |')
    growth = {}
    for name, largest in (('rowwise_adagrad', 24), ('lazy_adam', 22)):
        times = []
        for exponent in (e for e in exponents if e <= largest):
            took, extra = milliseconds(sparse_step, getattr(sparse, name)(1e-3),
                                       2 ** exponent, width, dtype, tokens)
            times.append(took)
            print(f'| 2^{exponent} × {width} {jnp.dtype(dtype).name} | {name} | {took:.3f} | '
                  f'{extra / 1e9:.2f} |', flush=True)
        growth[name] = times[-1] / times[0] - 1
    keys, width = (64, 128) if options.small else (2048, 1024)
    compared = []
    for title, step, optimizer in (('sparse', sparse_step, sparse.lazy_adam(1e-3)),
                                   ('dense', dense_step, optax.adam(1e-3))):
        took, extra = milliseconds(step, optimizer, keys ** 2, width, jnp.float32, tokens)
        compared.append(took)
        print(f'| {keys}² × {width} float32 | {title} Adam | {took:.3f} | {extra / 1e9:.2f} |',
              flush=True)
    for name, share in growth.items():
        print(f'{name}: the step grows by {share:.1%} from the smallest to the largest table')
    print(f'dense takes {compared[1] / compared[0]:.1f} times as long as sparse')


if __name__ == '__main__':
    main()

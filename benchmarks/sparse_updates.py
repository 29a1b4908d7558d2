"""What a sparse update of a value table takes on this device, as the table grows.

    python -m benchmarks.sparse_updates [--tokens=2048] [--small]

One read, its backward pass and the update of the table, compiled as one program that changes the
table in place, in one pass as in training, in a mesh of one device; medians of repeated timings of
many steps (`memory.median_ms`). First the step over the number of slots S, with the optimizers
whose state fits: reads are uniform over as many rows as the smallest table has, in larger ones
spread over all of it, so that each step touches as many rows. Then, at 2048² × 1024 in float32 and
uniform reads of all, lazy Adam beside the dense gradient with dense Adam. The last lines say how
much longer a step takes in a larger table, at worst (goal: 10 %), and how many times as long the
dense one takes (goal: 5). `--small` runs everything on sizes that suit a CPU, as a test of this
program, and in float32: on a CPU XLA passes a bfloat16 table through float32 as a whole.
"""

import argparse
import functools

import jax
import jax.numpy as jnp
import optax

from benchmarks.memory import median_ms
from pkm_jax.memory import sharded
from pkm_jax.memory.sparse_rows import SparseRows
from pkm_jax.mesh import Shards, make_mesh
from pkm_jax.optimizers import sparse

READS = 128


def sparse_step(optimizer, table, state, slots, weights, gradient):
    """Read, compact gradient, update; returns table, state and the weights' gradient."""
    delta = sharded.no_delta(*table.shape, slots.size, dtype=sharded.rows_dtype(table, weights))
    read, pull, touched = jax.vjp(lambda delta, weights: sharded.sparse_embedding_bag(
        table, delta, slots, weights), delta, weights, has_aux=True)
    rows, by_weight = pull(gradient + read)     # as in training, it waits for the read
    gradients = {'values': SparseRows(touched.ids, rows, touched.count)}
    params, key = {'values': table}, jax.random.key(0)
    updates, state = optimizer.update(gradients, state, params, rounding=key)
    changed = sparse.apply_updates(params, updates, key)
    return changed['values'], state, by_weight


def dense_step(optimizer, table, state, slots, weights, gradient):
    """The same with an ordinary gradient of the table and an ordinary optimizer."""
    read, pull = jax.vjp(lambda table, weights: sharded.embedding_bag(table, slots, weights),
                         table, weights)
    rows, by_weight = pull(gradient + read)     # as in training, it waits for the read
    updates, state = optimizer.update({'values': rows}, state)
    return optax.apply_updates({'values': table}, updates)['values'], state, by_weight


def spread(key, tokens, n_slots, rows):
    """Reads [tokens, READS] of `rows` different slots, one in each part of the table: uniform."""
    of_row, of_read = jax.random.split(key)
    each = n_slots // rows
    slots = jnp.arange(rows) * each + jax.random.randint(of_row, (rows,), 0, each, jnp.int32)
    return slots[jax.random.randint(of_read, (tokens, READS), 0, rows, jnp.int32)]


def milliseconds(step, optimizer, n_slots, rows, width, dtype, tokens):
    """Of a step that reads `rows` different slots at most, and the bytes of temporaries."""
    keys = jax.random.split(jax.random.key(0), 3)
    slots = spread(keys[0], tokens, n_slots, rows)
    weights = jax.random.uniform(keys[1], (tokens, READS))
    gradient = jax.random.normal(keys[2], (tokens, width), dtype)
    table = jnp.zeros((n_slots, width), dtype)
    state = jax.jit(optimizer.init)({'values': table})
    compiled = jax.jit(functools.partial(step, optimizer), donate_argnums=(0, 1)).lower(
        table, state, slots, weights, gradient).compile()

    def take():
        nonlocal table, state
        table, state, by_weight = compiled(table, state, slots, weights, gradient)
        return table, by_weight

    return median_ms(take), compiled.memory_analysis().temp_size_in_bytes


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
                                       2 ** exponent, 2 ** exponents[0], width, dtype, tokens)
            times.append(took)
            print(f'| 2^{exponent} × {width} {jnp.dtype(dtype).name} | {name} | {took:.3f} | '
                  f'{extra / 1e9:.2f} |', flush=True)
        growth[name] = max(times) / times[0] - 1
    keys, width = (64, 128) if options.small else (2048, 1024)
    compared = []
    for title, step, optimizer in (('sparse', sparse_step, sparse.lazy_adam(1e-3)),
                                   ('dense', dense_step, optax.adam(1e-3))):
        took, extra = milliseconds(step, optimizer, keys ** 2, keys ** 2, width, jnp.float32,
                                   tokens)
        compared.append(took)
        print(f'| {keys}² × {width} float32 | {title} Adam | {took:.3f} | {extra / 1e9:.2f} |',
              flush=True)
    for name, share in growth.items():
        print(f'{name}: a step takes {share:.1%} longer than in the smallest table, at worst')
    print(f'dense takes {compared[1] / compared[0]:.1f} times as long as sparse')


if __name__ == '__main__':
    with jax.set_mesh(make_mesh(Shards(), jax.devices()[:1])):
        main()

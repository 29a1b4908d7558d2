"""What the memory's kernels take on this GPU, beside their floors, plain jnp and PyTorch.

    python -m benchmarks.memory

Prints the measured copy and gather bandwidths; for each operation the median of warm runs, its
floor (bytes over a bandwidth; in the forward retrieval vector instructions over their rate),
the ratio to it, and the multiples that the plain jnp reference and, where PyTorch is installed, its
eager and compiled counterparts take; for uniform and Zipf(1.0) slots. Then errors relative to
float64, and whether ten repeated backward passes are equal bit for bit. Two to three minutes.
Exits 1 if an error exceeds 1e-2 (bfloat16) or 1e-5 (float32), or a repetition differs.
"""

import functools
import math
import os
import statistics
import sys
import time

os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')     # PyTorch needs memory too

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import memory_peers
from pkm_jax.memory import layer
from pkm_jax.memory.embedding_bag import compact_gradients, embedding_bag
from pkm_jax.memory.kernels.gpu.backend import uses_mosaic
from pkm_jax.memory.kernels.gpu.embedding_bag_backward import rows_that_were_read
from pkm_jax.memory.product_keys import top_k_product_keys

TOKENS, HEADS, TOP_K, HALF = 16384, 4, 32, 128
READS = HEADS * TOP_K
LIMITS = {'bfloat16': 1e-2, 'float32': 1e-5}

kernel_search, plain_search = (functools.partial(top_k_product_keys, implementation=name)
                               for name in ('gpu', 'xla'))
kernel_bag, plain_bag = (functools.partial(embedding_bag, implementation=name)
                         for name in ('gpu', 'xla'))
kernel_compact = functools.partial(compact_gradients, implementation='gpu')


def median_ms(function, *arguments, runs=7) -> float:
    """Milliseconds of one call: the median of `runs` timings, after a warm-up.

    A timing is of so many calls, started one behind the other, that it lasts 0.1 s: starting them
    and waiting for the last took 0.15 to 0.5 ms.
    """
    def seconds(calls):
        start = time.perf_counter()
        for _ in range(calls):
            result = function(*arguments)
        jax.block_until_ready(result)
        return time.perf_counter() - start

    seconds(2)
    calls = math.ceil(0.1 / (seconds(3) / 3))
    return statistics.median(seconds(calls) for _ in range(runs)) / calls * 1e3


def inputs(n_keys, width, dtype, tokens=TOKENS, zipf=False):
    """Table, slots, weights and output gradient of a read."""
    key = jax.random.split(jax.random.key(n_keys + zipf), 4)
    n_slots = n_keys ** 2
    values = jax.jit(lambda: jax.random.normal(key[0], (n_slots, width), dtype))()
    if zipf:    # inverse of the continuous distribution 1/x on [1, n_slots], ranks shuffled
        rank = jnp.exp(jax.random.uniform(key[1], (tokens, READS)) * np.log(n_slots))
        shuffle = jnp.asarray(np.random.default_rng(0).permutation(n_slots), jnp.int32)
        slots = shuffle[jnp.minimum(rank.astype(jnp.int32) - 1, n_slots - 1)]
    else:
        slots = jax.random.randint(key[1], (tokens, READS), 0, n_slots, jnp.int32)
    weights = jax.nn.softmax(jax.random.normal(key[2], (tokens, HEADS, TOP_K)), axis=-1)
    gradient = jax.random.normal(key[3], (tokens, width), dtype)
    return values, slots, weights.reshape(tokens, READS), gradient


def queries(n_keys, dtype):
    """Queries, codebooks and gradients of the scores of a retrieval."""
    key = jax.random.split(jax.random.key(n_keys), 3)
    return (jax.random.normal(key[0], (TOKENS, HEADS, 2, HALF), dtype),
            jax.random.normal(key[1], (HEADS, 2, n_keys, HALF), dtype),
            jax.random.normal(key[2], (TOKENS, HEADS, TOP_K)))


def retrieve(search):
    return jax.jit(lambda query, codebooks, _: search(query, codebooks, TOP_K))


def retrieve_backward(search):
    def run(query, codebooks, gradient):
        scores, pull = jax.vjp(lambda *a: search(*a, TOP_K)[0], query, codebooks)
        return scores, pull(gradient)
    return jax.jit(run)


def read_dense(bag):
    def run(values, slots, weights, gradient):
        out, pull = jax.vjp(lambda values, weights: bag(values, slots, weights), values, weights)
        return out, pull(gradient)
    return jax.jit(run)


@jax.jit
def read_compact(values, slots, weights, gradient):
    """The kernels alone: a step widens the rows where it uses them, not in a pass of its own."""
    mosaic = uses_mosaic(values, slots, interpret=False)
    return kernel_bag(values, slots, weights), rows_that_were_read(
        values, slots, weights, gradient, mosaic=mosaic, interpret=False)


def whole_layer(memory):
    """Forward and backward pass of a layer, through the same dispatch as training."""
    def run(parameters, states, gradient):
        def apply(parameters, states):
            graph, rest = memory
            module = layer.nnx.merge(graph, parameters, rest)
            return module.read(states)[0]
        out, pull = jax.vjp(apply, parameters, states)
        return out, pull(gradient)
    return jax.jit(run)


def bandwidths():
    """Bytes a second of a copy (read plus written), and of gathered rows of a table inside L2."""
    block = jax.random.bits(jax.random.key(0), (1 << 29,), jnp.uint32)
    copy = 2 * block.nbytes / median_ms(jax.jit(lambda x: x ^ jnp.uint32(1)), block) * 1e3
    small = inputs(128, 768, jnp.bfloat16)      # 25 MB; a stripe is too large for L1
    bag = jax.jit(kernel_bag)
    gather = TOKENS * READS * 768 * 2 / median_ms(bag, *small[:3]) * 1e3
    print(f'copy {copy / 1e12:.2f} TB/s, rows gathered from L2 {gather / 1e12:.2f} TB/s')
    return copy, gather


def report(name, target, run, arguments, floor_ms, peers):
    """One row of the table."""
    took = median_ms(run, *arguments)
    ratios = []
    for peer, function in peers.items():
        try:
            ratios.append(f'{peer} {median_ms(function, *arguments, runs=3) / took:.1f}x')
        except Exception as error:      # a peer that runs out of memory must not end the run
            ratios.append(f'{peer} failed ({type(error).__name__})')
    goal = f'{target:.2f}' if target else '-'
    print(f'| {name} | {took:.3f} | {goal} | {floor_ms:.3f} | {took / floor_ms:.1f} | '
          f'{", ".join(ratios) or "-"} |', flush=True)


def read_floor(values, slots, copy, gather, passes):
    """Milliseconds: rows touched over memory, or all reads from L2, the longer for each pass."""
    distinct = len(np.unique(np.asarray(slots)))
    row = values.shape[1] * values.dtype.itemsize
    out = slots.shape[0] * row
    forward = max((distinct * row + out) / copy, slots.size * row / gather)
    written = {'forward': 0, 'dense': len(values), 'compact': min(len(values), slots.size)}[passes]
    backward = max(((distinct + written) * row + out) / copy, slots.size * row / gather)
    return (forward + (backward if passes != 'forward' else 0)) * 1e3


def retrieval_floor(n_keys):
    """Milliseconds of the forward pass's vector instructions at 64 a cycle and multiprocessor."""
    return TOKENS * HEADS * 2 * 45 * n_keys / (64 * 132 * 1.755e9) * 1e3


def time_everything():
    from pkm_jax.memory.kernels.gpu.retrieval_backward import query_and_codebook_gradients
    copy, gather = bandwidths()
    print('| operation, bfloat16 | ms | target | floor ms | over floor | peers, as multiples |')
    print('| --- | --- | --- | --- | --- | --- |')
    for n_keys, target in ((512, 0.45), (1024, 0.8)):
        arguments = queries(n_keys, jnp.bfloat16)
        report(f'retrieval forward {n_keys}²', target, retrieve(kernel_search),
               arguments, retrieval_floor(n_keys),
               {'jnp': retrieve(plain_search), **memory_peers.retrieval(TOP_K)})
    arguments = queries(512, jnp.bfloat16)
    _, slots = retrieve(kernel_search)(*arguments)
    backward = jax.jit(functools.partial(query_and_codebook_gradients, interpret=False))
    report('retrieval backward 512²', 0.6, backward, (*arguments[:2], slots, arguments[2]),
           3 * TOKENS * HEADS * 2 * 512 * 2 / copy * 1e3, {})
    report('retrieval forward and backward 512²', 0,
           retrieve_backward(kernel_search), arguments,
           retrieval_floor(512) + 3 * TOKENS * HEADS * 2 * 512 * 2 / copy * 1e3,
           {'jnp': retrieve_backward(plain_search)})
    for zipf in (False, True):
        ids = 'Zipf' if zipf else 'uniform'
        for n_keys, width, dtype, target, both in (
                (512, 768, jnp.bfloat16, 0.5, 1.2), (1024, 1024, jnp.bfloat16, 0, 2.3),
                (512, 768, jnp.float32, 0, 0)):
            arguments = inputs(n_keys, width, dtype, zipf=zipf)
            floor = functools.partial(read_floor, *arguments[:2], copy, gather)
            name = f'{n_keys}² × {width} {jnp.dtype(dtype).name}, {ids}'
            forward = jax.jit(lambda v, s, w, g: kernel_bag(v, s, w))
            plain = n_keys == 512 and not zipf
            report(f'read forward {name}', target, forward, arguments, floor('forward'),
                   {'jnp': jax.jit(lambda v, s, w, g: plain_bag(v, s, w)),
                    **memory_peers.read(backward=False)} if plain else {})
            report(f'read forward and backward, dense, {name}', both, read_dense(kernel_bag),
                   arguments, floor('dense'),
                   {'jnp': read_dense(plain_bag),
                    **memory_peers.read(backward=True)} if plain else {})
            if n_keys == 512 and not zipf:
                same = arguments[:1] + (jnp.full_like(arguments[1], 7),) + arguments[2:]
                report(f'read forward and backward, dense, {n_keys}² × {width} '
                       f'{jnp.dtype(dtype).name}, one slot', 0, read_dense(kernel_bag), same,
                       floor('dense'), {})
            del arguments
        for tokens, target in ((TOKENS, 3.3), (2048, 0.6)):
            arguments = inputs(2048, 1024, jnp.bfloat16, tokens, zipf)
            report(f'read forward and backward, compact, 2048² × 1024, T = {tokens}, {ids}',
                   target, read_compact, arguments,
                   read_floor(*arguments[:2], copy, gather, 'compact'), {})
            del arguments
    time_layer()


def time_layer():
    config = layer.MemoryConfig(sub_keys=512, query_width=2 * HALF)
    module = layer.ProductKeyMemory(config, 768, dtype=jnp.bfloat16, rngs=layer.nnx.Rngs(0))
    graph, parameters, rest = layer.nnx.split(module, layer.nnx.Param, ...)
    parameters = jax.tree.map(lambda x: x.astype(jnp.bfloat16), parameters)
    states = jax.random.normal(jax.random.key(0), (TOKENS, 768), jnp.bfloat16)
    run = whole_layer((graph, rest))
    took = median_ms(run, parameters, states, states)
    print(f'| whole layer forward and backward 512² × 768 | {took:.3f} | 2.80 | | | |')


def relative(got, want):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def check_retrieval(dtype):
    """Errors of scores and gradients relative to float64, and whether ten runs are the same."""
    query, codebooks, gradient = queries(512, dtype)
    search = functools.partial(kernel_search, k=TOP_K)
    (scores, slots), pull = jax.jit(lambda q, c: jax.vjp(search, q, c))(query, codebooks)
    zero = np.zeros(slots.shape, jax.dtypes.float0)
    run = jax.jit(lambda g: pull((g, zero)))
    by_query, by_codebook = run(gradient)
    q, c = np.asarray(query[:64], np.float64), np.asarray(codebooks, np.float64)
    sub = np.einsum('thpd,hpnd->thpn', q, c)
    full = (sub[:, :, 0, :, None] + sub[:, :, 1, None, :]).reshape(64, HEADS, -1)
    best = -np.sort(-np.partition(full, -TOP_K)[..., -TOP_K:])
    chosen = np.take_along_axis(full, np.asarray(slots[:64]), axis=-1)
    i, ds = np.asarray(slots[:, 0]) // 512, np.asarray(gradient[:, 0], np.float64)
    spread = np.zeros((TOKENS, 512))
    np.add.at(spread, (np.arange(TOKENS)[:, None], i), ds)
    errors = {
        'scores': relative(scores[:64], best), 'scores of the slots': relative(chosen, best),
        'query gradient': relative(by_query[:, 0, 0], spread @ c[0, 0]),
        'codebook gradient': relative(
            by_codebook[0, 0], spread.T @ np.asarray(query[:, 0, 0], np.float64)),
    }
    return errors, all(_same(run(gradient), (by_query, by_codebook)) for _ in range(10))


def check_read(dtype, zipf):
    values, slots, weights, gradient = inputs(512, 768, dtype, zipf=zipf)
    run = read_dense(kernel_bag)
    out, (by_value, by_weight) = run(values, slots, weights, gradient)
    ids, w = np.asarray(slots), np.asarray(weights, np.float64)
    rows = np.asarray(values[slots[:64]], np.float64)
    g = np.asarray(gradient, np.float64)
    busiest = np.argsort(np.bincount(ids.ravel()))[-4:]
    some = np.unique(np.concatenate([ids[0], busiest]))
    spread = np.stack([np.sum(np.where(ids == slot, w, 0), axis=1) for slot in some])
    compact, _ = jax.jit(kernel_compact)(values, slots, weights, gradient)
    where = np.flatnonzero(np.isin(compact.ids, some))
    errors = {
        'sums': relative(out[:64], np.einsum('tr,trv->tv', w[:64], rows)),
        'dense gradient': relative(by_value[some], spread @ g),
        'compact gradient': relative(compact.rows[where], spread @ g),
        'weight gradient': relative(by_weight[:64], np.einsum('tv,trv->tr', g[:64], rows)),
        'rows without a read': float(jnp.sum(jnp.abs(by_value)) != jnp.sum(jnp.abs(
            jnp.where(jnp.zeros(len(values), bool).at[slots].set(True)[:, None], by_value, 0)))),
        'distinct slots': abs(int(compact.count[0]) - len(np.unique(ids))),
    }
    again = (run(values, slots, weights, gradient)[1] for _ in range(10))
    return errors, all(_same(one, (by_value, by_weight)) for one in again)


def _same(a, b):
    return all(bool(jnp.array_equal(x, y)) for x, y in zip(a, b))


def check_everything() -> bool:
    print('\n| correctness against float64 | errors | ten runs equal bit for bit |\n'
          '| --- | --- | --- |')
    good = True
    for name, check, arguments in (
            ('retrieval', check_retrieval, ()), ('read, uniform', check_read, (False,)),
            ('read, Zipf', check_read, (True,))):
        for dtype in ('bfloat16', 'float32'):
            errors, same = check(jnp.dtype(dtype), *arguments)
            good &= same and all(error <= LIMITS[dtype] for error in errors.values())
            text = ', '.join(f'{key} {error:.1e}' for key, error in errors.items())
            print(f'| {name} {dtype} | {text} | {same} |', flush=True)
    return good


def main():
    if jax.default_backend() != 'gpu':
        sys.exit(f'These kernels run on a GPU; this is {jax.devices()[0]}.')
    print(f'{jax.devices()[0].device_kind}, jax {jax.__version__}, {memory_peers.version()}; '
          f'T = {TOKENS}, H = {HEADS}, K = {TOP_K}, Q = {2 * HALF}')
    time_everything()
    if not check_everything():
        sys.exit('An error is above its limit, or runs differ: see the table above.')


if __name__ == '__main__':
    main()

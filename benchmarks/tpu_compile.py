"""The memory's kernels for TPUs, compiled by the TPU's compiler, beside their floors; not run.

    python -m benchmarks.tpu_compile [--chips=v4,v5e,v5p,v6e,tpu7x] [--dtypes=bfloat16,float32]

Needs the TPU compiler (pip install 'jax[tpu]'), no TPU; minutes. For each kernel and size what it
moves and computes for 16,384 tokens of 4 heads: bytes between HBM and the chip, copies that it
starts itself, floating-point operations of the matrix unit (six for one in float32) and vector
instructions of 8 × 128 numbers, the latter two counted from the kernel as it is traced. Then by
chip the longest of the three at peak rates, in milliseconds, and whether that is bytes (b), matrix
unit (m) or vector unit (v). Copies have no published rate, but one that is started in less than two
nanoseconds is not to be expected: they bound the read before its bytes do. Exits 1 if the compiler
refuses a kernel.
"""

import functools
import itertools
import math
import sys
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import app, flags, logging
from jax.sharding import SingleDeviceSharding

from benchmarks import tpu_sparsecore
from benchmarks.jaxprs import equations, inner_of
from benchmarks.tpu_sparsecore import HEADS, SLOTS, TOKENS, TOP_K, WIDTHS, device
from pkm_jax import accelerators
from pkm_jax.memory.kernels.tpu import (
    embedding_bag,
    embedding_bag_backward,
    embedding_bag_forward,
    own_reads,
    retrieval,
)
from pkm_jax.optimizers import rules, tpu_few_rows, tpu_rows
from pkm_jax.training.start import uncached

CHIPS = flags.DEFINE_list('chips', ['v4', 'v5e', 'v5p', 'v6e', 'tpu7x'],
                          'See pkm_jax.accelerators.')
DTYPES = flags.DEFINE_list('dtypes', ['bfloat16', 'float32'], 'Of values, queries and codebooks.')

HALF = 256          # numbers of half a query
OWNERS = 16         # of rows, of reads that are packed
SORTED_TOKENS = 128     # as compiled: of so many tokens the compiler has the sorts done in seconds
KEYS = 128, 512, 1024, 2048
UPDATES = {'SGD': rules.sgd_rule(), 'lazy Adam': rules.lazy_adam_rule(.9, .999, 1e-6),
           'rowwise Adam': rules.rowwise_adam_rule(.9, .999, 1e-6),
           'rowwise Adagrad': rules.rowwise_adagrad_rule(1e-6)}
UPDATED_WIDTHS = 192, *WIDTHS       # the first is kept column after column
UPDATED = SLOTS // 16               # rows that the updates are compiled for: all of the larger
#                                     tables would not fit a v5e
# Vector instructions of a core per second, and cores. The clock follows from the peak rate and the
# size of the matrix units; two a cycle on v4 (Jouppi et al. 2023), four on later ones, for which no
# number is published (jax-ml.github.io/scaling-book has four for v5p). Of tpu7x nothing is.
VECTOR = {'v4': (2 * 1.05e9, 2), 'v5e': (4 * 1.5e9, 1), 'v5p': (4 * 1.75e9, 2),
          'v6e': (4 * 1.75e9, 1)}
# What takes no vector instruction, or is no arithmetic.
FREE = ('broadcast_in_dim', 'reshape', 'iota', 'get', 'swap', 'slice', 'squeeze', 'concatenate',
        'bitcast_convert_type', 'dot_general', 'multiple_of')


class Case(NamedTuple):
    """A kernel at one size. Iterations are those of loops that data ends, the outermost first."""
    name: str
    sizes: str
    run: Any
    arguments: tuple
    compiled: tuple     # the arguments that it is compiled for
    bytes: float
    copies: float = 0.
    iterations: tuple[int, ...] = ()
    cores: int = 2      # that share the work, where a chip has two


def cases(dtype: jnp.dtype) -> list[Case]:
    """Every kernel at every size."""
    return [case for size in itertools.product(WIDTHS, TOP_K) for case in reads(dtype, *size)] + [
        case for size in itertools.product(KEYS, TOP_K) for case in searches(dtype, *size)] + [
        case for size in itertools.product(UPDATED_WIDTHS, UPDATES)
        for case in updates(dtype, *size)]


def reads(dtype: jnp.dtype, width: int, k: int) -> list[Case]:
    """The read and its gradients, dense and compact, of HEADS · k slots, no two the same."""
    per_token, size = HEADS * k, dtype.itemsize
    all_reads, row = TOKENS * per_token, width * size
    touched = min(SLOTS, all_reads)

    def arguments(tokens):
        shapes = ((SLOTS, width), dtype), ((tokens, per_token), jnp.int32), (
            (tokens, per_token), jnp.float32), ((tokens, width), dtype)
        return tuple(jax.ShapeDtypeStruct(*shape) for shape in shapes)

    few = arguments(SORTED_TOKENS)
    sizes = f'V = {width}, K = {k}'
    forward = Case('read', sizes, functools.partial(embedding_bag.forward, interpret=False),
                   arguments(TOKENS)[:3], few[:3], all_reads * (row + 8) + TOKENS * (row + 4),
                   all_reads, (per_token,))
    # Reads of a chunk; rows that get zeros, of which there are none here; sums that leave.
    chunk = min(embedding_bag_backward.CHUNK, all_reads)
    loops = chunk, *6 * (0,), embedding_bag_backward.LEAVING
    gradients = [Case(
        name, sizes, functools.partial(run, interpret=False), arguments(TOKENS), few,
        all_reads * (row + 20) + touched * row + out * width * item,
        all_reads + touched * 2, loops, cores=1)
        for name, run, out, item in (
            ('its gradient, dense', embedding_bag.backward, SLOTS, size),
            ('its gradient, compact', embedding_bag_backward.compact_gradients, touched, 4))]
    return [forward, *gradients, *_own_gradients(few, arguments(TOKENS), sizes, loops)]


def _own_gradients(few, whole, sizes, loops):
    """Of one in OWNERS of these reads: the gradients of the rows, packed, and of the weights."""
    values, slots, _, gradient = whole
    own, row = slots.size // OWNERS, values.shape[1] * values.dtype.itemsize
    packed = slots.size // own_reads.BLOCK * own_reads.window_size(OWNERS)
    written, counts = min(SLOTS, own), jax.ShapeDtypeStruct((TOKENS,), jnp.int32)
    few_counts = jax.ShapeDtypeStruct(few[1].shape[:1], jnp.int32)
    rows = functools.partial(embedding_bag_backward.own_row_gradients, n_slots=SLOTS, owners=OWNERS,
                             interpret=False)
    products = functools.partial(embedding_bag_forward.weight_gradients, owners=OWNERS,
                                 interpret=False)
    return [
        Case(f'of one of {OWNERS} owners: gradient of the rows', sizes, rows, whole[1:], few[1:],
             own * row + SLOTS * values.shape[1] * 4 + packed * 12, own + written, loops, cores=1),
        Case(f'of one of {OWNERS} owners: that of the weights', sizes, products,
             (values, slots, counts, gradient), (few[0], few[1], few_counts, few[3]),
             (own + TOKENS) * row + slots.size * 8, own, (slots.shape[1] // OWNERS,))]


def searches(dtype: jnp.dtype, n_keys: int, k: int) -> list[Case]:
    """The retrieval and its gradients."""
    size, chosen = dtype.itemsize, TOKENS * HEADS * k
    queries, codebooks = (jax.ShapeDtypeStruct(shape, dtype) for shape in (
        (TOKENS, HEADS, 2, HALF), (HEADS, 2, n_keys, HALF)))
    slots, by_slot = (jax.ShapeDtypeStruct((TOKENS, HEADS, k), kind)
                      for kind in (jnp.int32, jnp.float32))
    sizes, tiles = f'N = {n_keys}, K = {k}', TOKENS // 1024
    forward = functools.partial(retrieval.forward, k=k, interpret=False)
    backward = functools.partial(retrieval.backward, k=k, interpret=False)
    two, four = (queries, codebooks), (queries, codebooks, slots, by_slot)
    return [
        Case('retrieval', sizes, forward, two, two,
             queries.size * size + tiles * codebooks.size * size + 8 * chosen),
        Case('its gradients', sizes, backward, four, four,
             2 * queries.size * size + codebooks.size * (size + 4) + 16 * chosen)]


def updates(dtype: jnp.dtype, width: int, optimizer: str) -> list[Case]:
    """The update of a table, all rows of which have a place, or, of whole pieces, one in 16."""
    rule = UPDATES[optimizer]
    wide, by_row = rule.per_row.count(False), rule.per_row.count(True)
    run = functools.partial(tpu_rows.update, rule=rule, interpret=False)

    def arguments(slots, share):
        rows, table = (slots // share,), (slots, width)
        shapes = (rows, jnp.int32), ((2,), jnp.int32), ((3,), jnp.float32), ((2,), jnp.uint32), (
            (*rows, width), jnp.float32), (rows, jnp.float32), (table, dtype), *(
                ((slots,) if one else table, jnp.float32) for one in rule.per_row)
        return tuple(jax.ShapeDtypeStruct(*shape) for shape in shapes)

    sizes, places = f'V = {width}', SLOTS // 16
    # Read and written: the table and its moments; read: gradient, ids, mean squares; norms written.
    found = [Case(f'update, {optimizer}', sizes, run, arguments(SLOTS, 1), arguments(UPDATED, 1),
                  SLOTS * (width * (4 + 2 * (dtype.itemsize + 4 * wide)) + 12 + 8 * by_row))]
    if width % accelerators.LANES == 0:
        tile = tpu_few_rows.tile_of(places, width)
        found.append(Case(
            f'update of one row in 16, {optimizer}', sizes, run, arguments(SLOTS, 16),
            arguments(UPDATED, 16), places * (width * 4 * (3 + 2 * wide) + 4 + 4 * by_row),
            2 * places * (1 + wide), 5 * (tile,), cores=1))
    return found


def counted(case: Case) -> tuple[float, float]:
    """Floating-point operations of the matrix unit, and vector instructions, of all programs."""
    jaxpr = jax.make_jaxpr(case.run)(*case.arguments)
    kernel, *_ = [eqn for eqn in equations(jaxpr.jaxpr) if eqn.primitive.name == 'pallas_call'
                  and eqn.params['name'] not in ('as_rows', 'as_table')]     # which copy alone
    flops, vectors = _operations(kernel.params['jaxpr'], list(case.iterations))
    programs = math.prod(kernel.params['grid_mapping'].grid)
    return flops * programs, vectors * programs


def _operations(jaxpr, iterations):
    """The same of one program; of a branch its longest side. `iterations` are used up."""
    flops = vectors = 0.
    for eqn in jaxpr.eqns:
        name, out = eqn.primitive.name, eqn.outvars[0].aval if eqn.outvars else None
        if name == 'dot_general':
            (along, _), _ = eqn.params['dimension_numbers']
            a = eqn.invars[0].aval
            passes = 6 if a.dtype == jnp.float32 else 1
            flops += 2 * passes * math.prod(out.shape) * math.prod(a.shape[i] for i in along)
        elif name in ('scan', 'while'):
            times = (eqn.params['length'] if name == 'scan' else iterations.pop(0))
            body = eqn.params['jaxpr' if name == 'scan' else 'body_jaxpr'].jaxpr
            inner = _operations(body, iterations)
            flops, vectors = flops + times * inner[0], vectors + times * inner[1]
        elif inner_of(eqn):
            sides = [_operations(inner, iterations) for inner in inner_of(eqn)]
            flops, vectors = flops + max(s[0] for s in sides), vectors + max(s[1] for s in sides)
        elif name not in FREE:
            vectors += max((_registers(var.aval) for var in [*eqn.invars, *eqn.outvars]), default=0)
    return flops, vectors


def _registers(aval):
    """Of an array on the chip; none for scalars and references."""
    shape = getattr(aval, 'shape', ())
    if len(shape) < 2 or 'Ref' in type(aval).__name__:
        return 0
    *leading, height, breadth = shape
    return math.prod(leading) * math.ceil(height / 8) * math.ceil(breadth / 128)


def floor(case: Case, chip: str, flops: float, vectors: float) -> str:
    """Milliseconds at peak rates, and what takes them."""
    peaks = accelerators.CHIPS[chip]
    times = {'b': case.bytes / peaks.bandwidth, 'm': flops / peaks.flops}
    if chip in VECTOR:
        rate, cores = VECTOR[chip]
        times['v'] = vectors / (rate * min(cores, case.cores))
    longest = max(times, key=times.__getitem__)
    return f'{times[longest] * 1e3:.2f} {longest}'


def compile_seconds(case: Case, chip: str) -> float:
    """The time that the compiler takes for the kernel on one chip."""
    whole = SingleDeviceSharding(device(chip))
    arguments = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=whole) for a in case.compiled]
    with uncached():
        start = time.perf_counter()
        jax.jit(case.run, out_shardings=whole).lower(*arguments).compile()
        return time.perf_counter() - start


def main(_):
    logging.set_verbosity(logging.WARNING)
    jax.config.update('jax_platforms', 'cpu')
    refused, found = 0, {}
    print(f'jax {jax.__version__}\n\n| kernel | sizes | dtype | MB | million copies | GFLOP | '
          f'million vector instructions | {" | ".join(CHIPS.value)} |\n'
          f'{"| --- " * (7 + len(CHIPS.value))}|')
    for name in DTYPES.value:
        for case in cases(jnp.dtype(name)):
            flops, vectors = counted(case)
            found[case.name, case.sizes, name] = case.bytes
            cells = [case.name, case.sizes, name, f'{case.bytes / 1e6:,.0f}',
                     f'{case.copies / 1e6:.1f}', f'{flops / 1e9:,.0f}', f'{vectors / 1e6:,.1f}']
            for chip in CHIPS.value:
                try:
                    compile_seconds(case, chip)
                    cells.append(floor(case, chip, flops, vectors))
                except jax.errors.JaxRuntimeError as error:
                    refused += 1
                    cells.append(f'refused: {str(error).splitlines()[0][:80]}')
            print(f'| {" | ".join(cells)} |', flush=True)
    print()
    refused += tpu_sparsecore.table([chip for chip in CHIPS.value if chip in tpu_sparsecore.CHIPS],
                                    DTYPES.value, found)
    sys.exit(bool(refused))


if __name__ == '__main__':
    app.run(main)

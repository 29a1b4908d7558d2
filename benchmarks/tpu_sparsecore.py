"""The read on SparseCores and its compact gradient, compiled by the TPU's compiler, beside their
floors; not run.

`benchmarks.tpu_compile` prints this table: of 16,384 tokens of 4 heads the bytes
between HBM and the chip, without and with those of tables in bfloat16 that are copied as words.
Then by chip the kernel's bytes at the peak rate, in milliseconds, and how many vector
instructions a subcore would have to issue in a nanosecond to take no longer: their rate is not
published. Counted from the kernel as it is traced; loads and stores are not in it, nor are the
sorts by slot that a gradient needs here and on the TensorCore.
"""

import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.jaxprs import equations
from pkm_jax import accelerators
from pkm_jax.memory.kernels.tpu import (
    own_reads,
    sparsecore,
    sparsecore_backward,
    sparsecore_forward,
)
from pkm_jax.planning import chips
from pkm_jax.training.start import uncached

TOKENS, HEADS, SLOTS = 16_384, 4, 2 ** 18
WIDTHS, TOP_K = (384, 768, 1024, 4096), (8, 32)
CHIPS = 'v5p', 'v6e', 'tpu7x'


class Case(NamedTuple):
    """A kernel at one size: what takes its `arguments` and a chip, and what it moves."""
    name: str
    sizes: str
    run: Callable[..., Any]
    arguments: tuple[jax.ShapeDtypeStruct, ...]
    bytes: int
    copied: int         # bytes of tables, and of the copies of them as words
    vectors: int        # numbers of words that are worked on


def read(width: int, k: int, dtype: jnp.dtype) -> Case:
    """The read of HEADS · k rows for every token: bytes of rows, slots, weights and sums."""
    reads, per_token = TOKENS * HEADS * k, (TOKENS, HEADS * k)
    values, *_ = arguments = _arrays(
        ((SLOTS, width), dtype), (per_token, jnp.int32), (per_token, jnp.float32),
        ((TOKENS,), jnp.int32))
    words = sparsecore.words_of(values)
    return Case('read', f'V = {width}, K = {k}', sparsecore_forward.sum_rows, arguments,
                4 * (reads * (words + 2) + TOKENS * words * sparsecore.halves(values)),
                _copied(values), reads * words)


def gradient(width: int, k: int, dtype: jnp.dtype) -> Case:
    """The compact gradient of as many sorted reads: bytes of output gradients, of five numbers for
    each read, of value rows, of the rows that are written, and of their numbers."""
    reads = TOKENS * HEADS * k
    rows = min(SLOTS, reads)
    values, by_token, *lists = _arrays(
        ((SLOTS, width), dtype), ((TOKENS, width), dtype), ((reads,), jnp.int32),
        ((reads,), jnp.int32), ((reads,), jnp.float32), ((reads,), jnp.int32), ((rows,), bool))
    words = sparsecore.words_of(values)

    def run(values, by_token, slots, order, weights, place, used, chip, interpret):
        return sparsecore_backward.sum_by_slot(
            own_reads.Reads(slots, order, weights), place, used, SLOTS, by_token, HEADS * k, values,
            chip=chip, interpret=interpret)

    return Case('its gradient, compact', f'V = {width}, K = {k}', run, (values, by_token, *lists),
                4 * (reads * (words + 5) + rows * (words + width + 1)),
                _copied(values) + _copied(by_token), reads * words)


def _arrays(*shapes):
    return tuple(jax.ShapeDtypeStruct(*shape) for shape in shapes)


def _copied(table):
    """Bytes of a table and of its copy as words."""
    if table.dtype == jnp.float32:
        return 0
    return len(table) * (table.shape[1] * table.dtype.itemsize + sparsecore.words_of(table) * 4)


class Compiled(NamedTuple):
    """What is known of a kernel on one chip."""
    chip: sparsecore.Chip
    program: jax.stages.Compiled
    instructions: int   # of vectors, of all subcores


def device(name: str) -> jax.Device:
    """One of a chip, to compile for."""
    shape = 'x'.join(['1'] * accelerators.CHIPS[name].dimensions)
    return chips.devices(chips.parse(f'{name}:{shape}'))[0]


def compiled(case: Case, name: str) -> Compiled:
    """The kernel for one chip, as the TPU's compiler takes it."""
    mesh = Mesh(np.array([device(name)]), ('chip',))
    with uncached(), jax.set_mesh(mesh):
        chip = sparsecore.chip()
        assert chip, f'{name} has no SparseCores'
        run = functools.partial(case.run, chip=chip, interpret=False)
        arguments = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, P()))
                     for a in case.arguments]
        traced = jax.jit(run).trace(*arguments)
        return Compiled(chip, traced.lower().compile(),
                        instructions(traced.jaxpr.jaxpr, case, chip))


def instructions(jaxpr: jax.extend.core.Jaxpr, case: Case, chip: sparsecore.Chip) -> int:
    """Arithmetic on vectors: that of the loop over a full part's words, as often as it runs. It has
    the most products, and of parts that are not full another loop chooses numbers besides."""
    counted = [_arithmetic(eqn.params['jaxpr']) for eqn in equations(jaxpr)
               if eqn.primitive.name == 'parallel_loop']
    _, full = max(counted, key=lambda loop: (loop[0], -loop[1]))
    return case.vectors * full // chip.lanes ** 2


def _arithmetic(loop):
    """Of vectors: products, and all there is."""
    names = [eqn.primitive.name for eqn in equations(loop)
             if eqn.outvars and getattr(eqn.outvars[0].aval, 'ndim', 0) == 1]
    return names.count('mul'), sum(map(names.count, (
        'add', 'mul', 'and', 'shift_left', 'select_n')))


def table(
    names: list[str], dtypes: list[str], tensorcore: Mapping[tuple[str, str, str], float],
) -> int:
    """Prints it, with the bytes of the TensorCore's kernels by name, sizes and dtype; how many
    kernels the compiler refused."""
    refused = 0
    print(f'| kernel | sizes | dtype | MB | MB, TensorCore | MB of copies | {" | ".join(names)} |\n'
          f'{"| --- " * (6 + len(names))}|')
    for make, dtype, width, k in itertools.product((read, gradient), dtypes, WIDTHS, TOP_K):
        case = make(width, k, jnp.dtype(dtype))
        cells = [case.name, case.sizes, dtype, *(f'{number / 1e6:,.0f}' for number in (
            case.bytes, tensorcore[case.name, case.sizes, dtype], case.copied))]
        for name in names:
            try:
                cells.append(floor(case, name, compiled(case, name)))
            except jax.errors.JaxRuntimeError as error:
                refused += 1
                cells.append(f'refused: {str(error).splitlines()[0][:80]}')
        print(f'| {" | ".join(cells)} |', flush=True)
    return refused


def floor(case: Case, name: str, found: Compiled) -> str:
    """Milliseconds of its bytes at the peak rate, and the instructions a nanosecond of a subcore
    that would take as long."""
    seconds = case.bytes / accelerators.CHIPS[name].bandwidth
    each = found.instructions / (found.chip.cores * found.chip.subcores)
    return f'{seconds * 1e3:.2f}, {each / seconds / 1e9:.1f}'


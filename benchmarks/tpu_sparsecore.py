"""The read on SparseCores, compiled by the TPU's compiler, beside its floors; not run.

`benchmarks.tpu_compile` prints this table: of 16,384 tokens of 4 heads the bytes
between HBM and the chip, without and with those of a table in bfloat16 that is copied as words, and
the streams. Then by chip the kernel's bytes at the peak rate, in milliseconds, and how many vector
instructions a subcore would have to issue in a nanosecond to take no longer: their rate is not
published. Counted from the kernel as it is traced; loads and stores are not in it.
"""

import functools
import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.jaxprs import equations
from pkm_jax import accelerators
from pkm_jax.memory.kernels.tpu import sparsecore, sparsecore_forward
from pkm_jax.planning import chips

TOKENS, HEADS, SLOTS = 16_384, 4, 2 ** 18
WIDTHS, TOP_K = (384, 768, 1024, 4096), (8, 32)
CHIPS = 'v5p', 'v6e', 'tpu7x'


class Read(NamedTuple):
    """A read of HEADS · k rows for every token."""
    width: int
    k: int
    dtype: jnp.dtype

    @property
    def arguments(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        reads = TOKENS, HEADS * self.k
        return tuple(jax.ShapeDtypeStruct(*one) for one in (
            ((SLOTS, self.width), self.dtype), (reads, jnp.int32), (reads, jnp.float32),
            ((TOKENS,), jnp.int32)))

    @property
    def bytes(self) -> int:
        """Of rows, slots, weights and sums."""
        words = sparsecore.words_of(self.arguments[0])
        return 4 * TOKENS * (HEADS * self.k * (words + 2)
                             + words * sparsecore.halves(self.arguments[0]))

    @property
    def copied(self) -> int:
        """Of the table and of its copy as words."""
        if self.dtype == jnp.float32:
            return 0
        return SLOTS * (self.width * self.dtype.itemsize
                        + sparsecore.words_of(self.arguments[0]) * 4)


class Compiled(NamedTuple):
    """What is known of a read on one chip."""
    chip: sparsecore.Chip
    program: jax.stages.Compiled
    instructions: int   # of vectors, of all subcores


def device(name: str) -> jax.Device:
    """One of a chip, to compile for."""
    shape = 'x'.join(['1'] * accelerators.CHIPS[name].dimensions)
    return chips.devices(chips.parse(f'{name}:{shape}'))[0]


def compiled(read: Read, name: str) -> Compiled:
    """The kernel for one chip, as the TPU's compiler takes it."""
    mesh = Mesh(np.array([device(name)]), ('chip',))
    with jax.set_mesh(mesh):
        chip = sparsecore.chip()
        assert chip, f'{name} has no SparseCores'
        run = functools.partial(sparsecore_forward.sum_rows, chip=chip, interpret=False)
        arguments = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, P()))
                     for a in read.arguments]
        traced = jax.jit(run).trace(*arguments)
        return Compiled(chip, traced.lower().compile(),
                        instructions(traced.jaxpr.jaxpr, read, chip))


def instructions(jaxpr: jax.extend.core.Jaxpr, read: Read, chip: sparsecore.Chip) -> int:
    """Arithmetic on vectors: that of the loop over a full part's words, as often as it runs."""
    loops = [eqn.params['jaxpr'] for eqn in equations(jaxpr)
             if eqn.primitive.name == 'parallel_loop']
    full = max(map(_arithmetic, (loop for loop in loops if not any(
        eqn.primitive.name == 'select_n' for eqn in loop.eqns))))
    parts = TOKENS * math.ceil(HEADS * read.k / chip.lanes)
    return parts * sparsecore.words_of(read.arguments[0]) // chip.lanes * full


def _arithmetic(loop):
    return sum(eqn.primitive.name in ('add', 'mul', 'and', 'shift_left')
               and eqn.outvars[0].aval.ndim == 1 for eqn in loop.eqns)


def table(names: list[str], dtypes: list[str]) -> int:
    """Prints it; how many kernels the compiler refused."""
    refused = 0
    print(f'| sizes | dtype | MB | MB of the copy | {" | ".join(names)} |\n'
          f'{"| --- " * (4 + len(names))}|')
    for dtype, width, k in itertools.product(dtypes, WIDTHS, TOP_K):
        read = Read(width, k, jnp.dtype(dtype))
        cells = [f'V = {width}, K = {k}', dtype, f'{read.bytes / 1e6:,.0f}',
                 f'{read.copied / 1e6:,.0f}']
        for name in names:
            try:
                cells.append(floor(read, name, compiled(read, name)))
            except jax.errors.JaxRuntimeError as error:
                refused += 1
                cells.append(f'refused: {str(error).splitlines()[0][:80]}')
        print(f'| {" | ".join(cells)} |', flush=True)
    return refused


def floor(read: Read, name: str, found: Compiled) -> str:
    """Milliseconds of its bytes at the peak rate, and the instructions a nanosecond of a subcore
    that would take as long."""
    seconds = read.bytes / accelerators.CHIPS[name].bandwidth
    each = found.instructions / (found.chip.cores * found.chip.subcores)
    return f'{seconds * 1e3:.2f}, {each / seconds / 1e9:.1f}'


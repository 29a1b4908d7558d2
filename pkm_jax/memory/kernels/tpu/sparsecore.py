"""How kernels run on the SparseCores of a TPU (v5p, v6e, TPU7x), and how they see a table there.

Rows are words of 32 bits, as indirect copies want them. Pallas has no interpreter of a SparseCore:
interpreted, a subcore is a step of a grid, and an indirect copy as many copies of a row.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import ShapeDtypeStruct
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Shaped

from pkm_jax.accelerators import LANES
from pkm_jax.console import warn_once
from pkm_jax.memory.kernels.settings import is_on
from pkm_jax.memory.kernels.tpu.rows import Interpret

SETTING = 'PKM_JAX_SPARSECORE'      # of the environment; '1': SparseCores read, where there are any
MOST_BYTES = 2 ** 34    # of one array, says the compiler
NO_READ = -1        # an index that is not read
SHARE = 7 / 8       # of a subcore's memory that a kernel uses


class Chip(NamedTuple):
    """The SparseCores of a device."""
    cores: int
    subcores: int       # vector subcores of each
    lanes: int          # numbers of 32 bits in a vector, a power of two
    memory: int         # bytes of a vector subcore


INTERPRETED = Chip(cores=1, subcores=2, lanes=8, memory=2 ** 18)


def chosen(interpret: Interpret) -> Chip | None:
    """The SparseCores that are to read; None: the TensorCore is to. That a device has none of those
    that SETTING asks for is logged once.

    Raises:
      Refusal: SETTING is neither '1' nor '0'.
    """
    if not is_on(SETTING, 'SparseCores read', 'the TensorCore'):
        return None
    found = INTERPRETED if interpret else chip()
    if found is None:
        warn_once(__name__, '%s=1: this device has no SparseCores; the TensorCore reads.', SETTING)
    return found


def chip() -> Chip | None:
    """Of the device that is compiled for, that of the mesh in use or else of this process; None if
    it has no SparseCores."""
    from jax.experimental.pallas import tpu_sc
    try:
        info = tpu_sc.get_sparse_core_info()
    except (RuntimeError, ValueError):      # a TPU without them; no TPU
        return None
    return Chip(info.num_cores, info.num_subcores, info.num_lanes, info.vmem_capacity_bytes)


def on_subcores(
    body: Callable[..., None], chip: Chip, out: ShapeDtypeStruct | list[ShapeDtypeStruct],
    scratch: list, cost: pl.CostEstimate, interpret: Interpret, name: str,
) -> Callable[..., Any]:
    """The kernel in which every vector subcore calls `body(number, subcores, *refs)`."""
    number = chip.cores * chip.subcores
    if interpret:
        whole = pl.BlockSpec(memory_space=pl.ANY)
        return lambda *arrays: pl.pallas_call(
            lambda *refs: body(pl.program_id(0), number, *refs), grid=(number,), out_shape=out,
            in_specs=[whole] * len(arrays), out_specs=jax.tree.map(lambda _: whole, out),
            scratch_shapes=scratch,
            interpret=interpret, name=name)(*arrays)
    from jax.experimental.pallas import tpu_sc

    def on_one(*refs):
        core, subcore = jax.lax.axis_index('core'), jax.lax.axis_index('subcore')
        body(core * chip.subcores + subcore, number, *refs)

    # The passes that lay vectors out cannot take words of one kind as such of another.
    return pl.kernel(
        on_one, out_type=out, scratch_types=scratch, cost_estimate=cost, name=name,
        compiler_params=pltpu.CompilerParams(needs_layout_passes=False),
        mesh=tpu_sc.VectorSubcoreMesh(core_axis_name='core', subcore_axis_name='subcore'))


class Rows(NamedTuple):
    """An indirect copy between `local` and the rows of `table` [S, words] that `number` indices
    name, from `start` on; of each the same columns, and of NO_READ none, whose place in `local`
    stays as it is. It comes from the table, or it leaves for it."""
    table: Any
    indices: Any
    start: Any
    columns: Any
    local: Any
    arrived: Any
    number: int
    interpret: Interpret
    leaves: bool = False

    def begin(self) -> None:
        """Starts it."""
        self._each(lambda copy: copy.start())

    def wait(self) -> None:
        """Until it has been made."""
        self._each(lambda copy: copy.wait())

    def _each(self, act):
        if not self.interpret:
            from jax.experimental.pallas import tpu_sc
            which = tpu_sc.Indices(self.indices.at[pl.ds(self.start, self.number)],
                                   ignored_value=NO_READ)
            return act(self._copy(self.table.at[which, self.columns], self.local))

        def on_row(row, __):
            index = self.indices[self.start + row]

            @pl.when(index != NO_READ)
            def _():
                act(self._copy(self.table.at[index, self.columns], self.local.at[row]))

        return jax.lax.fori_loop(0, self.number, on_row, None)

    def _copy(self, rows, local):
        source, target = (local, rows) if self.leaves else (rows, local)
        return pltpu.make_async_copy(source, target, self.arrived)


def leaving(source: Any, target: Any, semaphore: Any, interpret: Interpret) -> Any:
    """A copy from a subcore's memory to HBM, not started. Since jax 0.12 compiled ones must have no
    semaphore: a wait for one of them is for all of the subcore's."""
    counted = interpret or jax.__version_info__ < (0, 12)
    return pltpu.make_async_copy(source, target, semaphore if counted else None)


def over_vectors(width: int, chip: Chip, interpret: Interpret) -> Callable:
    """A decorator that calls a function with the start of every vector of so many numbers; the
    compiler may let the calls overlap."""
    if interpret:
        return pl.loop(0, width, step=chip.lanes)
    from jax.experimental.pallas import tpu_sc
    return tpu_sc.parallel_loop(0, width, chip.lanes)


def fold_vectors(
    width: int, chip: Chip, interpret: Interpret, step: Callable[[Any, Any], Any], start: Any,
) -> Any:
    """`start` after `step(column, carry)` for every vector, as `over_vectors` has them."""
    if interpret:
        return jax.lax.fori_loop(
            0, width // chip.lanes, lambda n, carry: step(n * chip.lanes, carry), start)
    from jax.experimental.pallas import tpu_sc
    return tpu_sc.parallel_loop(0, width, chip.lanes, carry=start)(step)


def halves(values: Shaped[Array, 'S V'] | ShapeDtypeStruct) -> int:
    """Numbers in a word."""
    return 4 // values.dtype.itemsize


def words_of(values: Shaped[Array, 'S V'] | ShapeDtypeStruct) -> int:
    """Words of a row, a multiple of LANES."""
    return -(-values.shape[1] // (halves(values) * LANES)) * LANES


def too_large(*arrays: tuple[int, int]) -> str | None:
    """Why arrays of so many rows of so many words are none for the SparseCores; None if they
    are."""
    return next((f'{rows} rows of {4 * words} bytes (SparseCores reach {MOST_BYTES} of an array)'
                 for rows, words in arrays if 4 * rows * words > MOST_BYTES), None)


def as_words(values: Float[Array, 'S V']) -> Shaped[Array, 'S words']:
    """The table with rows of words. Those of float32 are its numbers; in bfloat16 word c has column
    c in its lower bits and column c + words in its upper ones, so that a row has no more bytes than
    before, but the whole table is copied."""
    words = words_of(values)
    if halves(values) == 1:
        return _filled(values, words)
    low, high = (jax.lax.bitcast_convert_type(_filled(half, words), jnp.uint16).astype(jnp.uint32)
                 for half in (values[:, :words], values[:, words:]))
    return jax.lax.bitcast_convert_type(low | high << 16, jnp.int32)


def _filled(columns, width):
    return jnp.pad(columns, ((0, 0), (0, width - columns.shape[1])))


def widened(words: Shaped[Array, '...']) -> list[Float[Array, '...']]:
    """The numbers of words in float32, an array for each half."""
    if words.dtype == jnp.float32:
        return [words]
    return [jax.lax.bitcast_convert_type(bits, jnp.float32)
            for bits in (words << 16, words & jnp.int32(-65_536))]

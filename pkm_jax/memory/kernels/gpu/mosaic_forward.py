"""Weighted sum of value rows on an NVIDIA GPU since Hopper (Pallas, Mosaic GPU).

What `embedding_bag_forward` does, with its bytes and floor, by bulk copies: each warp of a program
sums the reads of one token, within a stripe of columns. It starts a copy of every row's part into
shared memory, some reads ahead, and needs no registers for what is on its way.
"""

import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int32

from pkm_jax.memory.kernels.gpu.mosaic import (
    BY_WARP,
    WARPS,
    RowCopies,
    as_columns,
    load,
    no_parts,
    own,
    store,
)

STRIPE_BYTES = 512      # of one row in one stripe, at most
STAGES = 4
ROWS_A_STAGE = 8


def sum_rows(
    values: Float[Array, 'S V'], slots: Int32[Array, 'T R'], weights: Float[Array, 'T R'], *,
    stripe_bytes: int = STRIPE_BYTES, stages: int = STAGES, rows: int = ROWS_A_STAGE,
    interpret: bool,
) -> Float[Array, 'T V']:
    """Σ_r weights[t, r] · values[slots[t, r]], summed in float32, in the dtype of `values`.

    V must be a multiple of 128, T at least 4; slots must lie in [0, S).
    """
    (tokens, reads), (_, width) = slots.shape, values.shape
    columns = math.gcd(width, stripe_bytes // values.dtype.itemsize)
    rows = math.gcd(reads, rows)
    steps = reads // rows
    copies = RowCopies(1 << min(stages, steps).bit_length() - 1, rows, columns, values.dtype,
                       interpret)
    groups = pl.cdiv(tokens, WARPS)

    def read_rows(values, slots, weights, out, slots_here, weights_here, held, barriers, arrived):
        # The last group of tokens overlaps the one before, and writes the same.
        token = jnp.minimum(jax.lax.axis_index('group') * WARPS, tokens - WARPS)
        stripe = pl.ds(pl.multiple_of(jax.lax.axis_index('stripe') * columns, columns), columns)
        copies.begin(barriers)
        for array, here in ((slots, slots_here), (weights, weights_here)):
            plgpu.copy_gmem_to_smem(array.at[pl.ds(token, WARPS)], here, arrived,
                                    oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS)
        plgpu.barrier_wait(arrived)
        always = plgpu.layout_cast(jnp.ones(WARPS, jnp.int32), BY_WARP)
        warp = plgpu.broadcasted_iota(jnp.int32, (WARPS,), 0, layout=BY_WARP)

        def start(step):
            copies.start(step, held, barriers, [
                (values.at[:, stripe],
                 own(slots_here, step * rows + row, interpret=interpret), always, 0)
                for row in range(rows)])

        def add_rows(step, totals):
            stage = copies.wait(step, barriers)
            for row in range(rows):
                weight = own(weights_here, step * rows + row, interpret=interpret)
                totals = [total + as_columns(weight, part) * part for total, part in zip(
                    totals, load(held.at[stage, row], interpret=interpret))]

            @pl.when(step + copies.stages < steps)
            def _():
                start(step + copies.stages)
            return totals

        for step in range(copies.stages):
            start(jnp.int32(step))
        totals = jax.lax.fori_loop(0, steps, add_rows, no_parts(columns, values.dtype))
        store(out.at[pl.ds(token, WARPS), stripe], totals, warp, always, interpret=interpret)

    return plgpu.kernel(
        read_rows, out_type=jax.ShapeDtypeStruct((tokens, width), values.dtype),
        grid=(width // columns, groups), grid_names=('stripe', 'group'),
        scratch_types=[plgpu.SMEM((WARPS, reads), jnp.int32),
                       plgpu.SMEM((WARPS, reads), jnp.float32),
                       *copies.scratch, plgpu.Barrier(num_arrivals=2)],
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )(values, slots, weights.astype(jnp.float32))

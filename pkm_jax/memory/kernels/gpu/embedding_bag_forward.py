"""Weighted sum of value rows on an NVIDIA GPU (Pallas, Triton backend).

Bytes: every read fetches its row once, T·R·V·itemsize (3.2 GB at T = 16,384, R = 128, V = 768 in
bfloat16), most of it from L2; slots and weights are read once a stripe. Operations: 2·T·R·V,
negligible. Floor: the rows touched over the memory bandwidth, or all reads over the L2 bandwidth
(9 TB/s measured on an H200), whichever takes longer.

The grid runs over tokens first and stripes of columns second, so that at any time the whole chip
reads from one stripe of the table, and most of that stripe stays in L2. Within a program the rows
of one step are on their way while those of the step before are summed.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int32

from pkm_jax.memory.kernels.gpu.pairs import join, multiply_add, pack, parts_of, unpack
from pkm_jax.ops.gpu import call

STRIPE_BYTES = 256      # of one row in one stripe
ROWS_IN_FLIGHT = 4


def sum_rows(
    values: Float[Array, 'S V'], slots: Int32[Array, 'T R'], weights: Float[Array, 'T R'], *,
    interpret: bool,
) -> Float[Array, 'T V']:
    """Σ_r weights[t, r] · values[slots[t, r]], summed in float32, in the dtype of `values`.

    V must be a multiple of 128; slots must lie in [0, S).
    """
    tokens, reads = slots.shape
    width = values.shape[1]
    columns = STRIPE_BYTES // values.dtype.itemsize
    rows = math.gcd(reads, ROWS_IN_FLIGHT)
    out, = call(functools.partial(_kernel, rows=rows, columns=columns, interpret=interpret),
                'read_rows',
                (tokens, width // columns), [jax.ShapeDtypeStruct((tokens, width), values.dtype)],
                values, slots, weights, interpret=interpret)
    return out


def _kernel(values, slots, weights, out, *, rows, columns, interpret):
    token, stripe = pl.program_id(0), pl.ds(pl.program_id(1) * columns, columns)
    steps = slots.shape[1] // rows

    def slots_of(step):
        return slots[token, pl.ds(jnp.minimum(step, steps - 1) * rows, rows)]

    def fetch(slots):
        return pack(values[slots, stripe])

    def add_rows(step, carry):
        totals, following, tile = carry
        weight = weights[token, pl.ds(step * rows, rows)].astype(jnp.float32)
        upcoming, after_next = fetch(following), slots_of(step + 2)
        totals = [multiply_add(weight[:, None], part, total, interpret=interpret)
                  for part, total in zip(unpack(tile), totals)]
        return totals, after_next, upcoming

    parts = parts_of(values.dtype)
    zeros = [jnp.zeros((rows, columns // parts), jnp.float32)] * parts
    totals = jax.lax.fori_loop(0, steps, add_rows, (zeros, slots_of(1), fetch(slots_of(0))))[0]
    out[token, stripe] = join([jnp.sum(total, axis=0).astype(out.dtype) for total in totals])

"""The streaming pass of the gradients on an NVIDIA GPU since Hopper (Pallas, Mosaic GPU).

What `_stream` in `embedding_bag_backward` does, with its bytes and floor and the same order of
sums: each warp of a program streams over one chunk of the sorted reads. Bulk copies bring the
output gradient of every read, and the value row of every segment, into shared memory some reads
ahead, so that registers hold sums and one value row alone. The four warps go through their chunks
step by step together; what only one of them does at a step, it does in a branch of its own.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int32

from pkm_jax.memory.kernels.gpu import mosaic_lanes as lanes
from pkm_jax.memory.kernels.gpu.embedding_bag_backward import is_cut
from pkm_jax.memory.kernels.gpu.mosaic import (
    BY_WARP,
    REF,
    WARPS,
    RowCopies,
    as_columns,
    finish,
    inline,
    load,
    no_parts,
    renew,
    store_numbers,
)

STAGES = 2      # steps on their way,
READS = 2       # of so many reads each
KEEP = .5       # share of the gradients that L2 is asked to keep
CHUNK = 128     # sorted reads of one warp, and the longest segment that is not cut


def stream(
    values: Float[Array, 'S V'], gradient: Float[Array, 'T V'], weights: Float[Array, 'T R'],
    order: Int32[Array, 'reads'], slot: Int32[Array, 'reads'], cut: Int32[Array, 'chunks_1'],
    rows_before: Int32[Array, 'chunks_1'] | None, n_rows: int, *, stages: int = STAGES,
    ahead: int = READS, keep: float = KEEP, chunk: int = CHUNK, interpret: bool,
) -> tuple[Int32[Array, '{n_rows}'], Float[Array, '{n_rows} V'], Float[Array, 'reads'],
           Float[Array, 'chunks 2 V']]:
    """Slot of each gradient row (S: none, and the row not set), the rows, the weights' gradients by
    read, and the partial sums of segments that a chunk's head and tail cut.

    Chunk n has the sorted reads from `cut[n]` to `cut[n + 1]`, at most 2·`chunk` of them.
    """
    (tokens, width), n_slots, reads = gradient.shape, len(values), slot.size
    chunks = len(cut) - 1
    groups, longest = pl.cdiv(chunks, WARPS), 2 * chunk
    copies = RowCopies(stages, 2 * ahead, width, values.dtype, interpret)
    by_chunk = _by_chunk(slot, cut, rows_before, groups)
    steps = jnp.max(by_chunk[:, 1], axis=1)
    compact = rows_before is not None

    row_slots = jax.new_ref(jnp.full((n_rows,), n_slots, jnp.int32))

    def read_backward(values, gradient, weights, order, slot, by_chunk, steps, rows, by_read,
                      pieces, plan, scale, chunk_plan, held_rows, barriers, arrived):
        group = jax.lax.axis_index('group')
        copies.begin(barriers)
        plgpu.copy_gmem_to_smem(by_chunk.at[group], chunk_plan, arrived,
                                oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS)
        plgpu.barrier_wait(arrived)
        first, length, head_cut, tail_cut, first_row, head_piece, tail_piece = (
            plgpu.load(chunk_plan.at[n], layout=BY_WARP) for n in range(7))
        _fill(order, slot, weights, plan, scale, first, length, interpret=interpret)
        last = (steps[group] + ahead - 1) // ahead

        def at_read(at):
            """The read, its slot, and whether a segment starts with it."""
            return (plgpu.load(plan.at[n, at], layout=BY_WARP) for n in range(3))

        def start(step):
            wanted = []
            for n in range(ahead):
                read, here, new = at_read(step * ahead + n)
                always = plgpu.layout_cast(jnp.ones(WARPS, jnp.int32), BY_WARP)
                wanted += [(gradient, jax.lax.div(read, reads // tokens), always, keep),
                           (values, here, new, 0)]
            copies.start(step, held_rows, barriers, wanted)

        def write(here, totals, row, is_piece, piece, want):
            """A segment's sum into its row, or the part of a cut one into the pieces."""
            finish(rows, pieces, row_slots, totals, number=here, row=row if compact else here,
                   piece=piece, is_piece=is_piece, want=want, interpret=interpret)

        def add_read(at, stage, copy, carry):
            totals, value, before, row, in_head = carry
            read, here, new = at_read(at)
            ends = new * jnp.minimum(at, 1)
            write(before, totals, row, in_head, head_piece, ends)
            row, in_head = row + ends, in_head * (1 - ends)
            totals, value = renew(totals, value, held_rows.at[stage, copy + 1], new,
                                  interpret=interpret)
            g = load(held_rows.at[stage, copy], interpret=interpret)
            inner = jnp.sum(sum(part * other for part, other in zip(g, value)), axis=1)
            store_numbers(by_read, inner, read, _positive(length - at), interpret=interpret)
            weight = plgpu.load(scale.at[at], layout=BY_WARP)
            totals = [total + as_columns(weight, part) * part for total, part in zip(totals, g)]
            return totals, value, here, row, in_head

        def step(number, carry):
            stage = copies.wait(number, barriers)
            for n in range(ahead):
                carry = add_read(number * ahead + n, stage, 2 * n, carry)

            @pl.when(number + stages < last)
            def _():
                start(number + stages)
            return carry

        for number in range(stages):
            @pl.when(number < last)
            def _(number=number):
                start(jnp.int32(number))
        zeros = no_parts(width, values.dtype)
        totals, _, here, row, in_head = jax.lax.fori_loop(
            0, last, step, (zeros, zeros, length * 0, first_row, head_cut))
        write(here, totals, row, jnp.maximum(in_head, tail_cut), tail_piece - in_head,
              _positive(length))

    like = jax.ShapeDtypeStruct
    rows, by_read, pieces = plgpu.kernel(
        read_backward,
        out_type=[like((n_rows, width), values.dtype), like((reads,), jnp.float32),
                  like((groups * WARPS * 2, width), jnp.float32)],
        grid=(groups,), grid_names=('group',),
        scratch_types=[plgpu.SMEM((3, longest, WARPS), jnp.int32),
                       plgpu.SMEM((longest, WARPS), jnp.float32),
                       plgpu.SMEM((7, WARPS), jnp.int32), *copies.scratch,
                       plgpu.Barrier()],
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )(values, gradient, weights.reshape(-1).astype(jnp.float32), order, slot, by_chunk, steps)
    return row_slots[...], rows, by_read, pieces.reshape(-1, 2, width)[:chunks]


def _positive(number):
    """1 where a number is, else 0."""
    return jnp.minimum(jnp.maximum(number, 0), 1)


def _by_chunk(slot, cut, rows_before, groups):
    """[groups, 7, 4]: first read, length, whether head and tail are cut, first row, and the pieces
    of head and tail of every warp's chunk."""
    chunks = jnp.arange(groups * WARPS)
    cut = jnp.pad(cut, (0, len(chunks) + 1 - len(cut)), mode='edge')
    first, last = cut[:-1], cut[1:]
    head_cut = is_cut(slot, first)
    row = 0 * first if rows_before is None else (
        jnp.pad(rows_before[:-1], (0, len(first) - len(rows_before) + 1))
        - head_cut.astype(jnp.int32))
    parts = first, last - first, head_cut, is_cut(slot, last), row, 2 * chunks, 2 * chunks + 1
    return jnp.stack([part.astype(jnp.int32).reshape(groups, WARPS) for part in parts], axis=1)


def _fill(order, slot, weights, plan, scale, first, length, *, interpret):
    """What each warp does at each step: plan [3, steps, 4], the read, its slot, and whether a
    segment starts with it, with the last read again where a chunk has no more; scale [steps, 4],
    its weight, then 0."""
    if not interpret:
        inline(functools.partial(lanes.fill_of_warp, scale.shape[0], slot.shape[0]),
               (REF,) * 5 + (BY_WARP,) * 2, order, slot, weights, plan, scale, first, length)
        return
    step = jnp.arange(scale.shape[0], dtype=jnp.int32)
    for warp in range(WARPS):
        end = first[warp] + length[warp]
        at = jnp.clip(jnp.minimum(first[warp] + step, end - 1), 0, slot.shape[0] - 1)
        inside = step < length[warp]
        read, here, before = order[...][at], slot[...][at], slot[...][jnp.maximum(at - 1, 0)]
        plan[0, :, warp], plan[1, :, warp] = read, here
        plan[2, :, warp] = (inside & ((step == 0) | (here != before))).astype(jnp.int32)
        scale[:, warp] = jnp.where(inside, weights[...][read], 0)

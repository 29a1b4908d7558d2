"""Exact top-K over N² slots and its gradients on an NVIDIA Hopper GPU (Pallas, Mosaic GPU).

What `retrieval_forward` and `retrieval_backward` do, with their operations and floors. A warpgroup
works for 128 tokens, each thread for one of them. In the forward pass scores of a block of sub-keys
come from the matrix unit and lie in shared memory, of which each thread takes those of its token
into its registers. Where a program is interpreted, what threads do is done by operations of Pallas.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import ShapeDtypeStruct
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from pkm_jax.memory.kernels import networks
from pkm_jax.memory.kernels.gpu import mosaic_threads as threads
from pkm_jax.memory.kernels.gpu.backend import BLOCK, ROW, TOKENS
from pkm_jax.memory.kernels.gpu.mosaic import NUMBER, REF, inline

BY_THREAD = plgpu.Layout.WG_STRIDED((TOKENS,), vec_size=1)
LISTS = jnp.float32, jnp.int32      # scores and indices


def best_slots(
    query: Float[Array, 'T H 2 half'], codebooks: Float[Array, 'H 2 N half'], k: int, *,
    interpret: bool,
) -> tuple[Float[Array, 'T H {k}'], Int32[Array, 'T H {k}']]:
    """The k best of the N² slots of every head, in descending order of score.

    N must be a multiple of 64, the dtype bfloat16.
    """
    whole = _padded(query, -len(query) % 8)     # tiles of tokens that the matrix unit takes
    best, sub_keys = _best_sub_keys(whole, codebooks, k, interpret)
    found = _best_pairs(best, sub_keys, codebooks.shape[2], k, interpret)
    scores, slots = (jnp.moveaxis(array[..., :len(query)], -1, 0) for array in found)
    return scores, slots


def _best_sub_keys(query, codebooks, k, interpret):
    """Scores and indices [H, 2, size ≥ k, T] of the best sub-keys of each half, descending."""
    tokens, heads, _, half = query.shape
    n_keys = codebooks.shape[2]
    size = pl.next_power_of_2(k)

    def best_sub_keys(query, codebooks, best, sub_keys, queries, keys, scores, arrived, filled):
        head, part, first = (*map(jax.lax.axis_index, ('head', 'part')), _first_token(tokens))

        def fetch(block):
            plgpu.copy_gmem_to_smem(
                codebooks.at[head, part, pl.ds(block * BLOCK, BLOCK)], keys, filled)

        def multiply(product):
            plgpu.wgmma(product, keys, queries.T)
            return product[...]

        def add_block(block, lists):
            plgpu.barrier_wait(filled)
            product = pl.run_scoped(multiply, plgpu.ACC((BLOCK, TOKENS), jnp.float32))
            _share(product, scores, interpret)

            @pl.when(block + 1 < n_keys // BLOCK)
            def _():    # all warps are through with these keys: they waited for each other's scores
                fetch(block + 1)

            def add_part(number, lists):
                row = number * size
                return _add_to_lists(scores, row, block * BLOCK + row, lists, interpret)

            return jax.lax.fori_loop(0, BLOCK // size, add_part, lists)

        fetch(0)
        plgpu.copy_gmem_to_smem(query.at[pl.ds(first, TOKENS), head, part], queries, arrived)
        plgpu.barrier_wait(arrived)
        nothing = [plgpu.layout_cast(jnp.full(TOKENS, value, kind), BY_THREAD)
                   for value, kind in zip((-jnp.inf, 0), LISTS) for _ in range(size)]
        lists = jax.lax.fori_loop(0, n_keys // BLOCK, add_block, nothing)
        _store_lists(first, best.at[head, part], sub_keys.at[head, part], lists, interpret)

    tile = functools.partial(plgpu.SMEM, dtype=query.dtype, transforms=_transforms(half))
    out = [ShapeDtypeStruct((heads, 2, size, tokens), kind) for kind in LISTS]
    scratch = [tile((TOKENS, half)), tile((BLOCK, half)), plgpu.SMEM((BLOCK, ROW), jnp.float32),
               plgpu.Barrier(), plgpu.Barrier()]
    return _call(best_sub_keys, out, {'part': 2, 'head': heads}, tokens, interpret, query,
                 codebooks, scratch=scratch)


def _share(product, scores, interpret):
    """Scores [BLOCK, TOKENS] as the matrix unit leaves them, to where all threads can see them."""
    if interpret:
        scores[:, pl.ds(0, TOKENS)] = product
    else:
        inline(threads.share, (plgpu.Layout.WGMMA, REF), product, scores)


def _add_to_lists(scores, first, index, lists, interpret):
    """The best of lists (all scores, all indices) and the scores of so many rows from `first` on,
    the first of which has that index."""
    size = len(lists) // 2
    if not interpret:
        like = tuple(plgpu.ShapeDtypeStruct((TOKENS,), kind, layout=BY_THREAD)
                     for kind in LISTS for _ in range(size))
        return list(inline(functools.partial(threads.add_to_lists, size),
                           (REF, NUMBER, NUMBER, *(BY_THREAD,) * 2 * size),
                           scores, first, index, *lists, returns=like))
    new = networks.sort([(scores[first + row, pl.ds(0, TOKENS)],
                          jnp.full(TOKENS, index + row, jnp.int32)) for row in range(size)])
    best = networks.best_of_two(list(zip(lists[:size], lists[size:])), new)
    return [number for part in zip(*best) for number in part]


def _store_lists(first, scores, indices, lists, interpret):
    """Lists (all scores, all indices) to the columns of TOKENS tokens."""
    if not interpret:
        inline(threads.store_lists, (NUMBER, REF, REF, *(BY_THREAD,) * len(lists)),
               first, scores, indices, *lists)
        return
    size = len(lists) // 2
    for rank in range(size):
        at = rank, pl.ds(first, TOKENS)
        scores[at], indices[at] = lists[rank], lists[size + rank]


def _best_pairs(best, sub_keys, n_keys, k, interpret):
    """Scores and slots [H, k, T] of the k best sums of the two lists of every token and head."""
    heads, _, _, tokens = best.shape

    def best_pairs(best, sub_keys, scores, slots):
        head, first = jax.lax.axis_index('head'), _first_token(tokens)
        refs = best.at[head], sub_keys.at[head], scores.at[head], slots.at[head]
        if not interpret:
            inline(functools.partial(threads.best_pairs, n_keys, k), (NUMBER, *(REF,) * 4),
                   first, *refs)
            return
        halves = [[tuple(ref[head, part, rank, pl.ds(first, TOKENS)] for ref in (best, sub_keys))
                   for rank in range(k)] for part in range(2)]
        sums = networks.best_sums(k, lambda i, j: (
            halves[0][i][0] + halves[1][j][0], halves[0][i][1] * n_keys + halves[1][j][1]))
        _store_lists(first, *refs[2:], [number for part in zip(*sums) for number in part], True)

    return _call(best_pairs, [ShapeDtypeStruct((heads, k, tokens), kind) for kind in LISTS],
                 {'head': heads}, tokens, interpret, best, sub_keys)


def spread(
    slots: Int32[Array, 'T H k'], gradient: Float[Array, 'T H k'], n_keys: int, dtype: DTypeLike, *,
    interpret: bool,
) -> Float[Array, 'H 2 T N']:
    """Gradient of every sub-key score: sums over the chosen slots of a sub-key, in float32, over
    zeros that are in L2."""
    asked, slots, gradient = len(slots), _padded(slots), _padded(gradient.astype(jnp.float32))
    tokens, heads, _ = slots.shape

    def spread_score_gradients(slots, gradient, by_key):
        head, part, first = (*map(jax.lax.axis_index, ('head', 'part')), _first_token(tokens))
        _spread(part, first, slots.at[:, head], gradient.at[:, head], by_key.at[head, part],
                interpret)

    by_key, = _call(spread_score_gradients, [ShapeDtypeStruct((heads, 2, tokens, n_keys), dtype)],
                    {'part': 2, 'head': heads}, tokens, interpret, slots, gradient)
    return by_key[:, :, :asked]


def _spread(part, first, slots, gradient, by_key, interpret):
    """Of TOKENS tokens, one head and one half."""
    n_keys = by_key.shape[1]
    if not interpret:
        inline(functools.partial(threads.spread, n_keys), (NUMBER, NUMBER, REF, REF, REF),
               part, first, slots, gradient, by_key)
        return
    at = pl.ds(first, TOKENS)
    slot, number = slots[at], gradient[at]
    key = jnp.where(part == 0, slot // n_keys, slot % n_keys)
    chosen = key[:, :, None] == jnp.arange(n_keys)[None, None]
    by_key[at] = jnp.sum(jnp.where(chosen, number[:, :, None], 0), 1).astype(by_key.dtype)


def _call(
    kernel: Callable, out: Sequence[ShapeDtypeStruct], grid: dict[str, int], tokens: int,
    interpret: bool, *arguments: Array, scratch: Sequence[Any] = (),
) -> Sequence[Array]:
    """A kernel over these axes and, the last one, over tiles of tokens."""
    grid = grid | {'tile': pl.cdiv(tokens, TOKENS)}
    return plgpu.kernel(
        kernel, out_type=out, grid=tuple(grid.values()), grid_names=tuple(grid),
        scratch_types=scratch, interpret=plgpu.InterpretGPUParams() if interpret else None,
    )(*arguments)


def _padded(by_token, more=0):
    """With so many more tokens, of zeros, and at least those of a program."""
    more = max(more, TOKENS - len(by_token))
    return jnp.pad(by_token, ((0, more), *((0, 0),) * (by_token.ndim - 1))) if more else by_token


def _first_token(tokens):
    """Of this program; the last tile overlaps the one before and writes the same."""
    return jnp.minimum(jax.lax.axis_index('tile') * TOKENS, tokens - TOKENS)


def _transforms(half):
    """How rows of so many bfloat16 numbers lie, so that the matrix unit can take them."""
    swizzle = min(2 * half, 128)
    return plgpu.TilingTransform((8, swizzle // 2)), plgpu.SwizzleTransform(swizzle)

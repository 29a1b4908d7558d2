"""Exact top-K over N² slots on an NVIDIA GPU (Pallas, Triton backend), in two kernels.

1. `_best_sub_keys`: a program scores a tile of tokens of one head and half against one block of
   sub-keys after the other, and keeps the K best of every token: each thread holds one token's
   list, sorts the new block by a network in its registers, and merges it in. Scores never reach
   memory.
2. `_best_pairs`: each thread holds one (token, head) with its two descending lists and merges the
   sorted lists that the candidate pairs (i·j ≤ K, 119 for K = 32) form anyway.

Operations: for each token, head and half 2·N·half on the matrix unit and about 45·N vector
instructions (K = 32); bytes: queries and codebooks once, 2·8·T·H·K for the lists between the two
kernels and 8·T·H·K for the result. Floor: the vector instructions (T = 16,384, H = 4, N = 512:
3·10⁹, 0.2 ms at the 64 a cycle that comparisons and selections run at).

Exact: scores are sums of the same float32 dot products as the reference's. Results are
deterministic; which of several slots of the same score comes first, or is kept, is unspecified.
Whatever the scores, infinite or NaN, a token's slots are different ones.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int32

from pkm_jax.memory.kernels import networks
from pkm_jax.ops.gpu import call
from pkm_jax.ops.gpu import triton as plt

TOKENS = 128        # of one program: one a thread
MATRIX_COLUMNS = 16     # the fewest that the matrix unit takes


def best_slots(
    query: Float[Array, 'T H 2 half'], codebooks: Float[Array, 'H 2 N half'], k: int, *,
    interpret: bool,
) -> tuple[Float[Array, 'T H {k}'], Int32[Array, 'T H {k}']]:
    """The k best of the N² slots of every head, in descending order of score."""
    best, sub_keys = _best_sub_keys(query, codebooks, k, interpret)
    return _best_pairs(best, sub_keys, codebooks.shape[2], k, interpret)


def _best_sub_keys(query, codebooks, k, interpret):
    """Scores and indices [T, H, 2, size ≥ k] of the best sub-keys of each half, descending."""
    tokens, heads, _, half = query.shape
    n_keys = codebooks.shape[2]
    size = pl.next_power_of_2(k)
    block = max(size, MATRIX_COLUMNS)
    float32 = query.dtype == jnp.float32
    depth = MATRIX_COLUMNS if float32 else half     # float32 operands stay in registers: few
    precision = jax.lax.Precision.HIGHEST if float32 else None

    def kernel(query, codebooks, best, sub_keys):
        head, part, at = pl.program_id(1), pl.program_id(2), _tokens(tokens)

        def add_block(b, best):
            def add_product(d, scores):
                inner = pl.ds(d * depth, depth)
                return scores + plt.dot(query[at, head, part, inner],
                                        codebooks[head, part, pl.ds(b * block, block), inner],
                                        trans_b=True, precision=precision)

            scores = jax.lax.fori_loop(0, half // depth, add_product,
                                       jnp.zeros((at.size, block), jnp.float32))
            new = networks.sort([(column, jnp.full(column.shape, b * block + i, jnp.int32))
                                 for i, column in enumerate(_columns(scores))])
            return networks.best_of_two(best, new[:size])

        nothing = jnp.full(at.size, -jnp.inf, jnp.float32), jnp.zeros(at.size, jnp.int32)
        lists = jax.lax.fori_loop(0, n_keys // block, add_block, [nothing] * size)
        best[at, head, part, :], sub_keys[at, head, part, :] = map(_tile, zip(*lists))

    shape = (tokens, heads, 2, size)
    return call(kernel, 'best_sub_keys', (pl.cdiv(tokens, _tile_size(tokens)), heads, 2),
                [jax.ShapeDtypeStruct(shape, jnp.float32), jax.ShapeDtypeStruct(shape, jnp.int32)],
                query, codebooks, warps=TOKENS // 32, interpret=interpret)


def _best_pairs(best, sub_keys, n_keys, k, interpret):
    """Scores and slots [T, H, k] of the k best sums of the two lists of every token and head."""
    tokens, heads, _, size = best.shape

    def kernel(best, sub_keys, scores, slots):
        head, at = pl.program_id(1), _tokens(tokens)
        halves = [list(zip(*(_columns(ref[at, head, part, :]) for ref in (best, sub_keys))))
                  for part in range(2)]
        sums = networks.best_sums(k, lambda i, j: (
            halves[0][i][0] + halves[1][j][0], halves[0][i][1] * n_keys + halves[1][j][1]))
        filler = sums[:1] * (size - k)
        scores[at, head, :], slots[at, head, :] = map(_tile, zip(*sums, *filler))

    shape = (tokens, heads, size)
    scores, slots = call(
        kernel, 'best_pairs', (pl.cdiv(tokens, _tile_size(tokens)), heads),
        [jax.ShapeDtypeStruct(shape, jnp.float32), jax.ShapeDtypeStruct(shape, jnp.int32)],
        best, sub_keys, warps=TOKENS // 32, interpret=interpret)
    return scores[..., :k], slots[..., :k]


def _tile_size(tokens):
    """Tokens of one program: a power of two, TOKENS unless there are fewer."""
    return min(TOKENS, 1 << tokens.bit_length() - 1)


def _tokens(tokens):
    """The tokens of this program; the last tile overlaps the one before and writes the same."""
    tile = _tile_size(tokens)
    return pl.ds(jnp.minimum(pl.program_id(0) * tile, tokens - tile), tile)


def _columns(tile):
    """The columns of a tile: one register a thread where each thread has a row of its own."""
    rows, columns = tile.shape
    return [tile.reshape(rows)] if columns == 1 else [
        column.reshape(rows) for column in jax.lax.split(tile, [1] * columns, axis=1)]


def _tile(columns):
    """A tile of a power of two of columns, by the two-operand stacks that the backend has."""
    tiles = list(columns)
    while len(tiles) > 1:
        half = len(tiles) // 2
        tiles = [jnp.stack(pair, axis=-1) for pair in zip(tiles[:half], tiles[half:])]
    return tiles[0].reshape(len(columns[0]), -1)

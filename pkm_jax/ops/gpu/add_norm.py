"""Dropout, residual sum and layer norm of a block in one pass on an NVIDIA GPU (Pallas, Triton).

Bytes, with D numbers of 2 bytes a token: forward reads the residual and the branch and writes the
sum and its norm, backward reads the sum and the norm's gradient and writes those of residual and
branch: 8·T·D each. XLA's own kernels for this took 4 to 5 times as long on an H200, since they pass
over the tokens once for each of the statistics, the mask, and the sums over tokens.

A program holds rows whole and has one warp, so that no sum over a row waits for another warp.
DRAWS rows take their masks from one block of Threefry, and one byte a column keeps them for the
backward pass: to draw them again would take as long as the rest of it.
"""

import functools

import jax
import jax.numpy as jnp
from jax import ShapeDtypeStruct
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int32, UInt8, UInt32

from pkm_jax.ops import gpu
from pkm_jax.ops.dropout import DRAWS, stays
from pkm_jax.ops.gpu import call, column_blocks

GROUPS = 4              # of DRAWS rows that a program of the backward pass sums over
ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


def unsupported(
    residual: ShapeDtypeStruct, branch: ShapeDtypeStruct, *_: ShapeDtypeStruct,
    rate: float, epsilon: float,
) -> str | None:
    """Why the kernel cannot do this branch; None if it can."""
    tokens, width = branch.shape
    if gpu.triton is None:
        return f'jax {jax.__version__}, which has no Triton backend'
    if width % 128 or width > 1024:
        return f'a width of {width} (a multiple of 128, up to 1024)'
    if tokens % DRAWS:
        return f'{tokens} tokens on a device (a multiple of {DRAWS})'
    return None


def forward(
    residual: Float[Array, 'T D'], branch: Float[Array, 'T D'], branch_bias: Float[Array, 'D'],
    scale: Float[Array, 'D'], bias: Float[Array, 'D'], words: UInt32[Array, '2'],
    part: Int32[Array, ''], *, rate: float, epsilon: float, interpret: bool,
) -> tuple[Float[Array, 'T D'], Float[Array, 'T D'], UInt8[Array, 'groups D']]:
    """The norm, the sum that it is of, and a bit for each row of a group that dropout keeps."""
    tokens, width = branch.shape
    kept = jax.ShapeDtypeStruct((tokens // DRAWS, width), jnp.uint8)
    normed, total, bits = call(
        functools.partial(_forward_kernel, blocks=column_blocks(width), rate=rate,
                          epsilon=epsilon),
        'add_norm', (tokens // DRAWS,), [branch, branch, kept],
        residual, branch, branch_bias, scale, bias, words,
        jnp.reshape(part * (tokens // DRAWS), 1), interpret=interpret)
    return normed, total, bits


def backward(
    gradient: Float[Array, 'T D'], total: Float[Array, 'T D'], kept: UInt8[Array, 'groups D'],
    residual: Float[Array, 'T D'], branch: Float[Array, 'T D'], branch_bias: Float[Array, 'D'],
    scale: Float[Array, 'D'], *_: Array, rate: float, epsilon: float, interpret: bool,
) -> tuple[Array, ...]:
    """Gradients of residual, branch, its bias, scale and bias; deterministic."""
    tokens, width = total.shape
    programs = pl.cdiv(tokens, DRAWS * GROUPS)
    by_residual, by_branch, sums = call(
        functools.partial(_backward_kernel, blocks=column_blocks(width), rate=rate,
                          epsilon=epsilon),
        'add_norm_backward', (programs,),
        [jax.ShapeDtypeStruct(total.shape, residual.dtype), total,
         jax.ShapeDtypeStruct((programs, 3, width), jnp.float32)],
        total, gradient, scale, kept, interpret=interpret)
    by_scale, by_bias, by_branch_bias = jnp.sum(sums, axis=0)
    return by_residual, by_branch, by_branch_bias, by_scale, by_bias


def _forward_kernel(residual, branch, branch_bias, scale, bias, words, first_group, out, total,
                    kept, *, blocks, rate, epsilon):
    group = pl.program_id(0)
    keep = [_keep(words, first_group, group, block, rate) for block in blocks]
    if rate:
        for block, masks in zip(blocks, keep):
            kept[group, block] = sum(mask.astype(jnp.uint8) << n for n, mask in enumerate(masks))
    for draw in range(DRAWS):
        row = group * DRAWS + draw
        parts = []
        for block, mask in zip(blocks, keep):
            part = branch[row, block].astype(jnp.float32) + branch_bias[block]
            part = part if not rate else jnp.where(mask[draw], part * (1 / (1 - rate)), 0)
            parts.append(part + residual[row, block].astype(jnp.float32))
        for block, part, normed in zip(blocks, parts, _normed(parts, epsilon)[0]):
            total[row, block] = part.astype(total.dtype)
            out[row, block] = (normed * scale[block] + bias[block]).astype(out.dtype)


def _backward_kernel(total, gradient, scale, kept, by_residual, by_branch, sums, *,
                     blocks, rate, epsilon):
    def add_group(group, held):
        masks = [kept[group, block] for block in blocks] if rate else []
        for draw in range(DRAWS):
            row = group * DRAWS + draw
            g = [gradient[row, block].astype(jnp.float32) for block in blocks]
            normed, inverse_std = _normed([total[row, block].astype(jnp.float32)
                                         for block in blocks], epsilon)
            scaled = [part * scale[block] for part, block in zip(g, blocks)]
            mean = _mean(scaled)
            projection = _mean([a * b for a, b in zip(scaled, normed)])
            new = []
            for n, block in enumerate(blocks):
                part = (scaled[n] - mean - normed[n] * projection) * inverse_std
                by_residual[row, block] = part.astype(by_residual.dtype)
                if rate:
                    part = jnp.where((masks[n] >> draw) & 1 == 1, part * (1 / (1 - rate)), 0)
                by_branch[row, block] = part.astype(by_branch.dtype)
                new += [g[n] * normed[n], g[n], part]
            held = [a + b for a, b in zip(held, new)]
        return held

    program = pl.program_id(0)
    held = [jnp.zeros(block.size, jnp.float32) for block in blocks for _ in range(3)]
    held = jax.lax.fori_loop(
        program * GROUPS, jnp.minimum((program + 1) * GROUPS, total.shape[0] // DRAWS),
        add_group, held)
    for n, part in enumerate(held):
        sums[program, n % 3, blocks[n // 3]] = part


def _normed(parts, epsilon):
    """A row, in parts, less its mean and over its standard deviation; and one over that."""
    mean = _mean(parts)
    centred = [part - mean for part in parts]
    inverse_std = jax.lax.rsqrt(_mean([part * part for part in centred]) + epsilon)
    return [part * inverse_std for part in centred], inverse_std


def _mean(parts):
    return sum(jnp.sum(part) for part in parts) / (len(parts) * parts[0].size)


def _keep(words, first_group, group, block, rate):
    """For each row of a group, which elements of a block dropout keeps; None without it."""
    if not rate:
        return None
    group = (first_group[0] + group).astype(jnp.uint32)
    columns = jnp.uint32(block.start) + jax.lax.iota(jnp.uint32, block.size)
    return stays(_threefry(words[0], words[1], group, columns), rate)


def _threefry(key0, key1, count0, count1):
    """Threefry-2x32 with 20 rounds (Salmon et al. 2011), for kernels, where jax.random's is not."""
    keys = (key0, key1, key0 ^ key1 ^ jnp.uint32(0x1BD11BDA))
    x0, x1 = jnp.full(count1.shape, count0 + key0), count1 + key1
    for i in range(5):
        for distance in ROTATIONS[i % 2]:
            x0 = x0 + x1
            x1 = ((x1 << distance) | (x1 >> (32 - distance))) ^ x0
        x0 = x0 + keys[(i + 1) % 3]
        x1 = x1 + keys[(i + 2) % 3] + jnp.uint32(i + 1)
    return x0, x1

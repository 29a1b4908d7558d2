"""What dropout, residual sum and layer norm take as one kernel, beside plain jnp and PyTorch.

    python -m benchmarks.add_norm

Forward and backward pass over 16,384 tokens in bfloat16, dropout 0.1. Prints the median of warm
runs, the floor (8 numbers a token and feature over the copy bandwidth), the ratio to it, and the
multiples that the reference and, where PyTorch is installed, its eager and compiled counterparts
take; then errors relative to float64 without dropout, and to the reference with it. Exits 1 if one
exceeds 1e-2, or if ten repeated backward passes are not equal bit for bit. Half a minute.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import memory, memory_peers
from pkm_jax.ops.add_norm import add_norm_of_part

TOKENS, RATE, EPSILON = 16384, 0.1, 1e-12
WORDS = jnp.array([1, 2], jnp.uint32)
LIMIT = 1e-2


def inputs(width):
    """Residual, branch, its bias, scale and bias of the norm, and the gradient of the result."""
    keys = jax.random.split(jax.random.key(width), 6)
    wide = [jax.random.normal(key, (TOKENS, width), jnp.bfloat16) for key in keys[:3]]
    flat = [jax.random.normal(key, (width,)) for key in keys[3:]]
    return *wide[:2], *flat, wide[2]


def forward_and_backward(implementation, rate):
    def run(*arguments):
        out, pull = jax.vjp(lambda *a: add_norm_of_part(*a, WORDS, jnp.int32(0), rate, EPSILON,
                                                        implementation), *arguments[:5])
        return out, *pull(arguments[5])
    return jax.jit(run)


def in_torch(residual, branch, branch_bias, scale, bias, gradient):
    from torch.autograd import grad
    from torch.nn import functional
    wanted = [x.requires_grad_() for x in (residual, branch, branch_bias, scale, bias)]
    total = residual + functional.dropout(branch + branch_bias.to(branch.dtype), RATE)
    out = functional.layer_norm(total.float(), total.shape[-1:], scale, bias, EPSILON)
    return grad(out.to(branch.dtype), wanted, gradient)


def in_float64(residual, branch, branch_bias, scale, bias, gradient):
    """Result and gradients, in the order of `forward_and_backward`, without dropout."""
    residual, branch, branch_bias, scale, bias, gradient = (
        np.asarray(x, np.float64) for x in (residual, branch, branch_bias, scale, bias, gradient))
    total = residual + branch + branch_bias
    deviation = np.sqrt(total.var(-1, keepdims=True) + EPSILON)
    normed = (total - total.mean(-1, keepdims=True)) / deviation
    scaled = gradient * scale
    by_total = (scaled - scaled.mean(-1, keepdims=True)
                - normed * (scaled * normed).mean(-1, keepdims=True)) / deviation
    return (normed * scale + bias, by_total, by_total, by_total.sum(0),
            (gradient * normed).sum(0), gradient.sum(0))


def check(width) -> bool:
    arguments, run = inputs(width), forward_and_backward('gpu', RATE)
    plain = forward_and_backward('gpu', 0.)(*arguments)
    errors = [memory.relative(*pair) for pair in zip(plain, in_float64(*arguments))]
    got = run(*arguments)
    errors += [memory.relative(*pair) for pair in zip(
        got, forward_and_backward('xla', RATE)(*arguments))]
    same = all(bool(jnp.array_equal(a, b)) for _ in range(10) for a, b in zip(run(*arguments), got))
    print(f'width {width}: greatest error {max(errors):.1e}, ten runs equal: {same}')
    return same and max(errors) <= LIMIT


def main():
    if jax.default_backend() != 'gpu':
        sys.exit(f'This kernel runs on a GPU; this is {jax.devices()[0]}.')
    print(f'{jax.devices()[0].device_kind}, jax {jax.__version__}, {memory_peers.version()}')
    copy, _ = memory.bandwidths()
    print('| operation, bfloat16 | ms | target | floor ms | over floor | peers, as multiples |')
    print('| --- | --- | --- | --- | --- | --- |')
    for width in (768, 1024):
        memory.report(f'add_norm forward and backward, {width}', 0,
                      forward_and_backward('gpu', RATE), inputs(width),
                      8 * 2 * TOKENS * width / copy * 1e3,
                      {'jnp': forward_and_backward('xla', RATE),
                       **memory_peers.eager_and_compiled(in_torch)})
    if not min(check(768), check(1024)):     # both, whatever the first says
        sys.exit('An error is above its limit, or runs differ: see above.')


if __name__ == '__main__':
    main()

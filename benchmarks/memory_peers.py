"""PyTorch's counterparts of the memory's operations, on copies of the same arrays, if installed."""

import types

import jax
import jax.numpy as jnp

try:
    import torch
except ImportError:
    torch = None


def version() -> str:
    return f'PyTorch {torch.__version__}' if torch else 'no PyTorch here'


def retrieval(k):
    """Eager and compiled search over all k² pairs of the best sub-keys, as the public code does."""
    def search(query, codebooks, _):
        n_keys = codebooks.shape[2]
        best, key = torch.einsum('thpd,hpnd->thpn', query, codebooks).topk(k)
        pairs = (best[:, :, 0, :, None] + best[:, :, 1, None, :]).flatten(2)
        slots = (key[:, :, 0, :, None] * n_keys + key[:, :, 1, None, :]).flatten(2)
        scores, at = pairs.topk(k)
        return scores, slots.gather(2, at)
    return eager_and_compiled(search)


def read(backward):
    """Eager and compiled `embedding_bag` (whose backward pass knows float32 only)."""
    def forward_only(values, slots, weights, _):
        return torch.nn.functional.embedding_bag(
            slots, values, per_sample_weights=weights.to(values.dtype), mode='sum')

    def with_backward(values, slots, weights, gradient):
        values, weights = values.requires_grad_(), weights.requires_grad_()
        out = forward_only(values, slots, weights, None)
        return out, *torch.autograd.grad(out, (values, weights), gradient)
    return eager_and_compiled(with_backward if backward else forward_only)


def eager_and_compiled(function):
    """{name: function of jax arrays} of a function of PyTorch tensors; {} without PyTorch."""
    if torch is None:
        return {}
    return {'PyTorch': _on_torch(function), 'compiled': _on_torch(torch.compile(function))}


def _on_torch(function):
    """Takes jax arrays, converts them once, and returns what `jax.block_until_ready` waits for."""
    held = {}

    def run(*arrays):
        if not held:
            held['arrays'] = [torch.from_dlpack(jax.block_until_ready(jnp.copy(array)))
                              for array in arrays]
        function(*held['arrays'])
        return types.SimpleNamespace(block_until_ready=torch.cuda.synchronize)
    return run

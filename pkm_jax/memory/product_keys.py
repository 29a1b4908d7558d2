"""Exact top-K over N² slots of a product-key memory (docs/method.md, section 1, steps 2, 3)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from pkm_jax.dispatch import Choice, Implementation, Kernel
from pkm_jax.refusal import Refusal


def rank_pairs(k: int) -> tuple[np.ndarray, np.ndarray]:
    """Rank pairs (i, j), 0-based, that can hold one of the `k` best sums of two descending lists.

    The sum at 1-based ranks (i, j) is at most any of the i·j sums at ranks no worse in both lists,
    so the k best can always be taken from the pairs with i·j ≤ k: 119 of 1,024 for k = 32.
    """
    i, j = np.indices((k, k)).reshape(2, -1) + 1
    possible = i * j <= k
    return i[possible] - 1, j[possible] - 1


def top_k_product_keys(
    query: Float[Array, 'T H 2 half'],
    codebooks: Float[Array, 'H 2 N half'],
    k: int,
    *,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, 'T H {k}'], Int32[Array, 'T H {k}']]:
    """Scores and numbers of the k best of the N² slots of every head: exact and differentiable.

    The score of slot i·N + j is query[0]·codebooks[0, i] + query[1]·codebooks[1, j], accumulated
    in float32 and not scaled. Scores come in descending order. The k slots of a head are different
    ones; which of several with equal scores are returned, or which with NaN, is not defined.
    Gradients go through the scores. Lample et al. 2019, section 3.1, with the candidates pruned to
    `rank_pairs`. `implementation`: see `pkm_jax.dispatch.Choice`.

    Raises:
      Refusal: k is not within 1..N, or the implementation cannot take these arrays.
    """
    n_keys = codebooks.shape[2]
    if not 1 <= k <= n_keys:
        raise Refusal(f'top_k = {k} reads a head, but each codebook has {n_keys} sub-keys: '
                      f'choose 1 <= top_k <= sub_keys.')
    return _search(query, codebooks, k, implementation)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _search(query, codebooks, k, implementation):
    return _forward_choice(implementation, query, codebooks, k=k)


def reference(
    query: Float[Array, 'T H 2 half'],
    codebooks: Float[Array, 'H 2 N half'],
    *,
    k: int,
) -> tuple[Float[Array, 'T H {k}'], Int32[Array, 'T H {k}']]:
    """`top_k_product_keys` in plain jnp, for any device."""
    n_keys = codebooks.shape[2]
    scores = jnp.einsum('thpd,hpnd->thpn', query, codebooks, preferred_element_type=jnp.float32)
    best, sub_keys = jax.lax.top_k(scores, k)
    i, j = rank_pairs(k)
    pair_scores, pairs = jax.lax.top_k(best[:, :, 0, i] + best[:, :, 1, j], k)
    slots = sub_keys[:, :, 0, i] * n_keys + sub_keys[:, :, 1, j]
    return pair_scores, jnp.take_along_axis(slots, pairs, axis=-1)


def reference_backward(
    query: Float[Array, 'T H 2 half'], codebooks: Float[Array, 'H 2 N half'],
    slots: Int32[Array, 'T H {k}'], gradient: Float[Array, 'T H {k}'], *, k: int,
) -> tuple[Float[Array, 'T H 2 half'], Float[Array, 'H 2 N half']]:
    """Gradients of query and codebooks: the derivative of `reference`.

    It searches again, which XLA finds done in a program that has the forward pass too.
    """
    return jax.vjp(lambda *arrays: reference(*arrays, k=k)[0], query, codebooks)[1](gradient)


def _load_forward():
    from pkm_jax.memory.kernels.gpu import retrieval
    return Kernel(retrieval.forward, retrieval.unsupported)


def _load_backward():
    from pkm_jax.memory.kernels.gpu import retrieval
    return Kernel(retrieval.backward, retrieval.unsupported)


def _load_forward_for_tpus():
    from pkm_jax.memory.kernels.tpu import retrieval
    return Kernel(retrieval.forward, retrieval.unsupported)


def _load_backward_for_tpus():
    from pkm_jax.memory.kernels.tpu import retrieval
    return Kernel(retrieval.backward, retrieval.unsupported)


_forward_choice = Choice('retrieval', reference, _load_forward, _load_forward_for_tpus)
_backward_choice = Choice('retrieval', reference_backward, _load_backward, _load_backward_for_tpus)


def _forward(query, codebooks, k, implementation):
    scores, slots = _forward_choice(implementation, query, codebooks, k=k)
    return (scores, slots), (query, codebooks, slots)


def _backward(k, implementation, residuals, gradients):
    return _backward_choice(implementation, *residuals, gradients[0], k=k)


_search.defvjp(_forward, _backward)

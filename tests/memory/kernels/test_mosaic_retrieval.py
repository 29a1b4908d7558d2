"""The retrieval's kernels for Mosaic GPU, interpreted, against float64 scores of all slots."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pkm_jax.memory.kernels.gpu import retrieval_backward
from tests.memory.kernels.searches import check_best, check_gradients, check_ties, make

pytestmark = pytest.mark.skipif(not hasattr(plgpu, 'InterpretGPUParams'),
                                reason='needs Mosaic GPU of jax 0.11 or later')


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def search(query, codebooks, k):
    from pkm_jax.memory.kernels.gpu import mosaic_retrieval
    return mosaic_retrieval.best_slots(query, codebooks, k, interpret=True)


def _forward(query, codebooks, k):
    scores, slots = search(query, codebooks, k)
    return (scores, slots), (query, codebooks, slots)


def _backward(_, kept, gradient):
    return retrieval_backward.query_and_codebook_gradients(
        *kept, gradient[0], mosaic=True, interpret=True)


search.defvjp(_forward, _backward)


@pytest.mark.parametrize('tokens, heads, n_keys, k', [
    (130, 2, 64, 4),        # the last tile overlaps
    (128, 1, 128, 5),       # two products; lists are padded to a power of two
    (20, 1, 64, 2),         # fewer tokens than threads
    (128, 1, 64, 1),
    pytest.param(128, 1, 64, 32, marks=pytest.mark.slow)])
def test_finds_the_best_slots(tokens, heads, n_keys, k):
    check_best(search, *make(tokens, heads, n_keys, 'bfloat16'), k)


def test_ties_leave_the_scores_exact_and_the_slots_distinct():
    check_ties(search, n_keys=64, k=8, distinct=1 / 4, tokens=128, dtype='bfloat16')


@pytest.mark.parametrize('value', [
    np.nan, *(pytest.param(value, marks=pytest.mark.slow) for value in (-np.inf, np.inf))])
def test_slots_are_distinct_whatever_the_scores(value):
    """All sub-keys' scores the same, or all but two."""
    query, codebooks = make(128, 2, 64, 'bfloat16')
    query = query.at[:].set(1.)
    codebooks = codebooks.at[0].set(value / 16).at[1, :, 2:].set(value / 16)
    scores, slots = search(query, codebooks, 3)
    assert (np.diff(np.sort(slots)) > 0).all() and slots.min() >= 0 and slots.max() < 64 ** 2
    assert not np.isfinite(scores[:, 0]).any()


@pytest.mark.parametrize('k', [3, pytest.param(1, marks=pytest.mark.slow)])
def test_gradients_agree_with_float64(k):
    check_gradients(search, 130 if k == 3 else 21, 64, k, 'bfloat16', 5e-3)


@pytest.mark.parametrize('dtype', ['bfloat16', 'float32'])
def test_a_sub_key_in_several_pairs_gets_the_sum(dtype):
    from pkm_jax.memory.kernels.gpu import mosaic_retrieval
    slots = jnp.tile(jnp.array([5 * 64 + 7, 5 * 64 + 9, 2 * 64 + 7]), (128, 1, 1))
    found = np.zeros((2, 64))
    found[0, [5, 2]], found[1, [7, 9]] = [3, 4], [5, 2]
    gradient = jnp.tile(jnp.array([1., 2., 4.]), (128, 1, 1))
    got = mosaic_retrieval.spread(slots, gradient, 64, dtype, interpret=True)
    assert got.dtype == dtype
    np.testing.assert_array_equal(got, np.broadcast_to(found[None, :, None], (1, 2, 128, 64)))

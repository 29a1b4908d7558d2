"""The retrieval's kernels, interpreted, against float64 scores of all slots."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pkm_jax.memory.kernels import networks
from pkm_jax.memory.kernels.gpu import retrieval, retrieval_forward
from pkm_jax.memory.product_keys import top_k_product_keys
from tests.memory.kernels.searches import check_best, check_gradients, check_ties, make

search = functools.partial(top_k_product_keys, implementation='gpu')


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(retrieval_forward, 'TOKENS', 16)
    jax.clear_caches()


@pytest.mark.parametrize('tokens, heads, n_keys, k, dtype', [
    (20, 2, 32, 4, 'float32'),      # the last tile overlaps
    (16, 1, 64, 8, 'bfloat16'),
    (16, 1, 64, 5, 'float32'),      # lists are padded to a power of two
    (17, 1, 32, 1, 'float32'),
    pytest.param(16, 1, 16, 16, 'float32', marks=pytest.mark.slow),     # every sub-key is kept
])
def test_finds_the_best_slots(tokens, heads, n_keys, k, dtype):
    query, codebooks = make(tokens, heads, n_keys, dtype)
    check_best(search, query, codebooks, k)


def test_ties_leave_the_scores_exact_and_the_slots_distinct():
    check_ties(search, n_keys=64, k=8, distinct=1 / 4)


def test_all_equal_scores():
    query, codebooks = jnp.zeros((16, 1, 2, 16)), jnp.ones((1, 2, 32, 16))
    scores, slots = search(query, codebooks, 4)
    assert not np.asarray(scores).any()
    assert (np.diff(np.sort(slots)) > 0).all() and slots.min() >= 0 and slots.max() < 32 ** 2


@pytest.mark.parametrize('implementation', [None, 'gpu'])
@pytest.mark.parametrize('value', [-np.inf, np.inf, np.nan])
@pytest.mark.parametrize('k', [3, 4])
def test_slots_are_distinct_whatever_the_scores(implementation, value, k):
    """All sub-keys' scores the same, or all but one or two."""
    query, codebooks = make(16, 2, 32)
    query = query.at[:].set(1.)
    codebooks = codebooks.at[0].set(value / 16).at[1, :, 2:].set(value / 16)
    scores, slots = top_k_product_keys(query, codebooks, k, implementation=implementation)
    assert (np.diff(np.sort(slots)) > 0).all() and slots.min() >= 0 and slots.max() < 32 ** 2
    assert not np.isfinite(scores[:, 0]).any()


def test_scores_beyond_the_floats_end_are_those_of_the_reference():
    query, codebooks = make(16, 1, 32)
    query, codebooks = jnp.abs(query) * 1e20, codebooks.at[:, :, 1:].set(-1e20)
    want, _ = top_k_product_keys(query, codebooks, 4)
    got, slots = search(query, codebooks, 4)
    assert np.isneginf(want).any() and np.isfinite(want).any()
    np.testing.assert_allclose(got, want, rtol=1e-5)
    assert (np.diff(np.sort(slots)) > 0).all()


@pytest.mark.parametrize('dtype, limit', [('float32', 1e-6), ('bfloat16', 5e-3)])
@pytest.mark.parametrize('k', [1, 3, 4])
def test_gradients_agree_with_float64(dtype, limit, k):
    """Tiles of two tokens, the last of which overlaps; lists padded to a power of two."""
    check_gradients(search, 21, 32, k, dtype, limit)


@pytest.mark.parametrize('k', [1, 2, 3, 5, 8, 32])
def test_best_sums_of_two_lists(k):
    rng = np.random.default_rng(k)
    first, second = -np.sort(-rng.normal(size=(2, k, 6)), axis=1)
    sums = networks.best_sums(
        k, lambda i, j: (first[i] + second[j], np.full(6, i * 100 + j, np.int32)))
    pairs = (first[:, None] + second[None]).reshape(k * k, 6)
    np.testing.assert_allclose([score for score, _ in sums], -np.sort(-pairs, axis=0)[:k],
                               rtol=1e-6)
    for score, slot in sums:
        at = np.asarray(slot) // 100 * k + np.asarray(slot) % 100
        np.testing.assert_allclose(pairs[at, np.arange(6)], score, rtol=1e-6)


@pytest.mark.parametrize('size', [1, 2, 8, 32])
def test_sorts_zeros_and_ones(size):
    """A comparator network sorts everything if it sorts all sequences of zeros and ones."""
    rng = np.random.default_rng(0)
    bits = (np.indices((2,) * size).reshape(size, -1) if size <= 8
            else rng.random((size, 4000)) < rng.random(4000)).astype(np.float32)
    ordered = networks.sort([(row, np.full(row.shape, i)) for i, row in enumerate(bits)])
    np.testing.assert_array_equal([score for score, _ in ordered], -np.sort(-bits, axis=0))
    np.testing.assert_array_equal(
        np.take_along_axis(bits, np.array([index for _, index in ordered]), 0),
        [score for score, _ in ordered])


@pytest.mark.parametrize('change, word', [
    ({'k': 33}, 'top_k = 33'), ({'n_keys': 40, 'k': 32}, '40 sub-keys'), ({'half': 24}, '24'),
    ({'tokens': 8}, '8 tokens'), ({'dtype': 'float16'}, 'float16'), ({}, None)])
def test_says_what_it_does_not_support(change, word):
    sizes = {'tokens': 16, 'n_keys': 64, 'half': 16, 'k': 8, 'dtype': 'float32'} | change
    k = sizes.pop('k')
    reason = retrieval.unsupported(*jax.eval_shape(lambda: make(heads=1, **sizes)), k=k)
    assert (reason is None) if word is None else word in reason

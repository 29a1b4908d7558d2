"""The retrieval's kernels for TPUs, interpreted, against float64 scores of all slots."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pkm_jax.memory.kernels.tpu import retrieval
from pkm_jax.memory.product_keys import top_k_product_keys

search = functools.partial(top_k_product_keys, implementation='tpu')
# Two tiles of tokens, the second of which is filled up.
MANY = 1030


def make(tokens, heads, n_keys, dtype='float32', half=16, whole_numbers=False):
    rng = np.random.default_rng(0)
    query, codebooks = (jnp.asarray(rng.normal(size=shape), dtype)
                        for shape in ((tokens, heads, 2, half), (heads, 2, n_keys, half)))
    return (jnp.round(query), jnp.round(codebooks)) if whole_numbers else (query, codebooks)


def all_scores(query, codebooks):
    scores = np.einsum('thpd,hpnd->thpn', np.asarray(query, np.float64),
                       np.asarray(codebooks, np.float64))
    pairs = scores[:, :, 0, :, None] + scores[:, :, 1, None, :]
    return pairs.reshape(*pairs.shape[:2], -1)


@pytest.mark.parametrize('tokens, heads, n_keys, k, dtype', [
    (MANY, 2, 20, 4, 'float32'),    # the last block of sub-keys is filled up
    (20, 1, 64, 5, 'bfloat16'),     # lists are padded to a power of two; two blocks
    (1, 1, 7, 1, 'float32'),
    (9, 1, 8, 8, 'float32'),        # every sub-key is kept
    pytest.param(300, 1, 600, 32, 'bfloat16', marks=pytest.mark.slow),
])
def test_finds_the_best_slots(tokens, heads, n_keys, k, dtype):
    query, codebooks = make(tokens, heads, n_keys, dtype)
    scores, slots = search(query, codebooks, k)
    want_scores, want_slots = top_k_product_keys(query, codebooks, k)
    np.testing.assert_array_equal(slots, want_slots)
    np.testing.assert_allclose(scores, want_scores, rtol=1e-5, atol=1e-5)
    best = -np.sort(-all_scores(query, codebooks))[..., :k]
    np.testing.assert_allclose(scores, best, rtol=1e-5, atol=1e-5)


def test_ties_leave_the_scores_exact_and_the_slots_distinct():
    query, codebooks = make(16, 1, 24, whole_numbers=True)
    query, codebooks = jnp.clip(query, -1, 1), jnp.clip(codebooks, -1, 1)
    scores, slots = search(query, codebooks, 4)
    everything = all_scores(query, codebooks)
    np.testing.assert_array_equal(scores, -np.sort(-everything)[..., :4])
    np.testing.assert_array_equal(np.take_along_axis(everything, np.asarray(slots), -1), scores)
    assert (np.diff(np.sort(slots)) > 0).all()
    assert len(np.unique(scores)) < scores.size / 2     # ties there are


@pytest.mark.parametrize('value', [-np.inf, np.inf, np.nan, -np.nan, 0.])
def test_slots_are_distinct_whatever_the_scores(value):
    """All sub-keys' scores the same, or all but two; blocks are filled up."""
    query, codebooks = make(16, 2, 20)
    query = query.at[:].set(1.)
    codebooks = codebooks.at[0].set(value / 16).at[1, :, 2:].set(value / 16)
    _, slots = search(query, codebooks, 4)
    assert (np.diff(np.sort(slots)) > 0).all() and slots.min() >= 0 and slots.max() < 20 ** 2


@pytest.mark.parametrize('dtype, limit', [('float32', 1e-6), ('bfloat16', 5e-3)])
@pytest.mark.parametrize('k', [1, 4])
def test_gradients_agree_with_float64(dtype, limit, k):
    """Two tiles of tokens; sub-keys and query are filled up; sub-keys of several slots."""
    query, codebooks = make(140, 2, 20, dtype)
    (_, slots), pull = jax.vjp(lambda q, c: search(q, c, k), query, codebooks)
    gradient = np.random.default_rng(1).normal(size=slots.shape).astype(np.float32)
    got = pull((jnp.asarray(gradient), np.zeros(slots.shape, jax.dtypes.float0)))
    slots, spread = np.asarray(slots), np.zeros((140, 2, 2, 20))
    token, head, _ = np.indices(slots.shape)
    np.add.at(spread, (token, head, 0, slots // 20), gradient)
    np.add.at(spread, (token, head, 1, slots % 20), gradient)
    query, codebooks = np.asarray(query, np.float64), np.asarray(codebooks, np.float64)
    for a, b in zip(got, (np.einsum('thpn,hpnd->thpd', spread, codebooks),
                          np.einsum('thpn,thpd->hpnd', spread, query))):
        assert a.dtype == dtype
        assert np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b) < limit


@pytest.mark.parametrize('change, word', [
    ({'k': 33}, 'top_k = 33'), ({'n_keys': 4097}, '4097 sub-keys'), ({'dtype': 'float16'}, 'float16'),
    ({'half': 24, 'tokens': 3, 'n_keys': 40}, None)])
def test_says_what_it_does_not_support(change, word):
    sizes = {'tokens': 16, 'n_keys': 64, 'half': 16, 'k': 8, 'dtype': 'float32'} | change
    k = sizes.pop('k')
    reason = retrieval.unsupported(*jax.eval_shape(lambda: make(heads=1, **sizes)), k=k)
    assert (reason is None) if word is None else word in reason

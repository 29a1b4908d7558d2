"""What every kernel of the retrieval is compared with: float64 scores of all slots."""

import jax
import jax.numpy as jnp
import numpy as np

from pkm_jax.memory.product_keys import top_k_product_keys


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


def check_best(search, query, codebooks, k):
    """The slots are the reference's, the scores those of the best of all."""
    scores, slots = search(query, codebooks, k)
    want_scores, want_slots = top_k_product_keys(query, codebooks, k)
    np.testing.assert_array_equal(slots, want_slots)
    np.testing.assert_allclose(scores, want_scores, rtol=1e-5, atol=1e-5)
    best = -np.sort(-all_scores(query, codebooks))[..., :k]
    np.testing.assert_allclose(scores, best, rtol=1e-5, atol=1e-5)


def check_ties(search, n_keys, k, distinct, tokens=16, dtype='float32'):
    """Whole numbers leave at most that share of the scores distinct."""
    query, codebooks = make(tokens, 1, n_keys, dtype, whole_numbers=True)
    query, codebooks = jnp.clip(query, -1, 1), jnp.clip(codebooks, -1, 1)
    scores, slots = search(query, codebooks, k)
    everything = all_scores(query, codebooks)
    np.testing.assert_array_equal(scores, -np.sort(-everything)[..., :k])
    np.testing.assert_array_equal(np.take_along_axis(everything, np.asarray(slots), -1), scores)
    assert (np.diff(np.sort(slots)) > 0).all()
    assert len(np.unique(scores)) < scores.size * distinct      # ties there are


def check_gradients(search, tokens, n_keys, k, dtype, limit):
    """Of two heads, by the slots that were found; relative error of each in norm."""
    query, codebooks = make(tokens, 2, n_keys, dtype)
    (_, slots), pull = jax.vjp(lambda q, c: search(q, c, k), query, codebooks)
    gradient = np.random.default_rng(1).normal(size=slots.shape).astype(np.float32)
    got = pull((jnp.asarray(gradient), np.zeros(slots.shape, jax.dtypes.float0)))
    slots, spread = np.asarray(slots), np.zeros((tokens, 2, 2, n_keys))
    token, head, _ = np.indices(slots.shape)
    np.add.at(spread, (token, head, 0, slots // n_keys), gradient)
    np.add.at(spread, (token, head, 1, slots % n_keys), gradient)
    query, codebooks = np.asarray(query, np.float64), np.asarray(codebooks, np.float64)
    for a, b in zip(got, (np.einsum('thpn,hpnd->thpd', spread, codebooks),
                          np.einsum('thpn,thpd->hpnd', spread, query))):
        assert a.dtype == dtype
        assert np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b) < limit

"""Masks: their rate, their independence of layout, and the generator they are drawn with."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pkm_jax.ops.dropout import DRAWS, dropout, keep_mask, words_of

WORDS = jnp.array([123, 2 ** 31 + 7], jnp.uint32)


@pytest.mark.parametrize('rate', [0.1, 0.5])
def test_elements_stay_at_the_rate_and_keep_their_mean(rate):
    x = jnp.ones((1000, 300))
    dropped = np.asarray(dropout(x, rate, jax.random.key(0)))
    assert abs(np.mean(dropped == 0) - rate) < 4 * (rate * (1 - rate) / x.size) ** .5
    np.testing.assert_allclose(dropped[dropped > 0], 1 / (1 - rate), rtol=1e-6)
    for axis in (0, 1):     # no row and no column is more likely to stay than another
        share = np.mean(dropped == 0, axis=axis)
        assert abs(share - rate).max() < 6 * (rate * (1 - rate) / x.shape[axis]) ** .5


def test_rows_that_share_a_block_are_independent():
    keep = np.asarray(keep_mask(WORDS, 0, 4000, 64, 0.5)).reshape(-1, DRAWS, 64)
    rows = keep.transpose(1, 0, 2).reshape(DRAWS, -1)
    assert abs(np.corrcoef(rows) - np.eye(DRAWS)).max() < 5 / rows.shape[1] ** .5


@pytest.mark.parametrize('parts, rows', [(2, 24), (4, 24), (3, 21), (7, 21)])
def test_parts_of_a_matrix_get_the_mask_of_the_whole(parts, rows):
    whole = keep_mask(WORDS, 0, rows, 9, 0.3)
    size = rows // parts
    parted = [keep_mask(WORDS, jnp.int32(part), size, 9, 0.3) for part in range(parts)]
    np.testing.assert_array_equal(np.concatenate(parted), whole)


def test_bits_are_those_of_threefry():
    """As `jax.random` draws them from the same key and counters, 16 bits for each row of four."""
    counters = jnp.arange(6, dtype=jnp.uint32)
    low, high = jax.extend.random.threefry2x32_p.bind(*WORDS, jnp.full(6, 2, jnp.uint32), counters)
    bits = np.stack([low & 0xffff, low >> 16, high & 0xffff, high >> 16])
    np.testing.assert_array_equal(keep_mask(WORDS, 0, 12, 6, 0.25)[8:], bits >= 2 ** 14)


def test_identity_without_key_or_rate_and_gradient_of_what_stays():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 8)), jnp.bfloat16)
    assert dropout(x, 0.5, None) is x and dropout(x, 0., jax.random.key(0)) is x
    key = jax.random.key(3)
    by_x = jax.grad(lambda x: jnp.sum(dropout(x, 0.5, key).astype(jnp.float32)))(x)
    keep = keep_mask(words_of(key), 0, 10, 8, 0.5).reshape(x.shape)
    np.testing.assert_array_equal(by_x.astype(jnp.float32), np.where(keep, 2., 0.))
    other = keep_mask(words_of(jax.random.key(4)), 0, 10, 8, 0.5)
    assert not np.array_equal(keep, other.reshape(x.shape))

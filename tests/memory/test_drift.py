"""Drift of slots, and what refreshing them is worth, against numbers worked out by hand."""

import jax.numpy as jnp
import numpy as np

from pkm_jax.memory.drift import (
    SIMPSON,
    drift_of_slots,
    fall_by_slot,
    slot_drift,
    sub_key_scores,
)
from pkm_jax.memory.usage import NEVER

# Two directions over three tokens that sum to 0 and are orthogonal: |P|² = 2, |Q|² = 6.
P, Q = np.array([1., 0, -1]), np.array([1., -2, 1])


def scores(first, second):
    """[3 tokens, 1 head, 2 halves, N = 2]: the other sub-key of a half scores the opposite."""
    return np.stack([[first, -first], [second, -second]]).transpose(2, 0, 1)[:, None]


# Slots (0, 0), (0, 1), (1, 0), (1, 1) score P + Q, P − Q, −P + Q, −P − Q …
THEN = scores(P, Q)
# … and then 4 P, −2 P, 2 P, −4 P. So the correlations are ±(P + Q)·P / (√8·√2) = ±2 / 4.
NOW = scores(P, 3 * P)


def drift(now, then):
    return slot_drift(jnp.asarray(now, jnp.float32), jnp.asarray(then, jnp.float32))


def test_drift_by_hand():
    np.testing.assert_allclose(drift(NOW, THEN), [.5, 1.5, 1.5, .5], rtol=1e-6)
    np.testing.assert_allclose(drift(-THEN, THEN), 2, rtol=1e-6)


def test_every_slot_by_its_own_scores():
    """As slot by slot in float64, each slot with its [tokens, heads] scores."""
    rng = np.random.default_rng(1)
    now, then = rng.normal(size=(2, 7, 2, 2, 3))

    def slots(scores):
        table = scores[:, :, 0, :, None] + scores[:, :, 1, None, :]
        table = table.reshape(7, 2, 9) - table.mean(axis=(2, 3))[..., None]
        return (table - table.mean(axis=0)).transpose(2, 0, 1).reshape(9, -1)

    expected = [1 - a @ b / np.sqrt(a @ a * (b @ b)) for a, b in zip(slots(now), slots(then))]
    np.testing.assert_allclose(drift(now, then), expected, rtol=1e-5, atol=1e-6)


def test_what_changes_no_reader_is_no_drift():
    """All scores scaled; a constant for each token, and one for each slot."""
    tokens = np.array([3., 1, -7])[:, None, None, None]
    sub_keys = np.array([[2., 9], [-4, 1]])[None, None]
    np.testing.assert_allclose(drift(5 * THEN + tokens + sub_keys, THEN), 0, atol=1e-6)
    rng = np.random.default_rng(0)
    query, codebooks = rng.normal(size=(9, 2, 2, 4)), rng.normal(size=(2, 2, 3, 4))
    turned, _ = np.linalg.qr(rng.normal(size=(4, 4)))
    before, after = (sub_key_scores(jnp.asarray(q, jnp.float32), jnp.asarray(c, jnp.float32))
                     for q, c in ((query, codebooks), (query @ turned, codebooks @ turned)))
    np.testing.assert_allclose(drift(after, before), 0, atol=1e-5)


def test_slots_that_tell_no_token_from_another_do_not_drift():
    np.testing.assert_array_equal(drift(NOW, scores(0 * P, 0 * P)), 0)


def test_heads_are_correlated_as_tokens_are():
    """A second head that did not move: its products of a slot's scores, 8 and 8, join 4 and √(8·32)
    of slot (0, 0), so that the correlation is (8 + 8) / √((8 + 8)·(32 + 8))."""
    both = [np.concatenate([one, THEN], axis=1) for one in (NOW, THEN)]
    np.testing.assert_allclose(drift(*both)[0], 1 - 16 / np.sqrt(16 * 40), rtol=1e-6)


def test_each_slot_counts_from_its_last_update():
    """Snapshots after 0, 10, 20 steps. Step 9 is the tenth: what it updates is in the snapshot
    after 10."""
    snapshots = [(0, THEN), (10, -THEN), (20, NOW)]
    snapshots = [(step, one.astype(np.float32)) for step, one in snapshots]
    last = np.array([NEVER, 9, 10, 19], np.int32)
    since_start, since_ten = drift(NOW, THEN), drift(NOW, -THEN)
    np.testing.assert_array_equal(drift_of_slots(snapshots, last),
                                  [since_start[0], since_ten[1], 0, 0])
    np.testing.assert_allclose(since_ten, [1.5, .5, .5, 1.5], rtol=1e-6)


def test_the_fall_of_a_loss_by_slot():
    """L(v) = Σ a·(v − b)⁴: from v to v', each slot takes off a·((v − b)⁴ − (v' − b)⁴)."""
    a, b = np.array([[1.], [3.], [2.]]), np.array([[0.], [1.], [5.]])
    v, new = np.array([[2.], [1.], [4.]]), np.array([[1.], [3.], [4.]])
    falls = [weight * fall_by_slot(jnp.asarray(4 * a * (v + part * (new - v) - b) ** 3),
                                   jnp.asarray(new - v)) for part, weight in SIMPSON.items()]
    # 1·(16 − 1) = 15; 3·(0 − 16) = −48, a change for the worse; 0 where nothing changed.
    np.testing.assert_allclose(sum(falls), [15, -48, 0], rtol=1e-6)

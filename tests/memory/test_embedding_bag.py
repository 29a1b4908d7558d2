"""The read and its gradients against NumPy in float64, and its memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pkm_jax.memory import embedding_bag as bag
from pkm_jax.memory.embedding_bag import compact_gradients, embedding_bag


def draw(seed, n_slots=11, width=5, tokens=7, reads=6, same_slot=False):
    rng = np.random.default_rng(seed)
    slots = np.full((tokens, reads), 3) if same_slot else rng.integers(0, n_slots, (tokens, reads))
    return (jnp.asarray(rng.normal(size=(n_slots, width)), jnp.float32),
            jnp.asarray(slots, jnp.int32),
            jnp.asarray(rng.normal(size=(tokens, reads)), jnp.float32),
            jnp.asarray(rng.normal(size=(tokens, width)), jnp.float32))


def expected(values, slots, weights, gradient):
    """Result, gradient of the values and gradient of the weights, in float64."""
    values, weights, gradient = (np.asarray(a, np.float64) for a in (values, weights, gradient))
    rows = values[slots]
    d_values = np.zeros_like(values)
    np.add.at(d_values, np.asarray(slots), weights[..., None] * gradient[:, None])
    return (np.einsum('trv,tr->tv', rows, weights), d_values,
            np.einsum('trv,tv->tr', rows, gradient))


@pytest.mark.parametrize('seed', range(3))
@pytest.mark.parametrize('same_slot', [False, True])
@pytest.mark.parametrize('dtype, tolerance', [(jnp.float32, 1e-5), (jnp.bfloat16, 1e-2)])
def test_values_and_gradients(seed, same_slot, dtype, tolerance):
    values, slots, weights, gradient = draw(seed, same_slot=same_slot)
    values, gradient = values.astype(dtype), gradient.astype(dtype)
    result, pull = jax.vjp(lambda v, w: embedding_bag(v, slots, w), values, weights)
    for ours, theirs in zip((result, *pull(gradient)), expected(values, slots, weights, gradient)):
        np.testing.assert_allclose(np.asarray(ours, np.float64), theirs, atol=tolerance * 10,
                                   rtol=tolerance)


def test_zero_weights_contribute_nothing():
    values, slots, weights, gradient = draw(4)
    weights = weights.at[3:].set(0)
    result, pull = jax.vjp(lambda v: embedding_bag(v, slots, weights), values)
    np.testing.assert_array_equal(result[3:], 0)
    np.testing.assert_array_equal(pull(gradient)[0], pull(gradient.at[3:].set(100.))[0])


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_temporaries_stay_under_an_eighth_of_the_gathered_rows(dtype):
    """T = 4,096, H·K = 128, V = 768: forward and backward, as compiled."""
    tokens, reads, width, n_slots = 4096, 128, 768, 256
    arguments = (jax.ShapeDtypeStruct((n_slots, width), dtype),
                 jax.ShapeDtypeStruct((tokens, reads), jnp.int32),
                 jax.ShapeDtypeStruct((tokens, reads), jnp.float32))

    def loss(values, slots, weights):
        return jnp.sum(embedding_bag(values, slots, weights).astype(jnp.float32) ** 2)

    compiled = jax.jit(jax.value_and_grad(loss, (0, 2))).lower(*arguments).compile()
    gathered = tokens * reads * width * jnp.dtype(dtype).itemsize
    assert compiled.memory_analysis().temp_size_in_bytes < gathered / 8


def test_tokens_in_blocks_give_what_they_give_together(monkeypatch):
    """Seven tokens in blocks of three, two and two: result and gradients, dense and compact."""
    values, slots, weights, gradient = draw(5)

    def results():
        result, pull = jax.vjp(lambda v, w: embedding_bag(v, slots, w, implementation='xla'), values, weights)
        rows, by_read = compact_gradients(values, slots, weights, gradient,
                                          implementation='xla')
        return result, *pull(gradient), rows.ids, rows.rows, by_read

    together = results()
    monkeypatch.setattr(bag, 'BLOCK', 3)
    for ours, theirs in zip(results(), together, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6)


ELSEWHERE = {   # by name, which reads [7, 6] are another device's
    'most': lambda rng: rng.random((7, 6)) < .8,
    'all': lambda rng: np.ones((7, 6), bool),
    'none': lambda rng: np.zeros((7, 6), bool),
    'all but those of one token': lambda rng: np.arange(7)[:, None].repeat(6, 1) != 4,
}


@pytest.mark.parametrize('block', [3, 16_384])
@pytest.mark.parametrize('n_slots', [11, 101])      # fewer and more than reads
@pytest.mark.parametrize('which', ELSEWHERE)
def test_reads_made_elsewhere_add_nothing(which, n_slots, block, monkeypatch):
    """Result and gradients, dense and compact, against float64; three blocks of tokens, and one."""
    monkeypatch.setattr(bag, 'BLOCK', block)
    values, slots, weights, gradient = draw(6, n_slots=n_slots)
    away = ELSEWHERE[which](np.random.default_rng(7))
    read, d_values, d_weights = expected(values, slots, np.where(away, 0, weights), gradient)
    slots = jnp.where(away, n_slots, slots)
    settings = dict(owners=2, implementation='xla')

    ours, pull = jax.vjp(lambda v, w: embedding_bag(v, slots, w, **settings), values, weights)
    rows, by_read = compact_gradients(values, slots, weights, gradient, **settings)
    for got, want in zip((ours, *pull(gradient), by_read),
                         (read, d_values, *[np.where(away, 0, d_weights)] * 2), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)
    ids = np.asarray(rows.ids)
    used = ids < n_slots
    assert list(ids[used]) == sorted(set(np.asarray(slots)[~away])) and rows.count[0] == used.sum()
    assert len(ids) == min(n_slots, slots.size)
    places = ids[used] if n_slots == len(ids) else np.arange(used.sum())
    np.testing.assert_array_equal(np.flatnonzero(used), places)
    np.testing.assert_allclose(rows.rows[used], d_values[ids[used]], atol=1e-5)
    np.testing.assert_array_equal(rows.rows[~used], 0)


def test_passes_are_as_many_as_a_block_has_own_reads(monkeypatch):
    """Tokens with no, one, …, six own reads, two in a block: 0 + 2 + 4 + 6 passes, not 4 · 6."""
    monkeypatch.setattr(bag, 'BLOCK', 2)
    passes = []

    def count(carry, n, slots, weights):
        jax.debug.callback(lambda n: passes.append(int(n)), n)
        return carry, weights.T

    own = np.arange(6)[None] < np.array([3, 6, 0, 5, 1, 4, 2])[:, None]
    bag._over_blocks(count, None, jnp.where(own, 0, 9), jnp.ones((7, 6)), n_slots=9, owners=2)
    jax.effects_barrier()
    assert sorted(passes) == [0, 2, 4, 6]


def test_even_passes_are_about_the_mean():
    assert bag.even_passes(16_384 * 8, 128, 16) in range(8, 12)
    assert bag.even_passes(10, 128, 1) == 128

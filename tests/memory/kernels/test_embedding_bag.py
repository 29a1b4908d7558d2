"""The read's kernels, interpreted, against float64 sums."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pkm_jax.memory.embedding_bag import compact_gradients, embedding_bag, reference_backward
from pkm_jax.memory.kernels.gpu import embedding_bag as kernel
from pkm_jax.memory.kernels.gpu import embedding_bag_backward
from pkm_jax.memory.kernels.gpu.embedding_bag_backward import rows_that_were_read

bag = functools.partial(embedding_bag, implementation='gpu')
dense_gradients = functools.partial(kernel.backward, interpret=True)

LIMIT = {'float32': 1e-6, 'bfloat16': 5e-3}


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch):
    """Tiny cases with slots that are hot, chunks without a segment's start, and uneven ends."""
    monkeypatch.setattr(embedding_bag_backward, 'SHORTEST_CHUNK', 8)
    for sizes in 'TILE', 'PIECES':
        monkeypatch.setattr(embedding_bag_backward, sizes, 4)
    jax.clear_caches()


def make(slots, n_slots, width, dtype='float32', seed=0):
    rng = np.random.default_rng(seed)
    slots = jnp.asarray(slots, jnp.int32)
    values, gradient = (jnp.asarray(rng.normal(size=(n, width)), dtype)
                        for n in (n_slots, len(slots)))
    return values, slots, jnp.asarray(rng.random(slots.shape), jnp.float32), gradient


def random_slots(tokens, reads, n_slots, seed=1):
    return np.random.default_rng(seed).integers(0, n_slots, (tokens, reads))


def expected(values, slots, weights, gradient):
    """Sums, gradient of the table and of the weights in float64."""
    values, weights, gradient = (np.asarray(x, np.float64) for x in (values, weights, gradient))
    rows, table = values[np.asarray(slots)], np.zeros(values.shape)
    np.add.at(table, np.asarray(slots), weights[..., None] * gradient[:, None])
    return (np.einsum('tr,trv->tv', weights, rows), table,
            np.einsum('tv,trv->tr', gradient, rows))


def error(got, want):
    got = np.asarray(got, np.float64)
    return np.linalg.norm(got - want) / np.linalg.norm(want)


MIXED = np.where(np.random.default_rng(3).random((11, 8)) < 0.6, 5, random_slots(11, 8, 16))
CASES = {
    'uniform': (random_slots(9, 4, 50), 50, 128, 'float32'),
    'bfloat16': (random_slots(9, 4, 50), 50, 256, 'bfloat16'),
    'one slot': (np.full((9, 8), 3), 20, 384, 'float32'),
    'hot among others': (MIXED, 16, 128, 'bfloat16'),
    'two hot slots': (np.repeat([[2] * 4 + [9] * 4], 7, axis=0), 12, 128, 'float32'),
    'one read a token': (random_slots(5, 1, 9), 9, 128, 'float32'),
    'first and last slot': (np.array([[0, 29], [29, 0]]), 30, 128, 'float32'),
    'odd number of reads, width 768': (random_slots(3, 3, 7), 7, 768, 'bfloat16'),
    'rows beyond 1,536 bytes': (MIXED, 16, 512, 'float32'),
}
# Compact rows have the dense gradient's sums: what differs is how they begin and end.
OF_BOTH = [case if case in ('one slot', 'hot among others', 'first and last slot') else
           pytest.param(case, marks=pytest.mark.slow) for case in CASES]


@pytest.mark.parametrize('case', CASES)
def test_agrees_with_float64(case):
    values, slots, weights, gradient = make(*CASES[case])
    limit = LIMIT[str(values.dtype)]
    sums, table, by_weight = expected(values, slots, weights, gradient)
    out, pull = jax.vjp(lambda v, w: bag(v, slots, w), values, weights)
    by_value, by_read = pull(gradient)
    assert out.dtype == values.dtype and by_value.dtype == values.dtype
    assert error(out, sums) < limit
    assert error(by_value, table) < limit
    assert error(by_read, by_weight) < LIMIT['float32']
    unread = np.setdiff1d(np.arange(len(values)), slots)
    assert not np.asarray(by_value, np.float32)[unread].any()


@pytest.mark.parametrize('slots', [random_slots(9, 7, 20), MIXED[:9, :7]])
def test_chunks_grow_with_the_number_of_reads(monkeypatch, slots):
    """21 reads a chunk, which is no power of two; weights in bfloat16."""
    monkeypatch.setattr(embedding_bag_backward, 'PROGRAMS', 3)
    assert embedding_bag_backward._chunk_size(slots) == 21
    values, slots, weights, gradient = make(slots, 20, 128)
    weights = weights.astype(jnp.bfloat16)
    _, table, by_weight = expected(values, slots, weights, gradient)
    by_value, by_read = dense_gradients(values, slots, weights, gradient)
    assert by_read.dtype == weights.dtype
    assert error(by_value, table) < LIMIT['float32']
    assert error(by_read, by_weight) < LIMIT['bfloat16']


@pytest.mark.parametrize('case', OF_BOTH)
def test_compact_rows_are_those_of_the_dense_gradient(case):
    values, slots, weights, gradient = make(*CASES[case])
    table, by_read = dense_gradients(values, slots, weights, gradient)
    row_slots, rows, compact_by_read = rows_that_were_read(
        values, slots, weights, gradient, interpret=True)
    distinct = np.unique(slots)
    assert len(rows) == len(row_slots) == min(len(values), slots.size)
    used = row_slots < len(values)
    np.testing.assert_array_equal(row_slots[used], distinct)
    places = distinct if len(values) == len(rows) else np.arange(len(distinct))
    np.testing.assert_array_equal(np.flatnonzero(used), places)
    np.testing.assert_array_equal(np.asarray(rows[used], np.float32),
                                  np.asarray(table, np.float32)[distinct])
    np.testing.assert_array_equal(compact_by_read, by_read)


@pytest.mark.parametrize('case', ['no padding', 'padding', 'padding, last slot read',
                                  'padding alone'])
@pytest.mark.parametrize('n_slots', [10, 100])
def test_rows_of_a_gradient_are_those_of_the_reference(case, n_slots):
    """Slots of S, which nobody reads, more than a chunk of them, beside the last slot; more rows
    than reads, and fewer."""
    slots = random_slots(7, 4, n_slots - 1)
    if 'padding,' in case:
        slots[:4, :3] = n_slots - 1
    if case != 'no padding':
        slots[4:, 1:] = n_slots
    if case == 'padding alone':
        slots[:] = n_slots
    values, slots, weights, gradient = make(slots, n_slots, 128)
    weights = jnp.where(slots < n_slots, weights, 0)
    want, want_by_read = compact_gradients(values, slots, weights, gradient)
    got, by_read = compact_gradients(values, slots, weights, gradient, implementation='gpu')
    np.testing.assert_array_equal(got.ids, want.ids)
    np.testing.assert_array_equal(got.count, want.count)
    np.testing.assert_allclose(got.rows, want.rows, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(by_read, want_by_read, rtol=1e-5, atol=1e-5)
    for got, want in zip(dense_gradients(values, slots, weights, gradient, owners=2),
                         reference_backward(values, slots, weights, gradient, owners=2)):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_padding_reads_nothing_but_has_a_weight_gradient():
    values, slots, weights, gradient = make(random_slots(6, 4, 10), 10, 128)
    weights = weights.at[4:].set(0)
    out, pull = jax.vjp(lambda v, w: bag(v, slots, w), values, weights)
    by_value, by_weight = pull(gradient)
    _, table, wanted = expected(values, slots, weights, gradient)
    assert not np.asarray(out[4:]).any()
    assert error(by_value, table) < LIMIT['float32']
    assert error(by_weight, wanted) < LIMIT['float32']


def test_same_result_as_the_reference_it_replaces():
    values, slots, weights, gradient = make(random_slots(6, 4, 10), 10, 128)
    want, pull = jax.vjp(lambda v, w: embedding_bag(v, slots, w), values, weights)
    got, pull_kernel = jax.vjp(lambda v, w: bag(v, slots, w), values, weights)
    for a, b in zip((got, *pull_kernel(gradient)), (want, *pull(gradient))):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('shape, dtype, word', [
    ((9, 96), 'float32', 'width of 96'), ((9, 128), 'float16', 'float16'),
    ((9, 128), 'bfloat16', None)])
def test_says_what_it_does_not_support(shape, dtype, word):
    reason = kernel.unsupported(jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)),
                                jax.ShapeDtypeStruct((2, 2), jnp.int32))
    assert (reason is None) if word is None else word in reason

"""The read's kernels for TPUs, interpreted, against float64 sums and the plain reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pkm_jax.memory.embedding_bag import compact_gradients, embedding_bag
from pkm_jax.memory.kernels.tpu import embedding_bag as kernel
from pkm_jax.memory.kernels.tpu import (
    embedding_bag_backward,
    embedding_bag_forward,
    own_reads,
    rows,
)

bag = functools.partial(embedding_bag, implementation='tpu')
LIMIT = {'float32': 1e-6, 'bfloat16': 5e-3}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Tiles of eight tokens, chunks that segments span, rings that turn several times in each."""
    monkeypatch.setattr(embedding_bag_forward, 'READS', 32)
    monkeypatch.setattr(embedding_bag_forward, 'IN_FLIGHT', 4)
    for name, value in {'IN_FLIGHT': 4, 'LEAVING': 2, 'CHUNK': 16, 'LANES': 16}.items():
        monkeypatch.setattr(embedding_bag_backward, name, value)
    for name, value in {'BLOCK': 8, 'LANES': 4, 'MULTIPLE': 1, 'SPREAD': 1.}.items():
        monkeypatch.setattr(own_reads, name, value)
    jax.clear_caches()


def random_slots(tokens, reads, n_slots, seed=1):
    return np.random.default_rng(seed).integers(0, n_slots, (tokens, reads))


def make(slots, n_slots, width, dtype, seed=0):
    rng = np.random.default_rng(seed)
    values, gradient = (jnp.asarray(rng.normal(size=(n, width)), dtype)
                        for n in (n_slots, len(slots)))
    return (values, jnp.asarray(slots, jnp.int32),
            jnp.asarray(rng.normal(size=np.shape(slots)), jnp.float32), gradient)


def error(got, want):
    return np.linalg.norm(np.asarray(got, np.float64) - want) / max(np.linalg.norm(want), 1e-30)


CASES = {
    'uniform, a tile and a bit': (random_slots(19, 4, 50), 50, 128, 'float32'),
    'bfloat16': (random_slots(16, 4, 50), 50, 256, 'bfloat16'),
    'all tokens on one slot': (np.full((9, 8), 3), 20, 384, 'float32'),
    'one read a token, one token': (random_slots(1, 1, 9), 9, 128, 'bfloat16'),
    'first and last slot': (np.array([[0, 29], [29, 0]]), 30, 128, 'float32'),
    'a width of no whole pieces': (random_slots(3, 3, 7), 7, 192, 'bfloat16'),
    'more reads than a tile of scalars': (random_slots(2, 40, 7), 7, 128, 'float32'),
}


@pytest.mark.parametrize('case', CASES)
def test_sums_agree_with_float64(case):
    values, slots, weights, _ = make(*CASES[case])
    sums = bag(values, slots, weights)
    want = np.einsum('tr,trv->tv', np.asarray(weights, np.float64),
                     np.asarray(values, np.float64)[np.asarray(slots)])
    assert sums.dtype == values.dtype
    assert error(sums, want) < LIMIT[str(values.dtype)]


@pytest.mark.parametrize('share', [0., .9, 1.])
@pytest.mark.parametrize('reads', [pytest.param(1, marks=pytest.mark.slow), 6])
def test_of_reads_made_elsewhere_none_is_added(share, reads):
    """From none to all of them; the sums of a token keep their order: the reference's bits."""
    away = np.random.default_rng(2).random((19, reads)) < share
    values, slots, weights, _ = make(np.where(away, 30, random_slots(19, reads, 30)), 30, 128,
                                     'float32')
    weights = jnp.where(away, 0, weights)
    want = embedding_bag(values, slots, weights, owners=2)
    np.testing.assert_array_equal(bag(values, slots, weights, owners=2), want)


@pytest.mark.parametrize('case', CASES)
def test_gradients_agree_with_float64(case):
    """Dense and compact; of the weights too. Twice the same bits."""
    values, slots, weights, gradient = make(*CASES[case])
    pull = jax.vjp(lambda v, w: bag(v, slots, w), values, weights)[1]
    by_value, by_weight = pull(gradient)
    rows, by_read = compact_gradients(values, slots, weights, gradient, implementation='tpu')
    table, by_row = np.zeros(values.shape), np.asarray(gradient, np.float64)
    np.add.at(table, np.asarray(slots), np.asarray(weights, np.float64)[..., None] * by_row[:, None])
    assert by_value.dtype == values.dtype and rows.rows.dtype == jnp.float32
    assert error(by_value, table) < LIMIT[str(values.dtype)]
    want = np.einsum('tv,trv->tr', by_row, np.asarray(values, np.float64)[np.asarray(slots)])
    assert error(by_weight, want) < LIMIT['float32']
    assert not np.asarray(by_value, np.float32)[np.setdiff1d(np.arange(len(values)), slots)].any()
    np.testing.assert_array_equal(by_read, by_weight)
    np.testing.assert_array_equal(pull(gradient)[0], by_value)
    used = np.asarray(rows.ids) < len(values)
    np.testing.assert_array_equal(rows.rows.astype(values.dtype)[used], by_value[rows.ids[used]])


@pytest.mark.parametrize('n_slots', [10, 200])      # fewer and more than reads
@pytest.mark.parametrize('share', [0., .7, 1.])
def test_compact_rows_are_those_of_the_reference(share, n_slots):
    """With reads made elsewhere, or padding: ids, count, rows, and no gradient of their weights."""
    away = np.random.default_rng(2).random((9, 6)) < share
    slots = np.where(away, n_slots, random_slots(9, 6, n_slots))
    values, slots, weights, gradient = make(slots, n_slots, 128, 'float32')
    weights = jnp.where(away, 0, weights)
    want, want_by_read = compact_gradients(values, slots, weights, gradient)
    got, by_read = compact_gradients(values, slots, weights, gradient, implementation='tpu')
    np.testing.assert_array_equal(got.ids, want.ids)
    np.testing.assert_array_equal(got.count, want.count)
    np.testing.assert_allclose(got.rows, want.rows, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(by_read, want_by_read, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('spread, dtype', [
    ('evenly', 'bfloat16'), ('all on one row', 'float32'), ('all elsewhere', 'float32'),
    pytest.param('evenly', 'float32', marks=pytest.mark.slow),
    pytest.param('all here', 'bfloat16', marks=pytest.mark.slow)])
def test_own_rows_are_those_of_the_reference(spread, dtype):
    """Of one owner in four, however reads are spread: then some blocks have more than a window."""
    slots = {'evenly': random_slots(21, 6, 48), 'all on one row': np.full((21, 6), 3),
             'all here': random_slots(21, 6, 12), 'all elsewhere': np.full((21, 6), 12)}[spread]
    values, slots, weights, gradient = make(np.minimum(slots, 12), 12, 128, dtype)
    weights = jnp.where(slots < 12, weights, 0)
    settings = dict(first=jnp.int32(7), tokens=10, owners=4)
    want, want_by_read = compact_gradients(values, slots, weights, gradient, **settings)
    got, by_read = compact_gradients(values, slots, weights, gradient, implementation='tpu',
                                     **settings)
    np.testing.assert_array_equal(got.ids, want.ids)
    np.testing.assert_array_equal(got.count, want.count)
    np.testing.assert_allclose(got.rows, want.rows, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(by_read, want_by_read, rtol=1e-4, atol=1e-4)
    again, _ = compact_gradients(values, slots, weights, gradient, implementation='tpu', **settings)
    np.testing.assert_array_equal(again.rows, got.rows)


def test_windows_hold_each_own_read_once():
    """The last of three overlaps the one before: blocks of 8 in windows of 3."""
    slots, size = np.minimum(random_slots(40, 5, 8), 6), 3
    blocks = own_reads.in_blocks(jnp.asarray(slots, jnp.int32), jnp.ones(slots.shape), 6)
    windows = int(own_reads.windows(blocks, 6, size))
    assert windows == 3
    found = [np.asarray(part) for number in range(windows)
             for part in [own_reads.window(blocks, number, 6, size)]
             for part in [np.stack([part.slots, part.order])[:, np.asarray(part.slots) < 6]]]
    for slot, _ in found:
        assert (np.diff(slot) >= 0).all()
    slot, order = np.concatenate(found, axis=1)
    own = np.flatnonzero(slots.reshape(-1) < 6)
    np.testing.assert_array_equal(np.sort(order), own)
    np.testing.assert_array_equal(slots.reshape(-1)[order], slot)


@pytest.mark.parametrize('when', [pytest.param('eager', marks=pytest.mark.slow), 'on_wait'])
def test_sums_do_not_depend_on_when_copies_are_made(when):
    """Where they start, or as late as they can be."""
    values, slots, weights, gradient = make(*CASES['bfloat16'])
    late = pltpu.InterpretParams(dma_execution_mode=when)
    settings = values, slots, weights
    np.testing.assert_array_equal(kernel.forward(*settings, interpret=late), bag(*settings))
    for got, want in zip(kernel.backward(*settings, gradient, interpret=late),
                         kernel.backward(*settings, gradient, interpret=True)):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize('shape, dtype, reads, word', [
    ((9, 128), 'float16', 2, 'float16'), ((9, 128), 'float32', 1025, '1025 reads'),
    ((9, 96), 'bfloat16', 2, None), ((9, 12_416), 'float32', 2, None),
    ((9, 16_512), 'float32', 2, '16512 columns'), ((9, 4_100), 'float32', 2, '4100 columns')])
def test_says_what_it_does_not_support(shape, dtype, reads, word):
    reason = kernel.unsupported(jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)),
                                jax.ShapeDtypeStruct((2, reads), jnp.int32))
    assert (reason is None) if word is None else word in reason


@pytest.mark.parametrize('width', [
    72, 128, 384, 768, 1024, 1100, pytest.param(16_256, marks=pytest.mark.slow)])
def test_a_table_in_pieces_is_the_table_again(width):
    """Filled up with zeros, of more rows than a program turns."""
    table = jnp.asarray(np.random.default_rng(0).normal(size=(523, width)), jnp.bfloat16)
    pieces = rows.as_rows(table, True)
    filled = np.asarray(pieces.reshape(len(table), -1))
    np.testing.assert_array_equal(filled[:, :width], table)
    assert not np.any(filled[:, width:])
    np.testing.assert_array_equal(rows.as_table(pieces, width, True), table)

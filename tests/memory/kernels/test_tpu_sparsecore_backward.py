"""Compact gradients on SparseCores, interpreted subcore by subcore, against float64 sums and the
plain reference."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh

from benchmarks import tpu_sparsecore
from pkm_jax.memory.embedding_bag import compact_gradients
from pkm_jax.memory.kernels.tpu import (
    embedding_bag,
    embedding_bag_backward,
    own_reads,
    sparsecore,
    sparsecore_backward,
    sparsecore_forward,
    sparsecore_shares,
)
from pkm_jax.training.start import uncached
from tests.memory.kernels.test_tpu_embedding_bag import LIMIT, error, make, random_slots
from tests.planning.tiny import needs_tpu_compiler

CHIP = sparsecore.Chip(cores=1, subcores=3, lanes=4, memory=2 ** 16)


@pytest.fixture(autouse=True)
def small_shares(monkeypatch):
    """Tiles of four parts, places for two of them, shares that segments span."""
    monkeypatch.setattr(sparsecore_shares, 'TILE', 16)
    monkeypatch.setattr(sparsecore_backward, 'AHEAD', 2)
    monkeypatch.setattr(sparsecore, 'INTERPRETED', CHIP)
    for name, value in {'BLOCK': 8, 'LANES': 4, 'MULTIPLE': 1, 'SPREAD': 1.}.items():
        monkeypatch.setattr(own_reads, name, value)
    jax.clear_caches()


@pytest.fixture
def said(monkeypatch, caplog):
    """With the setting: what is logged."""
    monkeypatch.setenv(sparsecore.SETTING, '1')
    with caplog.at_level(logging.WARNING):
        yield caplog


CASES = {
    'some reads elsewhere': (np.where(random_slots(19, 6, 3, seed=5) > 0, random_slots(19, 6, 30),
                                      50), 50, 192, 'bfloat16'),
    'one read a token, fewer than slots': (random_slots(37, 1, 90), 90, 128, 'float32'),
    'all tokens on one slot': (np.full((19, 8), 3), 20, 256, 'bfloat16'),
    'two slots, ties': (np.tile([[7, 2, 2, 7]], (23, 1)), 30, 384, 'bfloat16'),
    'one read': (random_slots(1, 1, 9), 9, 256, 'bfloat16'),
    'first and last slot': (np.array([[0, 29], [29, 0]]), 30, 128, 'float32'),
    'fewer reads than slots': (random_slots(11, 6, 300), 300, 384, 'bfloat16'),
    'no read': (np.full((3, 4), 20), 20, 128, 'float32'),
    'an odd width': (random_slots(13, 5, 40), 40, 131, 'float32'),
    'whole tiles': (random_slots(16, 6, 40), 40, 128, 'float32'),
}


@pytest.mark.parametrize('case', [case if case == 'some reads elsewhere' else
                                  pytest.param(case, marks=pytest.mark.slow) for case in CASES])
def test_gradients_agree_with_float64(case, said):
    """Ids, rows, zeros where there is no read, and the weights' gradients. Twice the same bits."""
    values, slots, weights, gradient = make(*CASES[case])
    n_slots = len(values)
    rows, by_read = compact_gradients(values, slots, weights, gradient, implementation='tpu')
    assert 'the SparseCores add up compact gradients' in said.text
    is_read, of_tokens = np.asarray(slots) < n_slots, np.asarray(gradient, np.float64)
    table, wide = np.zeros((n_slots + 1, values.shape[1])), np.asarray(values, np.float64)
    np.add.at(table, np.asarray(slots), np.asarray(weights, np.float64)[..., None] * of_tokens[:, None])
    ids = np.asarray(rows.ids)
    table[n_slots] = 0
    assert rows.rows.dtype == jnp.float32 and by_read.dtype == weights.dtype
    assert error(rows.rows, table[ids]) < LIMIT['float32']
    assert not np.asarray(rows.rows)[ids == n_slots].any()
    np.testing.assert_array_equal(np.sort(ids[ids < n_slots]), np.unique(np.asarray(slots)[is_read]))
    want = np.einsum('tv,trv->tr', of_tokens, wide[np.minimum(slots, n_slots - 1)])
    assert error(by_read, np.where(is_read, want, 0)) < LIMIT['float32']
    again, _ = compact_gradients(values, slots, weights, gradient, implementation='tpu')
    np.testing.assert_array_equal(rows.rows, again.rows)


@pytest.mark.slow
@pytest.mark.parametrize('when', ['eager', 'on_wait'])
@pytest.mark.parametrize('dtype, width', [('bfloat16', 640), ('float32', 512)])
def test_nothing_is_added_before_it_is_there(when, dtype, width):
    """Rows in pieces; copies when they start or as late as they can be; memory that no copy came to
    has no numbers."""
    arrays = make(np.where(random_slots(13, 6, 4, seed=5) > 0, random_slots(13, 6, 9), 30), 30,
                  width, dtype)
    small = CHIP._replace(memory=2 ** 15)
    assert sparsecore_backward._piece(arrays[3], small) == 128
    late = pltpu.InterpretParams(dma_execution_mode=when, uninitialized_memory='nan',
                                 num_cores_or_threads=1)
    (rows, by_read), (want, want_by_read) = (embedding_bag_backward.compact_gradients(
        *arrays, interpret=interpret, chip=chip) for interpret, chip in (
            (late, small), (True, CHIP)))
    np.testing.assert_array_equal(rows.rows, want.rows)
    np.testing.assert_allclose(by_read, want_by_read, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('spread', ['evenly', 'all on one row', 'all elsewhere', 'all here'])
def test_own_rows_are_those_of_the_reference(spread, said):
    """Of one owner in four, however reads are spread: then some blocks have more than a window."""
    slots = {'evenly': random_slots(21, 6, 48), 'all on one row': np.full((21, 6), 3),
             'all here': random_slots(21, 6, 12), 'all elsewhere': np.full((21, 6), 12)}[spread]
    values, slots, weights, gradient = make(np.minimum(slots, 12), 12, 128, 'bfloat16')
    weights = jnp.where(slots < 12, weights, 0)
    (want, want_by_read), (got, by_read) = (compact_gradients(
        values, slots, weights, gradient, first=jnp.int32(7), tokens=10, owners=4,
        implementation=implementation) for implementation in ('xla', 'tpu'))
    assert 'the SparseCores add up compact gradients' in said.text
    np.testing.assert_array_equal(got.ids, want.ids)
    np.testing.assert_array_equal(got.count, want.count)
    np.testing.assert_allclose(got.rows, want.rows, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(by_read, want_by_read, rtol=1e-4, atol=1e-4)


def test_shares_are_whole_tiles_and_no_row_is_two_subcores_own():
    """Of 70 reads, five tiles of 16: two for each subcore but the last; slot 1 is in all shares."""
    slots = np.repeat([0, 1, 4, 9], [5, 63, 2, 3])      # 9: no read
    reads = own_reads.Reads(*(jnp.asarray(one) for one in (
        slots, np.arange(73) * 2, np.ones(73, np.float32))))
    told, place, (tokens, fetched, to, _) = jax.jit(
        lambda reads: sparsecore_shares.told(reads, reads.slots, 9, 9, 2, CHIP))(reads)
    told = sparsecore_shares.Told(*np.asarray(told).reshape(3, -1)[:, :4].T)
    np.testing.assert_array_equal(told.first, [0, 2, 4])
    np.testing.assert_array_equal(told.tiles, [2, 2, 1])
    np.testing.assert_array_equal(told.reads, 70)
    np.testing.assert_array_equal(told.rest_ends, [-1, 63, 67])
    np.testing.assert_array_equal(place, [9, 1, 1])
    assert {at: int(to[at]) for at in np.flatnonzero(to != -1)} == {4: 0, 31: 1, 69: 4}
    assert {at: int(fetched[at]) for at in np.flatnonzero(fetched != -1)} == {
        0: 0, 5: 1, 16: 1, 32: 1, 48: 1, 64: 1, 68: 4}
    np.testing.assert_array_equal(tokens, [*range(70), *10 * [-1]])
    rests = jnp.asarray([[np.nan, np.nan], [1, 2], [10, 20]])
    rows = sparsecore_shares.add_rests(jnp.ones((9, 2)), rests, place)
    np.testing.assert_array_equal(rows, np.where(np.arange(9)[:, None] == 1, [12, 23], 1))


@pytest.mark.parametrize('width, dtype, piece', [
    (384, 'bfloat16', 256), (768, 'bfloat16', 384), (4096, 'bfloat16', 256), (4096, 'float32', 512),
    (640, 'bfloat16', 384), (16_384, 'float32', 128), (32_768, 'float32', None)])
def test_pieces_fit_a_subcore(width, dtype, piece, monkeypatch):
    monkeypatch.undo()
    values = jax.ShapeDtypeStruct((9, width), jnp.dtype(dtype))
    v6e = sparsecore.Chip(2, 16, 8, 2 ** 18)
    assert sparsecore_backward._piece(values, v6e) == piece
    reason = sparsecore_backward.unsupported(values, values, 9, v6e)
    assert (reason is None) if piece else f'{width} columns' in reason


def test_what_does_not_fit_the_tensorcore_does(monkeypatch, said):
    monkeypatch.setattr(sparsecore, 'INTERPRETED', CHIP._replace(memory=2 ** 12))
    arrays = [jax.ShapeDtypeStruct((9, 128), jnp.float32) for _ in range(2)]
    assert embedding_bag._sparsecores('add', True, lambda chip: sparsecore_backward.unsupported(
        *arrays, 9, chip)) is None
    assert ('rows of 128 columns do not fit a subcore of 4096 bytes; the TensorCore does'
            in said.text)


@pytest.mark.parametrize('slots, n_rows, dtype, rows', [
    (2 ** 22, 2 ** 22, 'bfloat16', None), (2 ** 22 + 1, 9, 'float32', 2 ** 22 + 1),
    (2 ** 23, 2 ** 22 + 3, 'bfloat16', 2 ** 22 + 3)])
def test_no_array_is_larger_than_sparsecores_reach(slots, n_rows, dtype, rows):
    """Neither the table nor the rows of its gradient, in float32; the read needs the table alone."""
    values, gradient = (jax.ShapeDtypeStruct((n, 1024), jnp.dtype(dtype)) for n in (slots, 9))
    v6e = sparsecore.Chip(2, 16, 8, 2 ** 18)
    reason = sparsecore_backward.unsupported(values, gradient, n_rows, v6e)
    assert (reason is None) if rows is None else f'{rows} rows of 4096 bytes' in reason
    reads = sparsecore_forward.unsupported(values, 8, v6e)
    assert (reads is None) == (rows != slots)


@needs_tpu_compiler
@pytest.mark.slow
@pytest.mark.parametrize('chip', tpu_sparsecore.CHIPS)
def test_the_compiler_takes_the_gradient(chip, monkeypatch):
    """With the sizes that it is for; fourteen instructions for each read and vector of words."""
    monkeypatch.undo()
    found = tpu_sparsecore.compiled(tpu_sparsecore.gradient(768, 8, jnp.dtype('bfloat16')), chip)
    assert found.instructions == 14 * tpu_sparsecore.TOKENS * 32 * 384 // found.chip.lanes
    assert 'read_backward_on_sparsecores' in found.program.as_text()


@needs_tpu_compiler
@pytest.mark.slow
@pytest.mark.parametrize('owners, width', [(1, 384), (1, 128), (4, 192)])
def test_the_compiler_takes_all_of_it(owners, width, monkeypatch):
    """With sorts, and with the kernels of the TensorCore for weights of own reads."""
    monkeypatch.undo()
    monkeypatch.setenv(sparsecore.SETTING, '1')
    slots = tpu_sparsecore.SLOTS if owners == 1 else 4_096
    arguments = [jax.ShapeDtypeStruct(*one) for one in (
        ((slots, width), jnp.bfloat16), ((128, 32), jnp.int32), ((128, 32), jnp.float32),
        ((128, width), jnp.bfloat16), ((), jnp.int32))]
    mesh = Mesh(np.array([tpu_sparsecore.device('v6e')]), ('chip',))
    with uncached(), jax.set_mesh(mesh):
        program = jax.jit(lambda *arrays: embedding_bag.compact_backward(
            *arrays, owners=owners, tokens=128, interpret=False)).lower(*arguments).compile()
    assert 'read_backward_on_sparsecores' in program.as_text()

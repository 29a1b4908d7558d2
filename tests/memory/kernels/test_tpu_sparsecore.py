"""The read on SparseCores, interpreted subcore by subcore, against float64 and the reference."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from benchmarks import tpu_sparsecore
from pkm_jax.memory.embedding_bag import embedding_bag
from pkm_jax.memory.kernels.tpu import sparsecore, sparsecore_forward
from pkm_jax.refusal import Refusal
from tests.memory.kernels.test_tpu_embedding_bag import LIMIT, error, make, random_slots
from tests.planning.tiny import needs_tpu_compiler

CHIP = sparsecore.Chip(cores=1, subcores=2, lanes=4, memory=2 ** 16)


@pytest.fixture(autouse=True)
def few_streams(monkeypatch):
    """Tiles of four tokens, places for rows that are used several times in each."""
    monkeypatch.setattr(sparsecore_forward, 'TILE', 4)
    monkeypatch.setattr(sparsecore_forward, 'STREAMS', 2)
    jax.clear_caches()


def read(values, slots, weights, counts, interpret=True, chip=CHIP, **settings):
    return sparsecore_forward.sum_rows(values, slots, weights, jnp.asarray(counts, jnp.int32),
                                       chip=chip, interpret=interpret, **settings)


CASES = {
    'an odd number of tiles': (random_slots(19, 4, 50), 50, 128, 'float32'),
    'parts that are not full': (random_slots(9, 6, 50), 50, 256, 'bfloat16'),
    'all tokens on one slot': (np.full((9, 8), 3), 20, 256, 'bfloat16'),
    'one read, one token': (random_slots(1, 1, 9), 9, 256, 'bfloat16'),
    'first and last slot': (np.array([[0, 29], [29, 0]]), 30, 128, 'float32'),
    'a width of no whole words': (random_slots(3, 3, 7), 7, 192, 'bfloat16'),
    'an odd width': (random_slots(3, 3, 7), 7, 131, 'float32'),
}


@pytest.mark.parametrize('case', [case if case == 'parts that are not full' else
                                  pytest.param(case, marks=pytest.mark.slow) for case in CASES])
def test_sums_agree_with_float64(case):
    """Each token's first few reads alone, of one to all of them."""
    values, slots, weights, _ = make(*CASES[case])
    tokens, reads = slots.shape
    counts = 1 + np.arange(tokens) % reads
    sums = read(values, slots, weights, counts)
    own = np.where(np.arange(reads) < counts[:, None], weights, 0).astype(np.float64)
    want = np.einsum('tr,trv->tv', own, np.asarray(values, np.float64)[np.asarray(slots)])
    assert sums.dtype == values.dtype
    assert error(sums, want) < LIMIT[str(values.dtype)]


@pytest.mark.slow
@pytest.mark.parametrize('when', ['eager', 'on_wait'])
def test_nothing_is_summed_before_it_is_there(when):
    """Rows in pieces; copies when they start or as late as they can be; memory that no copy came to
    has no numbers."""
    values, slots, weights, _ = make(random_slots(9, 6, 20), 20, 512, 'bfloat16')
    counts = 1 + np.arange(9) % 6
    chip = CHIP._replace(memory=2 ** 14)
    assert sparsecore_forward._piece(values, 6, chip) == 128
    late = pltpu.InterpretParams(dma_execution_mode=when, uninitialized_memory='nan',
                                 num_cores_or_threads=1)
    np.testing.assert_array_equal(read(values, slots, weights, counts, interpret=late, chip=chip),
                                  read(values, slots, weights, counts))


@pytest.fixture
def set_and_called(monkeypatch):
    """The setting; and the chips that reads were made for since."""
    monkeypatch.setenv(sparsecore.SETTING, '1')
    called, sum_rows = [], sparsecore_forward.sum_rows
    monkeypatch.setattr(sparsecore_forward, 'sum_rows', lambda *args, **settings: called.append(
        settings['chip']) or sum_rows(*args, **settings | {'chip': CHIP}))
    return called


def some_elsewhere(share):
    away = np.random.default_rng(2).random((11, 6)) < share
    values, slots, weights, gradient = make(np.where(away, 30, random_slots(11, 6, 30)), 30, 128,
                                            'float32')
    return (values, slots, jnp.where(away, 0, weights)), gradient


@pytest.mark.parametrize('share', [.8, pytest.param(0., marks=pytest.mark.slow),
                                   pytest.param(1., marks=pytest.mark.slow)])
def test_by_the_setting_reads_are_the_references(share, set_and_called):
    """Reads made elsewhere are not added; sums keep their order, and so every bit."""
    arrays, _ = some_elsewhere(share)
    got = embedding_bag(*arrays, owners=2, implementation='tpu')
    assert set_and_called == [sparsecore.INTERPRETED]
    np.testing.assert_array_equal(got, embedding_bag(*arrays, owners=2, implementation='xla'))


@pytest.mark.slow
def test_by_the_setting_gradients_are_the_references(set_and_called):
    (values, slots, weights), gradient = some_elsewhere(.8)
    got, want = (jax.vjp(lambda v, w: embedding_bag(
        v, slots, w, owners=2, implementation=implementation),
        values, weights)[1](gradient) for implementation in ('tpu', 'xla'))
    assert set_and_called == [sparsecore.INTERPRETED]
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_words_hold_every_bit():
    values = jnp.asarray(np.random.default_rng(0).normal(size=(5, 300)), jnp.bfloat16)
    words = sparsecore.as_words(values)
    assert words.shape == (5, 256) and words.dtype == jnp.int32
    numbers = jnp.concatenate(sparsecore.widened(words), axis=1)
    np.testing.assert_array_equal(numbers[:, :300], values.astype(jnp.float32))
    assert not numbers[:, 300:].any()


@pytest.mark.parametrize('width, dtype, reads, piece', [
    (768, 'bfloat16', 128, 384), (384, 'bfloat16', 8, 256), (4096, 'bfloat16', 128, 256),
    (768, 'float32', 32, 384), (768, 'bfloat16', 1024, None)])
def test_pieces_fit_a_subcore(width, dtype, reads, piece, monkeypatch):
    monkeypatch.undo()
    values = jax.ShapeDtypeStruct((9, width), jnp.dtype(dtype))
    v6e = sparsecore.Chip(2, 16, 8, 2 ** 18)
    assert sparsecore_forward._piece(values, reads, v6e) == piece
    reason = sparsecore_forward.unsupported(values, reads, v6e)
    assert (reason is None) if piece else f'{reads} reads' in reason


def test_without_the_setting_or_sparsecores_the_tensorcore_reads(monkeypatch, caplog):
    monkeypatch.delenv(sparsecore.SETTING, raising=False)
    assert sparsecore.chosen(interpret=True) is None
    monkeypatch.setenv(sparsecore.SETTING, '1')
    with caplog.at_level(logging.WARNING):
        assert sparsecore.chosen(interpret=False) is None       # here is no TPU
        assert sparsecore.chosen(interpret=False) is None
    assert [record.message for record in caplog.records] == [
        'PKM_JAX_SPARSECORE=1: this device has no SparseCores; the TensorCore reads.']
    monkeypatch.setenv(sparsecore.SETTING, 'yes')
    with pytest.raises(Refusal, match='PKM_JAX_SPARSECORE=yes: 1 has SparseCores read, 0 the Tens'):
        sparsecore.chosen(interpret=True)


@needs_tpu_compiler
@pytest.mark.parametrize('chip', ['v6e', *(pytest.param(chip, marks=pytest.mark.slow)
                                           for chip in ('v5p', 'tpu7x'))])
def test_the_compiler_takes_the_read(chip, monkeypatch):
    """With the sizes that it is for; six instructions for each read and vector of words."""
    monkeypatch.undo()
    read = tpu_sparsecore.read(768, 8, jnp.dtype('bfloat16'))
    found = tpu_sparsecore.compiled(read, chip)
    assert found.instructions == 6 * tpu_sparsecore.TOKENS * 32 * 384 // found.chip.lanes
    assert 'read_rows_on_sparsecores' in found.program.as_text()

"""The update of rows in one pass: the kernels for TPUs interpreted, against plain jnp."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pkm_jax import dispatch
from pkm_jax.memory.sharded import no_delta
from pkm_jax.memory.sparse_rows import SparseRows
from pkm_jax.mesh import Shards, make_mesh
from pkm_jax.optimizers import rules, sparse, tpu_few_rows, tpu_rows
from pkm_jax.optimizers.groups import group_norms

OPTIMIZERS = {'sparse_sgd': sparse.sparse_sgd, 'lazy_adam': sparse.lazy_adam,
              'rowwise_adam': sparse.rowwise_adam, 'rowwise_adagrad': sparse.rowwise_adagrad}
names = pytest.mark.parametrize('name', OPTIMIZERS)
SLOTS, PLACES, TILE = 300, 37, 8
# Of every row a place, the last block not full; of few the last tile not full: no row, as many as
# there are places, the last one alone, pairs within a tile and over the border of two, both halves.
ALL = {'none': [], 'all': range(SLOTS), 'one': [299], 'some': range(0, SLOTS, 7)}
FEW = {'none': [], 'full': range(100, 100 + PLACES), 'one': [299],
       'pairs': [0, 1, 3, 4, 5, 8, 11, 12, 13, 20, 22, 298, 299], 'odd': range(1, 2 * PLACES, 2)}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Three blocks of rows, the last one not full, and two of columns where they are whole."""
    monkeypatch.setattr(tpu_rows, 'ROWS', 128)
    monkeypatch.setattr(tpu_rows, 'BLOCK', 128 * 128)
    monkeypatch.setattr(tpu_few_rows, 'tile_of', lambda places, width: min(TILE, places))


def gradients(width, used_rows, places, parts=1):
    """For each set of rows SparseRows, of so many parts by rows; unused places hold nothing good."""
    rng = np.random.default_rng(1)
    for used in used_rows.values():
        used, size = np.asarray(used, np.int32), SLOTS // parts
        ids = np.full((parts, places // parts), SLOTS, np.int32)
        for part, its in enumerate(ids):
            own = used[used // size == part]
            its[own - part * size if places == SLOTS else slice(len(own))] = own
        rows = rng.normal(size=(places, width))
        rows[ids.reshape(-1) == SLOTS] = 0
        yield SparseRows(jnp.asarray(ids.reshape(-1)), jnp.asarray(rows, jnp.float32),
                         jnp.asarray(np.sum(ids < SLOTS, 1), jnp.int32))


def steps(name, dtype, given, split=False, clip=None):
    """Table, state and norm of the update after steps with each gradient."""
    optimizer = OPTIMIZERS[name](0.1)
    if clip:
        optimizer = optax.chain(sparse.clip_by_global_norm(clip), optimizer)
    table = np.random.default_rng(0).normal(size=(SLOTS, given[0].rows.shape[1]))
    params = {'values': jnp.asarray(table, dtype)}

    @jax.jit
    def take(params, state, gradient, key):
        settings = {} if split else {'rounding': key}
        updates, state = optimizer.update({'values': gradient}, state, params, **settings)
        norm = group_norms(sparse.norms_of(updates), {'values'})['values']
        return sparse.apply_updates(params, updates, key), state, norm

    state, found = optimizer.init(params), []
    for number, gradient in enumerate(given):
        params, state, norm = take(params, state, gradient, jax.random.key(number))
        found.append((params, state, norm))
    return found


def check_same(ours, theirs, exact=True):
    """Table and moments to the bit, or but for rounding; norms but for their order of sums."""
    for got, want in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(got[2], want[2], rtol=1e-5)
        for one, other in zip(*map(jax.tree.leaves, (got[:2], want[:2])), strict=True):
            if exact:
                np.testing.assert_array_equal(one, other)
            else:
                np.testing.assert_allclose(one, other, rtol=2e-6, atol=1e-6)


@pytest.fixture
def by_kernels(monkeypatch):
    """Has the update made by the kernels for TPUs, from when it is called."""
    choice = rules.update_rows
    return lambda: monkeypatch.setattr(
        rules, 'update_rows', lambda _, *arrays, **static: choice('tpu', *arrays, **static))


@names
@pytest.mark.parametrize('dtype, width', [('float32', 256), ('bfloat16', 256), ('bfloat16', 72)])
def test_the_kernel_of_all_rows_changes_them_as_plain_jnp_does(name, dtype, width, by_kernels):
    given = list(gradients(width, ALL, SLOTS))
    want = steps(name, dtype, given)
    by_kernels()
    check_same(steps(name, dtype, given), want)


@names
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_the_kernel_of_few_rows_changes_them_as_plain_jnp_does(name, dtype, by_kernels):
    given = list(gradients(256, FEW, PLACES))
    want = steps(name, dtype, given)
    by_kernels()
    check_same(steps(name, dtype, given), want)

"""The update of rows in one pass: the kernels for TPUs interpreted, against plain jnp."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import pallas as pl

from pkm_jax import dispatch
from pkm_jax.memory.sparse_rows import SparseRows
from pkm_jax.mesh import OWN, Shards, make_mesh
from pkm_jax.optimizers import rules, sparse, tpu_few_rows, tpu_rows
from pkm_jax.optimizers.groups import group_norms

OPTIMIZERS = {'sparse_sgd': sparse.sparse_sgd, 'lazy_adam': sparse.lazy_adam,
              'rowwise_adam': sparse.rowwise_adam, 'rowwise_adagrad': sparse.rowwise_adagrad}
SLOTS, PLACES, TILE = 300, 37, 8
# Of every row a place, the last block not full; of few the last tile not full: no row, as many as
# there are places, the last one alone, pairs within a tile and over the border of two, both halves.
ALL = {'none': [], 'all': range(SLOTS), 'one': [299], 'some': range(0, SLOTS, 7)}
FEW = {'none': [], 'full': range(100, 100 + PLACES), 'one': [299],
       'pairs': [0, 1, 3, 4, 5, 8, 11, 12, 13, 20, 22, 298, 299], 'odd': range(1, 2 * PLACES, 2)}


def fast_are(fast, cases):
    """The cases, of which all but the fast ones are marked slow."""
    return [case if case in fast else pytest.param(*case, marks=pytest.mark.slow)
            for case in cases]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Three blocks of rows, the last one not full, and two of columns where they are whole."""
    monkeypatch.setattr(tpu_rows, 'ROWS', 128)
    monkeypatch.setattr(tpu_rows, 'BLOCK', 128 * 128)
    monkeypatch.setattr(tpu_few_rows, 'tile_of', lambda places, width: min(TILE, places))


def gradients(width, used_rows, places, parts=1):
    """For each set of rows SparseRows, of so many parts by rows; unused places hold zeros."""
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


def steps(name, dtype, given, split=False, clip=None, place=lambda tree: tree):
    """Table, state and norm of the update after steps with each gradient, of arrays in a place."""
    optimizer = OPTIMIZERS[name](0.1)
    if clip:
        optimizer = optax.chain(sparse.clip_by_global_norm(clip), optimizer)
    table = np.random.default_rng(0).normal(size=(SLOTS, given[0].rows.shape[1]))
    params = place({'values': jnp.asarray(table, dtype)})

    @jax.jit
    def take(params, state, gradient, key):
        settings = {} if split else {'rounding': key}
        updates, state = optimizer.update({'values': gradient}, state, params, **settings)
        norm = group_norms(sparse.norms_of(updates), {'values'})['values']
        return sparse.apply_updates(params, updates, key), state, norm

    state, found = optimizer.init(params), []
    for number, gradient in enumerate(given):
        params, state, norm = take(params, state, place(gradient), jax.random.key(number))
        found.append((params, state, norm))
    return found


def check_same(ours, theirs, exact=True):
    """Table and moments to the bit, or but for rounding; norms but for their order of sums."""
    for got, want in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(got[2], want[2], rtol=1e-5)
        for one, other in zip(*map(jax.tree.leaves, (got[:2], want[:2])), strict=True):
            if exact and jax.__version_info__ < (0, 12):
                np.testing.assert_array_equal(one, other)
            elif exact:     # there XLA joins a product and a sum on one side: of a number in 76,800
                assert np.mean(np.asarray(one != other)) < 1e-4
                one, other = (np.asarray(array, np.float32) for array in (one, other))
                np.testing.assert_allclose(one, other, rtol=2 ** -7, atol=1e-6)
            else:
                np.testing.assert_allclose(one, other, rtol=2e-6, atol=1e-6)


@pytest.fixture
def by_kernels(monkeypatch):
    """Has the update made by the kernels for TPUs, or for others, from when it is called."""
    choice = rules.update_rows
    return lambda platform='tpu': monkeypatch.setattr(
        rules, 'update_rows', lambda _, *arrays, **static: choice(platform, *arrays, **static))


@pytest.mark.parametrize('name, dtype, width', fast_are(
    [('rowwise_adam', 'bfloat16', 256), ('lazy_adam', 'bfloat16', 72), ('sparse_sgd', 'float32', 256)],
    [(name, *table) for name in OPTIMIZERS
     for table in (('float32', 256), ('bfloat16', 256), ('bfloat16', 72))]))
def test_the_kernel_of_all_rows_changes_them_as_plain_jnp_does(name, dtype, width, by_kernels):
    given = list(gradients(width, ALL, SLOTS))
    want = steps(name, dtype, given)
    by_kernels()
    check_same(steps(name, dtype, given), want)


@pytest.mark.parametrize('name, dtype', fast_are(
    [('rowwise_adam', 'bfloat16')],
    [(name, dtype) for name in OPTIMIZERS for dtype in ('float32', 'bfloat16')]))
def test_the_kernel_of_few_rows_changes_them_as_plain_jnp_does(name, dtype, by_kernels):
    given = list(gradients(256, FEW, PLACES))
    want = steps(name, dtype, given)
    by_kernels()
    check_same(steps(name, dtype, given), want)


@pytest.mark.parametrize('name, sets', fast_are(
    [('rowwise_adam', 'few')], [(name, sets) for name in OPTIMIZERS for sets in ('all', 'few')]))
def test_what_is_not_finite_stays_in_its_row(name, sets, by_kernels):
    """A row of the table and one of the gradients, each in one word with a row updated with it."""
    used, places = {'all': (ALL, SLOTS), 'few': (FEW, PLACES)}[sets]
    given, (of_table, of_gradient) = list(gradients(256, used, places)), (0, 5)

    def spoil(tree):
        if isinstance(tree, SparseRows):
            return tree._replace(rows=jnp.where(
                (tree.ids == of_gradient)[:, None], jnp.nan, tree.rows))
        return {'values': tree['values'].at[of_table].set(jnp.inf)}

    by_kernels()
    clean = steps(name, 'bfloat16', given)
    for ours, theirs in zip(steps(name, 'bfloat16', given, place=spoil), clean, strict=True):
        for one, other in zip(*map(jax.tree.leaves, (ours[:2], theirs[:2])), strict=True):
            one, other = map(np.atleast_1d, (one, other))
            rows = np.setdiff1d(np.arange(len(one)), (of_table, of_gradient))
            np.testing.assert_array_equal(one[rows], other[rows])
    table = np.asarray(ours[0]['values'], np.float32)
    assert np.isinf(table[of_table]).all() and np.isnan(table[of_gradient]).all()


@pytest.mark.parametrize('name, sets, dtype', fast_are(
    [('rowwise_adagrad', 'all', 'bfloat16'), ('rowwise_adam', 'few', 'bfloat16')],
    [(name, sets, dtype) for name in OPTIMIZERS for sets in ('all', 'few')
     for dtype in ('float32', 'bfloat16')]))
def test_one_pass_is_update_and_apply(name, sets, dtype):
    used, places = {'all': (ALL, SLOTS), 'few': (FEW, PLACES)}[sets]
    given = list(gradients(40, used, places))
    check_same(steps(name, dtype, given), steps(name, dtype, given, split=True))


@pytest.mark.parametrize('places, used', [
    pytest.param(SLOTS, ALL, marks=pytest.mark.slow), (PLACES, FEW)], ids=['all', 'few'])
def test_clipping_is_that_of_rows_that_are_scaled_before(places, used, by_kernels):
    """Steps that are clipped and some that are not, by kernels; against Optax's clipping."""
    given = list(gradients(128, used, places))
    clip = float(jnp.linalg.norm(given[-2].rows)) * 1.01

    def clipped(gradient):
        rows, _ = optax.clip_by_global_norm(clip).update(gradient.rows, optax.EmptyState())
        return gradient._replace(rows=rows)

    want = steps('rowwise_adam', 'float32', [clipped(gradient) for gradient in given])
    by_kernels()
    check_same(steps('rowwise_adam', 'float32', given, clip=clip), want, exact=False)


@pytest.mark.parametrize('platform, shards, few', fast_are(
    [('tpu', Shards(2, 2, 2), True), ('gpu', Shards(2, 2, 2), True)],
    [(platform, shards, few) for platform in ('tpu', 'gpu') for few in (False, True)
     for shards in (Shards(1, 2, 4), Shards(2, 2, 2), Shards(1, 1, 8), Shards(4, 2, 1))]))
def test_parts_by_kernels_change_as_one_device_does(platform, shards, few, by_kernels):
    """Of bfloat16, with the same random bits; the sum of squares of a row has another order."""
    places = 10 * shards.rows if few else SLOTS
    used = {'some': range(0, SLOTS, 33), 'other': range(1, SLOTS, 34)} if few else ALL
    given = list(gradients(1024, used, places, shards.rows))
    want = steps('rowwise_adam', 'bfloat16', given)
    by_kernels(platform)
    with jax.set_mesh(make_mesh(shards)):
        got = steps('rowwise_adam', 'bfloat16', given)
    for ours, theirs in zip(got, want, strict=True):
        np.testing.assert_allclose(ours[2], theirs[2], rtol=1e-5)
        for one, other in zip(*map(jax.tree.leaves, (ours[1], theirs[1])), strict=True):
            np.testing.assert_allclose(one, other, rtol=2e-6, atol=1e-7)
        one, other = (np.asarray(found[0]['values'], np.float32) for found in (ours, theirs))
        assert np.mean(one != other) < 1e-4
        np.testing.assert_allclose(one, other, rtol=2 ** -7)


@pytest.mark.slow
@pytest.mark.parametrize('split', [False, True])
@pytest.mark.parametrize('places, used', [(SLOTS, ALL), (40, {'some': range(0, SLOTS, 33)})])
def test_axes_may_be_explicit(places, used, split):
    given = list(gradients(8, used, places, 2))
    want = steps('rowwise_adam', 'bfloat16', given)
    mesh = jax.make_mesh((2, 2, 2), OWN.names, axis_types=(jax.sharding.AxisType.Explicit,) * 3)

    def place(tree):
        return jax.tree.map(lambda array: jax.device_put(array, jax.NamedSharding(
            mesh, jax.P(*OWN.table[:array.ndim]))), tree)

    with jax.set_mesh(mesh):
        got = steps('rowwise_adam', 'bfloat16', given, split, place=place)
    for ours, theirs in zip(got, want, strict=True):
        assert ours[0]['values'].sharding.spec == OWN.table
        np.testing.assert_allclose(ours[2], theirs[2], rtol=1e-5)
        np.testing.assert_allclose(*(np.asarray(found[0]['values'], np.float32)
                                     for found in (ours, theirs)), rtol=2 ** -7)


@pytest.mark.parametrize('places, width, dtype, how', [
    (SLOTS, 72, 'bfloat16', 'a TPU kernel'), (PLACES, 128, 'float32', 'a TPU kernel'),
    (PLACES, 72, 'float32', 'no kernel for 72 columns of a table of which few rows change'),
    (SLOTS, 1100, 'float32', 'no kernel for 1100 columns'),
    (SLOTS, 128, 'float16', 'no kernel for a table of float16')])
def test_kernels_are_chosen_for_tpus(places, width, dtype, how):
    optimizer = sparse.rowwise_adam(0.1)
    params = {'values': jnp.zeros((SLOTS, width), dtype)}
    gradient = {'values': next(gradients(width, {'one': [1]}, places))}
    with dispatch.recorded() as found:
        jax.jit(optimizer.update).trace(gradient, optimizer.init(params), params,
                                        rounding=jax.random.key(0)).lower(lowering_platforms=('tpu',))
    assert how in found['update of rows'][0]


def test_says_what_few_rows_need():
    reason = tpu_few_rows.unsupported(jax.ShapeDtypeStruct((9, 128), jnp.bfloat16))
    assert reason and 'odd number of rows' in reason
    assert tpu_few_rows.unsupported(jax.ShapeDtypeStruct((9, 128), jnp.float32)) is None


def test_words_are_pairs_of_rows_as_pallas_has_them():
    table = jnp.asarray(np.random.default_rng(0).normal(size=(16, 128)), jnp.bfloat16)

    def read(table, words):
        words[...] = table.bitcast(jnp.int32)[...]

    words = pl.pallas_call(read, jax.ShapeDtypeStruct((8, 128), jnp.int32), interpret=True)(table)
    np.testing.assert_array_equal(tpu_few_rows.words_of(table), words)
    np.testing.assert_array_equal(tpu_few_rows.rows_of_words(words), table)


def test_both_rows_of_a_pair_put_back_the_same_words():
    """Since nobody knows whose copy arrives last: in a tile of 7 places, 6 of them in use."""
    slots, size = [3, 4, 5, 8, 10, 11, 10], 6
    flags = jax.jit(lambda ids: [tpu_few_rows._flags(ids, place, size) for place in range(size)])(
        jnp.asarray(slots)[None, None])
    alone, odd, paired = 0, tpu_few_rows.ODD, tpu_few_rows.PAIRED
    assert flags == [odd, paired, odd | paired, alone, paired, odd | paired]
    rng = np.random.default_rng(0)
    change = rng.normal(size=(size, 128)).astype(np.float32)
    lower, upper = rng.normal(size=(2, 6, 128)).astype(np.float32).view(np.uint32) >> 16
    words = (lower | upper << 16).view(np.int32)[np.asarray(slots[:size]) // 2]
    changed = jax.jit(tpu_few_rows._changed_words)(
        words, change, *(jnp.asarray(numbers)[:, None] for numbers in (slots[:size], flags)),
        jnp.zeros(4, jnp.int32))
    np.testing.assert_array_equal(changed[1], changed[2])
    np.testing.assert_array_equal(changed[4], changed[5])
    np.testing.assert_array_equal(changed[0] & 0xFFFF, words[0] & 0xFFFF)
    np.testing.assert_array_equal(changed[3] >> 16, words[3] >> 16)
    assert np.all(np.mean(changed != words, axis=1) > .9)

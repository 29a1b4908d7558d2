"""Updates of the rows that were read: by hand, against PyTorch, and everything else to the bit."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pkm_jax.memory.sparse_rows import SparseRows
from pkm_jax.optimizers.rounding import round_stochastically
from pkm_jax.optimizers.sparse import (
    apply_updates,
    lazy_adam,
    rowwise_adagrad,
    rowwise_adam,
    sparse_sgd,
)
from pkm_jax.refusal import Refusal

GOLDEN = Path(__file__).parent / 'goldens' / 'sparse_adam.npz'
SLOTS, WIDTH = 12, 5
ALL = {'sparse_sgd': sparse_sgd, 'lazy_adam': lazy_adam, 'rowwise_adam': rowwise_adam,
       'rowwise_adagrad': rowwise_adagrad}


def compact(ids, rows, capacity=8):
    """SparseRows with unused places at their end."""
    unused = capacity - len(ids)
    return SparseRows(jnp.asarray(np.pad(ids, (0, unused), constant_values=SLOTS), jnp.int32),
                      jnp.asarray(np.pad(rows, ((0, unused), (0, 0))), jnp.float32),
                      jnp.asarray([len(ids)], jnp.int32))


def draw(seed, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    ids = np.sort(rng.choice(SLOTS, 4, replace=False))
    table = jnp.asarray(rng.normal(size=(SLOTS, WIDTH)), dtype)
    return table, compact(ids, rng.normal(size=(4, WIDTH))), ids


def taker(optimizer):
    """One step of an optimizer on {'table': …}, compiled."""
    @jax.jit
    def take(params, state, gradient, step):
        updates, state = optimizer.update({'table': gradient}, state, params)
        return apply_updates(params, updates, jax.random.key(step)), state
    return take


def test_lazy_adam_is_the_sparse_adam_of_torch():
    """Table and both moments, over steps that read different rows; see make_sparse_adam.py."""
    golden = np.load(GOLDEN)
    optimizer = lazy_adam(0.02, 0.9, 0.99, 1e-3)
    params = {'table': jnp.asarray(golden['start'])}
    state, take = optimizer.init(params), taker(optimizer)
    for step in range(6):
        params, state = take(params, state, compact(golden[f'ids{step}'], golden[f'rows{step}']),
                             step)
        for ours, name in zip((params, *state.moments), ('table', 'first', 'second')):
            np.testing.assert_allclose(ours['table'], golden[f'{name}{step}'], rtol=2e-6,
                                       atol=1e-7, err_msg=f'{name} {step}')
    np.testing.assert_array_equal(params['table'][10:], golden['start'][10:])


def test_sparse_sgd_is_dense_sgd():
    rate = optax.linear_schedule(0.5, 0.1, 3)
    table, gradient, ids = draw(0)
    dense = jnp.zeros_like(table).at[ids].set(gradient.rows[:4])
    ours, theirs = {'table': table}, {'table': table}
    sparse, plain = sparse_sgd(rate), optax.sgd(rate)
    states = [sparse.init(ours), plain.init(theirs)]
    for step in range(3):
        ours, states[0] = taker(sparse)(ours, states[0], gradient, step)
        updates, states[1] = plain.update({'table': dense}, states[1])
        theirs = optax.apply_updates(theirs, updates)
        np.testing.assert_allclose(ours['table'], theirs['table'], rtol=1e-6)


def test_rowwise_adagrad_by_hand():
    table, gradient, ids = draw(1)
    optimizer = rowwise_adagrad(0.1, epsilon=0.)
    params, state = {'table': table}, optimizer.init({'table': table})
    rows, total = np.asarray(gradient.rows[:4]), 0.
    expected = np.array(table)
    for step in range(2):
        params, state = taker(optimizer)(params, state, gradient, step)
        total = total + np.mean(rows ** 2, axis=1, keepdims=True)
        expected[ids] -= 0.1 * rows / np.sqrt(total)
    np.testing.assert_allclose(params['table'], expected, rtol=1e-5)
    assert state.moments[0]['table'].shape == (SLOTS,)


def test_rowwise_adam_is_lazy_adam_where_a_row_has_one_size():
    table, gradient, _ = draw(2)
    signs = gradient._replace(rows=jnp.sign(gradient.rows) * 3)
    results = []
    for make in (lazy_adam, rowwise_adam):
        optimizer = make(0.1)
        params, state = {'table': table}, optimizer.init({'table': table})
        for step in range(2):
            params, state = taker(optimizer)(params, state, signs, step)
        results.append(params['table'])
    np.testing.assert_allclose(*results, rtol=1e-6)
    assert state.moments[1]['table'].shape == (SLOTS,)


@pytest.mark.parametrize('name', ALL)
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_rows_not_read_keep_every_bit(name, dtype):
    """Of the table and of moments that were moved before."""
    table, gradient, ids = draw(3, dtype)
    optimizer = ALL[name](0.1)
    everything = SparseRows(jnp.arange(SLOTS, dtype=jnp.int32), jnp.ones((SLOTS, WIDTH)),
                            jnp.asarray([SLOTS], jnp.int32))
    take = taker(optimizer)
    params, state = take({'table': table}, optimizer.init({'table': table}), everything, 0)
    after, state_after = take(params, state, gradient, 1)
    rest = np.setdiff1d(np.arange(SLOTS), ids)
    tables = [leaf for leaf in jax.tree.leaves((params, state)) if leaf.ndim]
    assert len(tables) == {'sparse_sgd': 1, 'lazy_adam': 3, 'rowwise_adam': 3,
                           'rowwise_adagrad': 2}[name]
    for before, leaf in zip(tables, (x for x in jax.tree.leaves((after, state_after)) if x.ndim)):
        np.testing.assert_array_equal(leaf[rest], before[rest])
        assert np.all(np.any(np.asarray(leaf[ids] != before[ids]).reshape(4, -1), axis=1))


@pytest.mark.parametrize('name', ALL)
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_rows_in_the_order_of_slots_change_what_compact_ones_do_to_the_bit(name, dtype):
    """Tables and moments, over three steps; places not in use hold what must not be taken."""
    optimizer = ALL[name](0.1)
    take, results = taker(optimizer), []
    for in_order in (False, True):
        params = {'table': draw(5, dtype)[0]}
        state = optimizer.init(params)
        for step in range(3):
            _, gradient, ids = draw(10 + step)
            if in_order:
                used = np.isin(np.arange(SLOTS), ids)
                rows = np.full((SLOTS, WIDTH), np.nan, np.float32)
                rows[ids] = gradient.rows[:4]
                gradient = SparseRows(jnp.where(used, jnp.arange(SLOTS), SLOTS).astype(jnp.int32),
                                      jnp.asarray(rows), gradient.count)
            params, state = take(params, state, gradient, step)
        results.append((params, state))
    for compacted, ordered in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_array_equal(ordered, compacted)


def test_other_parameters_get_ordinary_updates_by_partition():
    table, gradient, _ = draw(4)
    params = {'table': table, 'bias': jnp.ones(3)}
    optimizer = optax.partition({'rows': lazy_adam(0.1), 'dense': optax.sgd(1.)},
                                {'table': 'rows', 'bias': 'dense'})
    updates, _ = optimizer.update({'table': gradient, 'bias': jnp.full(3, .25)},
                                  optimizer.init(params), params)
    after = apply_updates(params, updates, jax.random.key(0))
    alone = taker(lazy_adam(0.1))({'table': table}, lazy_adam(0.1).init({'table': table}),
                                  gradient, 0)[0]
    np.testing.assert_array_equal(after['bias'], np.full(3, .75))
    np.testing.assert_allclose(after['table'], alone['table'], rtol=1e-6)


def test_rounding_keeps_the_mean():
    """To within 5 standard errors, of numbers whose neighbours in bfloat16 are 2⁻⁷ apart."""
    value, draws = 1.0 + 0.3 * 2. ** -7, 40_000
    rows = jnp.full((draws // 8, 8), value)
    rounded = np.asarray(round_stochastically(rows, jnp.arange(draws // 8), jax.random.key(0)),
                         np.float64)
    assert set(np.unique(rounded)) == {1., 1. + 2 ** -7}
    np.testing.assert_allclose((rounded.mean() - 1) * 2 ** 7, 0.3, atol=5 * (.21 / draws) ** .5)
    by_column, by_row = rounded.mean(0), rounded[:4000].reshape(4, -1).mean(1)
    np.testing.assert_allclose((by_column - 1) * 2 ** 7, .3, atol=5 * (.21 / 5000) ** .5)
    np.testing.assert_allclose((by_row - 1) * 2 ** 7, .3, atol=5 * (.21 / 8000) ** .5)


def test_rounding_leaves_what_needs_none_and_differs_by_key():
    exact = jnp.asarray([[0., -2.5, 1.5, jnp.inf, -jnp.inf]])
    ids = jnp.asarray([3])
    np.testing.assert_array_equal(round_stochastically(exact, ids, jax.random.key(0)), exact)
    assert jnp.isnan(round_stochastically(jnp.full((1, 5), jnp.nan), ids, jax.random.key(0))).all()
    rows = jnp.full((64, 5), 1.001)
    one, same, other = (round_stochastically(rows, jnp.arange(64), jax.random.key(k))
                        for k in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert np.any(one != other)


@pytest.mark.parametrize('name', ALL)
def test_no_temporary_is_of_table_size(name):
    """S = 2²⁴ and 2,048 tokens of 4 reads: in place, and the same at a quarter of S."""
    rows = 2048 * 4

    def temporaries(n_slots):
        like = lambda tree: jax.tree.map(  # noqa: E731
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)
        params = {'table': jax.ShapeDtypeStruct((n_slots, WIDTH), jnp.float32)}
        gradient = SparseRows(*(jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in (
            ((rows,), jnp.int32), ((rows, WIDTH), jnp.float32), ((1,), jnp.int32))))
        optimizer = ALL[name](0.1)

        def step(params, state, gradient):
            updates, state = optimizer.update({'table': gradient}, state, params)
            return apply_updates(params, updates, jax.random.key(0)), state

        state = like(jax.eval_shape(optimizer.init, params))
        return jax.jit(step, donate_argnums=(0, 1)).lower(
            params, state, gradient).compile().memory_analysis()

    large, small = temporaries(2 ** 24), temporaries(2 ** 22)
    assert large.temp_size_in_bytes == small.temp_size_in_bytes < rows * WIDTH * 4 * 8
    assert large.alias_size_in_bytes >= 2 ** 24 * WIDTH * 4


def test_tables_are_asked_for_where_they_shall_change():
    optimizer, params = rowwise_adam(.1), jnp.ones((4, 2))
    gradient = SparseRows(jnp.array([1]), jnp.ones((1, 2)), jnp.array([1]))
    with pytest.raises(Refusal, match=r'rounding=key\) changes the tables too: give it params'):
        optimizer.update(gradient, optimizer.init(params), rounding=jax.random.key(0))


@pytest.mark.parametrize('name', ALL)
def test_without_a_table_there_is_nothing_to_change(name):
    """A model without memory, by the same optimizer."""
    optimizer = ALL[name](.1)
    updates, state = optimizer.update({}, optimizer.init({}), {})
    assert updates == {} and int(state.count) == 1

"""The update of rows in one pass: the kernel for TPUs interpreted, against plain jnp."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pkm_jax.memory.sparse_rows import SparseRows
from pkm_jax.optimizers import sparse, tpu_rows
from pkm_jax.optimizers.groups import group_norms

RULES = {'lazy_adam': sparse.lazy_adam, 'rowwise_adam': sparse.rowwise_adam,
         'rowwise_adagrad': sparse.rowwise_adagrad}
SLOTS = 300
USED = {'none': [], 'all': range(SLOTS), 'one': [299], 'some': range(0, SLOTS, 7)}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Three blocks of rows, the last one not full, and two of columns where they are whole."""
    monkeypatch.setattr(tpu_rows, 'ROWS', 128)
    monkeypatch.setattr(tpu_rows, 'BLOCK', 128 * 128)


def steps(name, dtype, width, split=False):
    """Table, state and norm of the update after steps with each set of rows."""
    optimizer = RULES[name](0.1)
    rng = np.random.default_rng(0)
    params = {'values': jnp.asarray(rng.normal(size=(SLOTS, width)), dtype)}

    @jax.jit
    def take(params, state, gradient, key):
        settings = {} if split else {'rounding': key}
        updates, state = optimizer.update({'values': gradient}, state, params, **settings)
        norm = group_norms(sparse.norms_of(updates), {'values'})['values']
        return sparse.apply_updates(params, updates, key), state, norm

    state, found = optimizer.init(params), []
    for number, used in enumerate(USED.values()):
        used = np.isin(np.arange(SLOTS), used)
        rows = np.where(used[:, None], rng.normal(size=(SLOTS, width)), 0)
        gradient = SparseRows(jnp.where(used, jnp.arange(SLOTS), SLOTS).astype(jnp.int32),
                              jnp.asarray(rows, jnp.float32), jnp.asarray([used.sum()], jnp.int32))
        params, state, norm = take(params, state, gradient, jax.random.key(number))
        found.append((params, state, norm))
    return found


def forced(monkeypatch, implementation):
    choice = sparse._update_choice
    monkeypatch.setattr(sparse, '_update_choice', lambda _, *arrays, **static: choice(
        implementation, *arrays, **static))


@pytest.mark.parametrize('name', RULES)
@pytest.mark.parametrize('dtype, width', [('float32', 256), ('bfloat16', 256), ('bfloat16', 72)])
def test_the_kernel_changes_rows_as_plain_jnp_does(name, dtype, width, monkeypatch):
    """To the bit, with the same random bits: table, moments; norms but for their order of sums."""
    want = steps(name, dtype, width)
    forced(monkeypatch, 'tpu')
    for got, expected in zip(steps(name, dtype, width), want, strict=True):
        np.testing.assert_allclose(got[2], expected[2], rtol=1e-5)
        for one, other in zip(*map(jax.tree.leaves, (got[:2], expected[:2])), strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize('name', RULES)
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_one_pass_is_update_and_apply(name, dtype):
    for got, want in zip(steps(name, dtype, 40), steps(name, dtype, 40, split=True), strict=True):
        np.testing.assert_allclose(got[2], want[2], rtol=1e-5)
        for one, other in zip(*map(jax.tree.leaves, (got[:2], want[:2])), strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize('shape, dtype, word', [
    ((9, 128), 'float16', 'float16'), ((9, 1100), 'float32', '1100 columns'),
    ((9, 1152), 'float32', None), ((9, 96), 'bfloat16', None)])
def test_says_what_it_does_not_support(shape, dtype, word):
    reason = tpu_rows.unsupported(jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)), rule=None)
    assert (reason is None) if word is None else word in reason

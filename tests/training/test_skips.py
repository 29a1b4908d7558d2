"""A step whose loss or gradient is none to learn from leaves everything but its number as it was."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pkm_jax.memory.sparse_rows import SparseRows
from pkm_jax.mesh import Shards
from pkm_jax.optimizers.skips import is_sound, limit_loss
from pkm_jax.optimizers.sparse import ChangedTable, lazy_adam
from tests.training.test_layouts import ONE, SHARED, Training, batch

pytestmark = pytest.mark.usefixtures('compile_once')


def with_a_bad_row(seed):
    """A batch of which one example, and so one micro-batch, has no finite loss."""
    bad = batch(seed)
    bad['mlm_weights'][-1] = np.nan
    return bad


def assert_same(state, other, but=('step',)):
    for field in state._fields:
        if field not in but:
            for (path, ours), theirs in zip(
                    jax.tree_util.tree_leaves_with_path(getattr(state, field)),
                    jax.tree.leaves(getattr(other, field)), strict=True):
                np.testing.assert_array_equal(
                    _bits(ours), _bits(theirs),
                    err_msg=field + jax.tree_util.keystr(path))


def _bits(array):
    return np.atleast_1d(np.asarray(array)).view(np.uint8)


@pytest.mark.parametrize('shards, options', [
    pytest.param(ONE, dict(sparse=False), marks=pytest.mark.slow),
    (ONE, dict(sparse=True)),
    pytest.param(Shards(2, 2, 2), dict(sparse=True, accumulation_steps=2),
                 marks=pytest.mark.slow),
    pytest.param(ONE, dict(sparse=True, accumulation_steps=2, model=SHARED,
                           values_optimizer='rowwise_adagrad'), marks=pytest.mark.slow),
    pytest.param(ONE, dict(sparse=False, optimizer='lamb', skip_loss_spikes=3.),
                 marks=pytest.mark.slow),
    pytest.param(ONE, dict(sparse=True, values_optimizer='sgd'), marks=pytest.mark.slow),
], ids=['dense', 'sparse', 'split', 'shared', 'lamb', 'sgd'])
def test_a_step_that_is_not_finite_changes_its_number_alone(shards, options):
    """Parameters, tables, moments, counts, batch statistics and marks, bit for bit."""
    training = Training(shards, **options)
    with jax.set_mesh(training.mesh):
        before, metrics = training.take(training.start(), batch(0))
        assert int(metrics['skipped']) == 0
        after, metrics = training.take(before, with_a_bad_row(1))
        assert int(metrics['skipped']) == 1 and not np.isfinite(metrics['grad_norm'])
        assert int(after.step) == int(before.step) + 1
        assert_same(after, before)
        good, metrics = training.take(after, batch(2))
        assert int(metrics['skipped']) == 0
        other, _ = training.take(before._replace(step=after.step), batch(2))
        assert_same(good, other, but=())
        changed = [np.any(np.asarray(ours) != np.asarray(theirs)) for ours, theirs in zip(
            jax.tree.leaves(good.params), jax.tree.leaves(after.params))]
        assert np.mean(changed) > .8


def test_a_loss_above_its_limit_is_not_sound():
    """The inner optimizer is asked as the outer one is: here for a table changed in one pass."""
    optimizer, params = limit_loss(lazy_adam(.1), 2.), jnp.ones((4, 2))
    gradient = SparseRows(jnp.array([1, 4]), jnp.ones((2, 2)), jnp.array([1]))
    state = optimizer.init(params)
    for loss, limit in (3., 6.), (1., 6. + .01 * (2. - 6.)):
        updates, state = optimizer.update(gradient, state, params, loss=jnp.float32(loss),
                                          rounding=jax.random.key(0))
        assert isinstance(updates, ChangedTable) and state.limit == pytest.approx(limit)
    for loss, sound in (5.9, True), (6., False), (np.nan, False):
        assert bool(is_sound(jnp.float32(loss), jnp.float32(1.), state)) == sound


@pytest.mark.slow
@pytest.mark.parametrize('sparse', [False, True])
def test_a_loss_above_a_multiple_of_its_mean_is_skipped(sparse):
    training = Training(ONE, sparse=sparse, skip_loss_spikes=1.5)
    with jax.set_mesh(training.mesh):
        state, metrics = training.take(training.start(), batch(0))
        limit = 1.5 * float(metrics['loss'])
        assert float(state.optimizer.limit) == pytest.approx(limit)
        spike = batch(1)
        spike['mlm_weights'][:, 0] = 9.     # of the loss alone: its terms are those of `arrays`
        after, metrics = training.take(state, spike)
        spiked = float(metrics['loss']) > limit
        assert int(metrics['skipped']) == spiked
        tight = state._replace(optimizer=state.optimizer._replace(
            limit=np.float32(.9 * float(metrics['loss']))))
        after, metrics = training.take(tight, spike)
        assert int(metrics['skipped']) == 1
        assert_same(after, tight)
        after, metrics = training.take(state, batch(2))
        assert int(metrics['skipped']) == 0
        assert float(after.optimizer.limit) == pytest.approx(
            .99 * limit + .01 * 1.5 * float(metrics['loss']))

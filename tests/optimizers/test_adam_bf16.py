"""Adam with moments in bfloat16 against Optax's own, and its rounding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from pkm_jax.optimizers.adam_bf16 import adam_bf16
from pkm_jax.optimizers.build import OptimizerConfig, make_optimizer
from pkm_jax.refusal import Refusal

OURS, OPTAX = adam_bf16(.01), optax.adam(.01)


@pytest.fixture(scope='module')
def table():
    return jax.random.normal(jax.random.key(0), (64, 32))


@jax.jit
def step(gradient, state, key):
    return OURS.update(gradient, state, rounding=key)


def test_the_first_step_is_adams_and_its_state_bfloat16(table):
    ours, state = step(table, OURS.init(table), jax.random.key(1))
    theirs, _ = OPTAX.update(table, OPTAX.init(table))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    assert state.mu.dtype == state.nu.dtype == jnp.bfloat16
    assert int(state.count) == 1


def test_moments_follow_those_in_float32_over_many_steps(table):
    """Rounded to the nearest, the second would stop at an eighth of where it goes."""
    state, exact = OURS.init(table), OPTAX.init(table)
    keys = jax.random.split(jax.random.key(2), 600)

    @jax.jit
    def both(states, key):
        gradient = table + jax.random.normal(key, table.shape)
        return (OURS.update(gradient, states[0], rounding=key)[1],
                OPTAX.update(gradient, states[1])[1]), None

    (state, exact), _ = jax.lax.scan(both, (state, exact), keys)
    moments = exact[0]
    for ours, theirs, error in ((state.mu, moments.mu, 2e-2), (state.nu, moments.nu, 5e-2)):
        ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
        assert np.linalg.norm(ours - theirs) < error * np.linalg.norm(theirs)
    ratio = np.asarray(state.nu, np.float64).sum() / np.asarray(moments.nu, np.float64).sum()
    assert abs(ratio - 1) < 5e-3        # and are not off to one side


def test_both_halves_of_the_bits_round_without_bias(table):
    """The mean over many keys is the number, up to four standard errors; they are independent."""
    start = OURS.init(table)
    mu, nu = jax.vmap(lambda key: OURS.update(table, start, rounding=key)[1][1:])(
        jax.random.split(jax.random.key(3), 400))
    off = []
    for drawn, exact in ((mu, .1 * table), (nu, .001 * table ** 2)):
        spacing = 2. ** (np.floor(np.log2(np.abs(exact))) - 7)
        error = np.asarray(drawn, np.float64) - np.asarray(exact, np.float64)
        assert np.abs(error / spacing).max() <= 1
        assert np.abs((error / spacing).mean(axis=0)).max() < 4.5 * .5 / 20
        off.append(np.sign(error))
    assert abs((off[0] * off[1]).mean()) < 4.5 / np.sqrt(off[0].size)


@pytest.mark.parametrize('spec', [('rows', None), (None, 'columns'), ('rows', 'columns')])
def test_bits_are_the_same_on_every_layout(table, spec):
    mesh = jax.make_mesh((2, 4), ('rows', 'columns'))
    split = jax.device_put(table, NamedSharding(mesh, PartitionSpec(*spec)))
    whole, parts = (step(given, OURS.init(given), jax.random.key(1))[1]
                    for given in (table, split))
    for ours, theirs in zip(whole[1:], parts[1:]):
        np.testing.assert_array_equal(np.asarray(ours, np.float32), np.asarray(theirs, np.float32))


def test_it_is_a_groups_in_training(table):
    """With clipping, skipped loss spikes, other groups, and a state whose memory is used again."""
    params = {'memory': {'values': table}, 'bias': jnp.ones(3)}
    optimizer = make_optimizer(
        OptimizerConfig(warmup=0, values_optimizer='adam_bf16', values_learning_rate=.01, clip=1e9,
                        skip_loss_spikes=2., values_epsilon=1e-8), 10**9, {'memory/values'},
        lambda path: False)

    @functools.partial(jax.jit, donate_argnums=0)
    def take(state, key):
        return optimizer.update(params, state, params, loss=jnp.ones(()), rounding=key)

    updates, state = take(optimizer.init(params), jax.random.key(1))
    expected, _ = OPTAX.update(table, OPTAX.init(table))
    np.testing.assert_allclose(updates['memory']['values'], expected, rtol=1e-5)
    assert [leaf.dtype for leaf in jax.tree.leaves(state) if leaf.shape == table.shape] == [
        jnp.bfloat16] * 2


def test_a_model_without_a_memory_has_no_moments():
    updates, state = step({}, OURS.init({}), jax.random.key(0))
    assert (updates, state.mu, state.nu, int(state.count)) == ({}, {}, {}, 1)


def test_without_a_key_it_refuses(table):
    with pytest.raises(Refusal, match='adam_bf16: .* needs a key'):
        OURS.update(table, OURS.init(table))

"""Muon with the matrices shared among devices: Optax's own numbers and state."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

from pkm_jax.mesh import Shards, make_mesh
from pkm_jax.models.interface import path_of
from pkm_jax.optimizers.build import MUON_RMS, OptimizerConfig, make_optimizer
from pkm_jax.optimizers.groups import schedule
from pkm_jax.optimizers.muon import scale_by_muon

RATE, DECAY, STEPS = .01, .1, 4
# Matrices of one shape: one more than eight devices, three, one; and kernels that are none.
SHAPES = {**{f'square_{n}': (16, 16) for n in range(9)}, **{f'wide_{n}': (8, 24) for n in range(3)},
          'tall': (24, 8), 'vector': (16,), 'stack': (2, 8, 8)}


def params_and_gradients():
    rng = np.random.default_rng(0)

    def draw(scale=1.):
        shapes = {'word': {'embedding': (32, 16)},
                  'layers': {name: {'kernel': shape} for name, shape in SHAPES.items()}}
        return jax.tree.map(lambda shape: scale * rng.normal(size=shape).astype(np.float32), shapes,
                            is_leaf=lambda node: isinstance(node, tuple))

    # Small ones show what is added to norms.
    return draw(), [draw(scale) for scale in (1e-5, 1e-5, .1, 1.)]


def ours():
    return make_optimizer(OptimizerConfig(optimizer='muon', learning_rate=RATE, warmup=1, clip=0.,
                                          weight_decay=DECAY, epsilon=1e-4), STEPS, {}, lambda _: False)


def of_optax():
    def matrices(params):
        return jax.tree.map(lambda leaf: contrib.MuonDimensionNumbers() if leaf.ndim == 2 else None,
                            params) | {'word': {'embedding': None}}

    return contrib.muon(schedule(RATE, 1, STEPS), eps=1e-4, weight_decay=DECAY,
                        adam_weight_decay=DECAY, muon_weight_dimension_numbers=matrices,
                        consistent_rms=MUON_RMS)


def after_steps(optimizer):
    """Parameters and state, by path."""
    params, gradients = params_and_gradients()
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, gradient):
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    for gradient in gradients:
        params, state = step(params, state, gradient)
    return [{path_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
            for tree in (params, state)]


@pytest.mark.parametrize('shards', [
    None, Shards(2, 2, 2),
    *(pytest.param(shards, marks=pytest.mark.slow) for shards in (Shards(), Shards(2), Shards(4)))])
def test_steps_are_those_of_optax(shards):
    """Of more matrices than devices and of fewer, of numbers that do not divide, of one."""
    expected, state_of_optax = after_steps(of_optax())
    if shards is None:
        params, state = after_steps(ours())
    else:
        with jax.set_mesh(make_mesh(shards, jax.devices()[:math.prod(shards)])):
            params, state = after_steps(ours())
    for path, leaf in params.items():
        np.testing.assert_allclose(leaf, expected[path], rtol=1e-5, atol=1e-6, err_msg=path)
    group = 'inner_states/decayed/inner_state/'
    assert [path for path in state if path.startswith(group)] == [
        group + path for path in state_of_optax]
    for path, leaf in state_of_optax.items():
        np.testing.assert_allclose(state[group + path], leaf, rtol=1e-5, atol=1e-8, err_msg=path)


@pytest.mark.parametrize('number, ratio', [(8, 4), (4, 4), (5, 2.5), (3, 1)])
def test_devices_share_the_work(number, ratio):
    """Four devices, each with a part of the products; of fewer matrices than devices, with all."""
    matrices, optimizer = [jnp.ones((32, 32))] * number, scale_by_muon(1e-6)

    def products():
        return jax.jit(optimizer.update).lower(
            matrices, optimizer.init(matrices)).compile().cost_analysis()['flops']

    alone = products()
    with jax.set_mesh(make_mesh(Shards(4), jax.devices()[:4])):
        assert alone / products() == pytest.approx(ratio, rel=.1)

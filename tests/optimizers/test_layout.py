"""States of every optimizer over eight devices: split as their parameters, and the same numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from pkm_jax.mesh import Shards, make_mesh
from pkm_jax.models.interface import path_of
from pkm_jax.optimizers.build import BACKBONE, OptimizerConfig, make_optimizer, values_optimizers
from pkm_jax.optimizers.layout import state_specs
from tests.optimizers.toy import PARTS, loss, parameters


def specs_of(params):
    """Tables by rows and columns, matrices by their inputs, the embedding by its features."""
    by_name = {'values': P('rows', 'columns'), 'kernel': P('data'),
               'embedding': P(None, ('data', 'rows'))}
    return jax.tree_util.tree_map_with_path(
        lambda path, _: by_name.get(path_of(path).rsplit('/')[-1], P()), params)


def by_path(tree):
    return {path_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def test_factored_moments_have_the_axes_that_are_left():
    """The larger axis of a matrix is the row moment's to lose, of a square one the second."""
    spec = {'wide': P('rows', 'columns'), 'tall': P('rows', 'columns'),
            'square': P('rows', 'columns'), 'stack': P('data', 'rows', 'columns'),
            'small': P('rows', 'columns'), 'bias': P(('data', 'rows'))}
    shapes = dict(wide=(128, 256), tall=(256, 128), square=(128, 128), stack=(2, 256, 128),
                  small=(64, 32), bias=(128,))
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    specs = by_path(state_specs(optax.adafactor(1e-3), params, spec))
    for name, row, column in [
            ('wide', P('rows'), P('columns')), ('tall', P('columns'), P('rows')),
            ('square', P('rows'), P('columns')),
            ('stack', P('data', 'columns'), P('data', 'rows')),
            ('small', P(), P()), ('bias', P(), P())]:
        assert (specs[f'0/v_row/{name}'], specs[f'0/v_col/{name}']) == (row, column), name
    assert specs['0/v/small'] == P('rows', 'columns')
    assert specs['0/v/bias'] == P(('data', 'rows'))
    assert specs['0/v/wide'] == specs['0/count'] == P()


@pytest.mark.parametrize('name', values_optimizers(sparse=True))
def test_moments_of_tables_lie_beside_them(name):
    """Each number by rows and columns, each row's by rows; nothing of a table's length is whole."""
    optimizer = make_optimizer(OptimizerConfig(values_optimizer=name), 20_000, *PARTS, sparse=True)
    params = jax.eval_shape(parameters)
    specs = by_path(state_specs(optimizer, params, specs_of(params)))
    state = by_path(jax.eval_shape(optimizer.init, params))
    assert specs.keys() == state.keys()
    tables = [(state[path].ndim, spec) for path, spec in specs.items() if path.endswith('values')]
    both, rows = (2, P('rows', 'columns')), (1, P('rows'))
    assert tables == {'adam': [both, both], 'sgd': [], 'rowwise_adam': [both, rows],
                      'rowwise_adagrad': [rows]}[name]


@pytest.mark.parametrize('name', BACKBONE)
def test_steps_over_eight_devices_are_those_of_one(name):
    """Two dense steps with parameters and state split; everything ends as it was laid out."""
    optimizer = make_optimizer(OptimizerConfig(optimizer=name, learning_rate=.01, warmup=0), 9,
                               *PARTS)
    params = parameters()
    state = optimizer.init(params)

    def step(params, state):
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    mesh = make_mesh(Shards(2, 2, 2))
    specs = (specs_of(params), state_specs(optimizer, params, specs_of(params)))
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    for leaf, sharding in zip(jax.tree.leaves((params, state)), jax.tree.leaves(shardings)):
        sharding.shard_shape(leaf.shape)    # raises where a size does not divide
    split, alone = jax.device_put((params, state), shardings), (params, state)
    on_all, on_one = jax.jit(step, out_shardings=shardings), jax.jit(step)
    for _ in range(2):
        split, alone = on_all(*split), on_one(*alone)
    for path, leaf in by_path(split).items():
        np.testing.assert_allclose(leaf, by_path(alone)[path], rtol=2e-5, atol=2e-6, err_msg=path)
    kernels = [leaf for path, leaf in by_path(split[1]).items() if path.endswith('kernel')]
    assert any(not leaf.sharding.is_fully_replicated for leaf in kernels)


def test_a_mesh_in_use_does_not_matter():
    optimizer, params = optax.adam(1e-3), jax.eval_shape(parameters)
    with jax.set_mesh(make_mesh(Shards(2, 2, 2))):
        inside = state_specs(optimizer, params, specs_of(params))
    assert inside == state_specs(optimizer, params, specs_of(params))
    assert by_path(inside)['0/mu/layers/0/memory/values'] == P('rows', 'columns')

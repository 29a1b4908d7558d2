"""Meshes, and which of their axes split what."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from pkm_jax.mesh import (
    NONE,
    OWN,
    Axes,
    Shards,
    axes_of,
    device_index,
    make_mesh,
    over_tokens,
    shards_in_use,
)
from pkm_jax.refusal import Refusal


def test_specs_of_axes():
    assert OWN.tokens == P(('data', 'rows', 'columns')) and OWN.table == P('rows', 'columns')
    assert Axes(('a', 'b'), (), ('c',)).tokens == P(('a', 'b', 'c'))
    assert Axes(('a', 'b'), (), ('c',)).table == P(None, 'c')
    assert NONE.tokens == P(None) and NONE.table == P(None, None)


def test_a_mesh_of_ours_has_a_memory_group_side_by_side():
    mesh = make_mesh(Shards(2, 2, 2))
    assert mesh.axis_names == ('data', 'rows', 'columns')
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert [device.id for device in mesh.devices[0].reshape(-1)] == [0, 1, 2, 3]
    assert make_mesh(Shards(), jax.devices()[3:4]).devices.item().id == 3


def test_shards_in_use_are_those_of_the_named_axes():
    assert shards_in_use() == shards_in_use(Axes(('x',), (), ())) == Shards()
    with jax.set_mesh(make_mesh(Shards(2, 4, 1))):
        assert shards_in_use() == Shards(2, 4, 1)
        assert shards_in_use(Axes(('data', 'rows'), (), ('columns',))) == Shards(8, 1, 1)
        assert shards_in_use(NONE) == Shards()
        with pytest.raises(Refusal, match=r"'data', 'rows', 'columns'.*\['model', 'other'\]"):
            shards_in_use(Axes(('data',), ('model',), ('other',)))


@pytest.mark.parametrize('names, sizes, axes, found', [
    (OWN.names, (2, 2, 2), None, (OWN, False)),
    (('dp', 'tp'), (4, 2), None, (NONE, True)),
    (('dp', 'tp'), (1, 1), None, (NONE, False)),
    (('data', 'other'), (4, 2), None, (NONE, True)),
    (('dp', 'tp'), (4, 2), Axes(('dp',), (), ('tp',)), (Axes(('dp',), (), ('tp',)), False)),
    ((*OWN.names, 'more'), (2, 2, 1, 2), None, (OWN, False)),
    (OWN.names, (2, 2, 2), NONE, (NONE, True)),
    (OWN.names, (1, 1, 1), None, (NONE, False)),
    (OWN.names, (1, 1, 1), NONE, (NONE, False)),    # as a layer passes on what it found above
])
def test_axes_that_a_layer_uses(names, sizes, axes, found):
    assert axes_of(axes) == (NONE, False)       # without a mesh
    mesh = jax.make_mesh(sizes, names, devices=jax.devices()[:int(np.prod(sizes))],
                         axis_types=(AxisType.Auto,) * len(names))
    with jax.set_mesh(mesh):
        assert axes_of(axes) == found


def test_a_foreign_mesh_is_named_in_one_logged_line(caplog):
    for names in (('a', 'b'), ('a', 'b'), ('c', 'd')):
        with jax.set_mesh(jax.make_mesh((4, 2), names, axis_types=(AxisType.Auto,) * 2)):
            axes_of(None)
    assert [record.levelname for record in caplog.records] == ['WARNING'] * 2
    assert "('a', 'b')" in caplog.messages[0] and "('c', 'd')" in caplog.messages[1]


@pytest.mark.parametrize('axes', [OWN, Axes(('rows', 'data'), (), ('columns',)),
                                  Axes(('columns',), (), ())])
def test_devices_are_numbered_in_the_order_of_their_tokens(axes):
    with jax.set_mesh(make_mesh(Shards(2, 2, 2))):
        numbers = jax.jit(over_tokens(
            lambda x, offset: x + offset + device_index(axes), 1, axes))(jnp.zeros(16, jnp.int32), 100)
        devices = shards_in_use(axes)
    count = int(np.prod(devices))
    np.testing.assert_array_equal(numbers, np.repeat(np.arange(count), 16 // count) + 100)
    assert device_index() == 0

"""A save keeps the state that it was given, though steps go on, and says what became of it."""

import threading
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from pkm_jax.checkpoints import store
from pkm_jax.checkpoints.store import Checkpoints
from pkm_jax.refusal import Refusal


class Tiny(NamedTuple):
    step: Any
    params: Any
    batch_stats: Any
    optimizer: Any


def begun(mesh=None):
    rows = jnp.arange(64. * 8).reshape(64, 8)
    if mesh:
        rows = jax.device_put(rows, NamedSharding(mesh, P('x')))
    return Tiny(jnp.int32(1), {'table': rows}, {'mean': jnp.ones(4)}, [jnp.zeros(3)])


def next_step(state):
    """Donates: it writes into the buffers of the state before."""
    return jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)(state)


@pytest.fixture(params=['copied', 'brought to the host'])
def copies(request, monkeypatch):
    if request.param == 'copied':
        monkeypatch.setattr(store, '_room_for_a_copy', lambda state: True)
    return request.param == 'copied'


@pytest.mark.parametrize('devices', [1, 2])
def test_steps_go_on_and_change_nothing_of_what_is_saved(tmp_path, copies, devices):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:devices]), 'x')
    checkpoints, state = Checkpoints(tmp_path, 3), begun(mesh)
    wanted, progress = jax.device_get(state), {'log': {'lines': 3}}
    checkpoints.save(state, progress)
    progress['log']['lines'] = 4
    for _ in range(3):
        state = next_step(state)
    jax.block_until_ready(state)
    checkpoints.wait()
    assert checkpoints.newest() == (1, {'log': {'lines': 3}})
    jax.tree.map(np.testing.assert_array_equal, wanted,
                 jax.device_get(checkpoints.restore(1, jax.eval_shape(begun))))
    checkpoints.close()


def test_no_step_waits_for_the_host_where_devices_have_room(tmp_path, monkeypatch):
    monkeypatch.setattr(store, '_room_for_a_copy', lambda state: True)
    checkpoints, state, may_go = Checkpoints(tmp_path, 3), begun(), threading.Event()
    save = checkpoints._writer.save

    def late(*args, **kwargs):
        assert may_go.wait(60)
        save(*args, **kwargs)

    monkeypatch.setattr(checkpoints._writer, 'save', late)
    checkpoints.save(state, {})
    assert int(next_step(state).step) == 2      # the writer has not begun
    may_go.set()
    checkpoints.close()
    assert checkpoints.steps() == [1]


def test_what_the_storage_says_later_is_said_by_who_waits(tmp_path, copies, monkeypatch):
    checkpoints = Checkpoints(tmp_path, 3)

    def full(*args, **kwargs):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(checkpoints._writer, 'save', full)
    with pytest.raises(Refusal, match='step 1 could not be written to .*: .*No space left'):
        checkpoints.save(begun(), {})
        checkpoints.wait()


@pytest.mark.parametrize('memory, room', [
    (None, False),                                                      # a CPU
    (dict(bytes_limit=10_000, peak_bytes_in_use=7_000), True),          # 2,080 bytes are saved
    (dict(bytes_limit=10_000, peak_bytes_in_use=8_000), False),
    (dict(bytes_limit=10_000, peak_bytes_in_use=7_000, peak_bytes_reserved=1_000), False)])
def test_a_copy_needs_room_beside_the_most_that_was_ever_held(memory, room, monkeypatch, caplog):
    class Device:
        def memory_stats(self):
            return memory

    monkeypatch.setattr(jax, 'local_devices', lambda: [Device(), Device()])
    caplog.set_level('INFO', 'absl')
    assert store._room_for_a_copy(begun()) is room
    assert ('Steps wait' in caplog.text) == (memory is not None and not room)


def test_a_part_of_a_table_needs_room_for_that_part(monkeypatch):
    """1,024 bytes on each of two devices, and 32 of what both hold."""
    class Device:
        def memory_stats(self):
            return dict(bytes_limit=1_200, peak_bytes_in_use=0)

    state = begun(jax.sharding.Mesh(np.array(jax.devices()[:2]), 'x'))
    monkeypatch.setattr(jax, 'local_devices', lambda: [Device()])
    assert store._room_for_a_copy(state) and not store._room_for_a_copy(begun())

"""A save keeps the state that it was given, though steps go on, and says what became of it."""

import gc
import threading
import weakref
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from pkm_jax.checkpoints import apart
from pkm_jax.checkpoints.store import Checkpoints
from pkm_jax.refusal import Refusal
from tests.checkpoints.test_damage import Tiny


def begun(mesh=None):
    """2,048 bytes of a table, split by rows over a mesh, and 32 more."""
    rows = jnp.arange(64. * 8).reshape(64, 8)
    if mesh:
        rows = jax.device_put(rows, NamedSharding(mesh, P('x')))
    return Tiny(jnp.int32(1), {'table': rows}, {'mean': jnp.ones(4)}, [jnp.zeros(3)])


def next_step(state):
    """Its arrays are gone then, and where nothing else looks at their memory it is written over."""
    return jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)(state)


@pytest.fixture
def room(monkeypatch):
    monkeypatch.setattr(apart, '_hindrance', lambda state: None)


@pytest.fixture(params=['copied', 'brought to the host'])
def either_way(request):
    if request.param == 'copied':
        request.getfixturevalue('room')


@pytest.mark.parametrize('devices', [1, 2])
def test_steps_go_on_and_change_nothing_of_what_is_saved(tmp_path, either_way, devices):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:devices]), 'x')
    checkpoints, state = Checkpoints(tmp_path, 3, copies=True), begun(mesh)
    progress = {'log': {'lines': 3}}
    checkpoints.save(state, progress)
    progress['log']['lines'] = 4
    for _ in range(3):
        state = next_step(state)
    jax.block_until_ready(state)
    checkpoints.wait()
    assert checkpoints.newest() == (1, {'log': {'lines': 3}})
    jax.tree.map(np.testing.assert_array_equal, begun(),
                 checkpoints.restore(1, jax.eval_shape(begun)))
    checkpoints.close()


def test_no_step_waits_for_the_host_where_devices_have_room(tmp_path, room, monkeypatch):
    checkpoints, state, may_go = Checkpoints(tmp_path, 3, copies=True), begun(), threading.Event()
    save = checkpoints._writer.save

    def late(*args, **kwargs):
        assert may_go.wait(60)
        save(*args, **kwargs)

    monkeypatch.setattr(checkpoints._writer, 'save', late)
    checkpoints.save(state, {})
    assert int(next_step(state).step) == 2      # the writer has not begun
    may_go.set()
    checkpoints.wait()
    jax.tree.map(np.testing.assert_array_equal, begun(),
                 checkpoints.restore(1, jax.eval_shape(begun)))
    checkpoints.close()


def test_a_copy_is_gone_before_the_checksums_are_written(tmp_path, room, monkeypatch):
    made, alive = [], []
    copied = apart._copied

    def watched(state):
        copy = copied(state)
        made.append(weakref.ref(copy.params['table']))
        return copy

    def finish(step):
        checkpoints._writer.wait_until_finished()
        gc.collect()
        alive.append(made[0]() is not None)

    checkpoints = Checkpoints(tmp_path, 3, copies=True)
    monkeypatch.setattr(apart, '_copied', watched)
    monkeypatch.setattr(checkpoints, '_finish', finish)
    checkpoints.save(begun(), {})
    checkpoints.close()
    assert alive == [False]


def test_what_the_storage_says_later_is_said_by_who_waits(tmp_path, room, monkeypatch):
    checkpoints = Checkpoints(tmp_path, 3, copies=True)

    def full(*args, **kwargs):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(checkpoints._writer, 'save', full)
    checkpoints.save(begun(), {})
    with pytest.raises(Refusal, match='step 1 could not be written to .*: .*No space left'):
        checkpoints.wait()
    checkpoints.close()


class Device(NamedTuple):
    memory: Any
    platform: str = 'gpu'

    def memory_stats(self):
        return self.memory


def memory(left, **more):
    return dict(bytes_limit=10_000, peak_bytes_in_use=10_000 - left, **more)


@pytest.mark.parametrize('devices, said', [
    ([Device(None, 'cpu')], ''),                        # its memory is the host's
    ([Device(memory(4_160)), Device(memory(9_000))], None),     # twice 2,080 bytes
    ([Device(memory(9_000)), Device(memory(4_159))], 'had 0.0 MB left'),
    ([Device(memory(4_160, peak_bytes_reserved=1))], 'had 0.0 MB left'),
    ([Device(memory(-50_000))], 'had 0.0 MB left'),
    ([Device(None)], 'does not say'),
    ([Device({'bytes_in_use': 5})], 'does not say')])
def test_a_copy_needs_room_beside_the_most_that_was_ever_held(devices, said, monkeypatch, capsys):
    monkeypatch.setattr(jax, 'local_devices', lambda: devices)
    copies = apart.Copies()
    assert (copies.of(begun()) is None) == (said is not None)
    copies.of(begun())
    printed = capsys.readouterr().out
    assert printed.count('steps wait while a checkpoint is brought to the host') == bool(said)
    assert (said or '') in printed


def test_a_part_of_a_table_needs_room_for_that_part(monkeypatch):
    state = begun(jax.sharding.Mesh(np.array(jax.devices()[:2]), 'x'))     # 1,056 bytes on one
    monkeypatch.setattr(jax, 'local_devices', lambda: [Device(memory(2_112))])
    assert apart.Copies().of(state) is not None and apart.Copies().of(begun()) is None


def test_several_processes_wait(monkeypatch, capsys):
    """A second one would have to begin its checkpoints among the same steps."""
    monkeypatch.setattr(jax, 'local_devices', lambda: [Device(memory(9_000))])
    monkeypatch.setattr(jax, 'process_count', lambda: 2)
    assert apart.Copies().of(begun()) is None
    assert 'there are 2 processes' in capsys.readouterr().out


def test_a_copy_for_which_there_was_no_memory_is_not_tried_again(room, monkeypatch, capsys):
    def exhausted(state):
        tried.append(state)
        raise jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory')

    tried = []
    monkeypatch.setattr(apart, '_copied', exhausted)
    copies = apart.Copies()
    assert [copies.of(begun()) for _ in range(3)] == [None] * 3
    assert len(tried) == 1 and 'exhausted the memory' in capsys.readouterr().out


def test_other_faults_of_a_copy_are_raised(room, monkeypatch):
    def broken(state):
        raise jax.errors.JaxRuntimeError('INTERNAL: a cable')

    monkeypatch.setattr(apart, '_copied', broken)
    with pytest.raises(jax.errors.JaxRuntimeError, match='a cable'):
        apart.Copies().of(begun())

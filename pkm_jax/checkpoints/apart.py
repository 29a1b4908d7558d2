"""States copied on their devices, so that steps go on while a copy is brought to the host."""

from typing import Any

import jax
import jax.numpy as jnp

from pkm_jax.mesh import bytes_on_device
from pkm_jax.processes import hosts
from pkm_jax.refusal import is_out_of_memory

State = Any


class Copies:
    """Copies of the states of a run, or None where its devices have no room; that is said once."""

    def __init__(self) -> None:
        self._possible: bool | None = None      # asked before the first, when steps have run

    def of(self, state: State) -> State | None:
        """A copy beside `state`, in the same layout; None: there can be none."""
        if self._possible is None:
            self._decide(_hindrance(state))
        if not self._possible:
            return None
        try:
            return _copied(state)
        except jax.errors.JaxRuntimeError as error:
            if not is_out_of_memory(error):
                raise
            self._decide('a copy of it beside them exhausted the memory of a device')
            return None

    def _decide(self, hindrance):
        self._possible = hindrance is None
        if hindrance:
            hosts.say(f'steps wait while a checkpoint is brought to the host: {hindrance}')


def _hindrance(state) -> str | None:
    """What hinders a copy, in words, '' where there is nothing to gain by one; None: nothing."""
    devices = jax.local_devices()
    if devices[0].platform == 'cpu':
        return ''
    if jax.process_count() > 1:     # they exchange words when one is begun, as steps do
        return f'there are {jax.process_count()} processes'
    size = bytes_on_device(state)
    rooms = [_room(device.memory_stats() or {}) for device in devices]
    if None in rooms:
        return 'a device does not say how much memory it has'
    # As much again, for what may take more than anything did so far.
    return None if min(rooms) >= 2 * size else (
        f'a device had {max(min(rooms), 0) / 1e6:,.1f} MB left at the most that it held, and a '
        f'copy takes {size / 1e6:,.1f} MB, for which twice that must be left')


def _room(memory):
    """Bytes that were left when most was in use; TPUs reserve what programs take apart."""
    if not {'bytes_limit', 'peak_bytes_in_use'} <= memory.keys():
        return None
    return (memory['bytes_limit'] - memory['peak_bytes_in_use']
            - memory.get('peak_bytes_reserved', 0))


@jax.jit
def _copied(state):
    return jax.tree.map(jnp.copy, state)

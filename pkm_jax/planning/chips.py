"""The devices that a plan can be made for, and how fast some of them reach others."""

import math
import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from pkm_jax.accelerators import CHIPS, Chip
from pkm_jax.refusal import Refusal

GPUS_PER_HOST = 8


# The TPU compiler asks the machine what it is. It need not be one with a TPU.
NO_TPU_HERE = {'TPU_SKIP_MDS_QUERY': '1', 'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
               'TPU_WORKER_HOSTNAMES': 'localhost', 'TPU_ACCELERATOR_TYPE': 'v5litepod-4'}


class Topology(NamedTuple):
    """A number of chips of one kind: chips along each dimension, or GPUs."""
    name: str
    chip: Chip
    shape: tuple[int, ...]

    @property
    def is_tpu(self) -> bool:
        return self.chip.dimensions > 0


def parse(text: str) -> Topology:
    """The topology called 'v5e:16x16' (chips along each dimension) or 'h200:8' (GPUs).

    Raises:
      Refusal: there is no such chip, or the shape is not one of its.
    """
    kind, _, sizes = text.partition(':')
    if kind not in CHIPS:
        raise Refusal(f'--topology={text}: {kind!r} is none of {", ".join(CHIPS)}.')
    chip = CHIPS[kind]
    dimensions = chip.dimensions or 1
    shape = tuple(map(int, sizes.split('x'))) if re.fullmatch(r'\d+(x\d+)*', sizes) else ()
    if len(shape) != dimensions or min(shape) < 1:
        example = f'{kind}:' + {1: '8', 2: '4x4', 3: '4x4x4'}[dimensions]
        raise Refusal(f'--topology={text}: give the chips along each of {dimensions} '
                         f'dimension{"s" * (dimensions > 1)}, such as {example}.')
    if dimensions == 2 and max(shape) > 16:
        raise Refusal(f'--topology={text}: a slice of {kind} has 16x16 chips at most.')
    return Topology(text, chip, shape)


def devices(topology: Topology) -> Sequence[jax.Device]:
    """Devices to compile for: those of the TPU topology, or as many virtual CPU devices as GPUs.

    Raises:
      Refusal: the TPU compiler is not installed.
      Refusal: the compiler refuses the topology, or JAX already runs with fewer CPU devices.
    """
    if not topology.is_tpu:
        return _cpu_devices(math.prod(topology.shape))
    os.environ.update(NO_TPU_HERE)
    options: dict[str, Any] = {}
    if any(size % 2 for size in topology.shape[:2]):    # hosts have 2 × 2 chips, or one
        options['chips_per_host_bounds'] = (1, 1, 1)
    if topology.name.startswith('v4:'):     # the two cores of a chip as one device
        options['chip_config_name'] = 'megacore'
    try:
        return topologies.get_topology_desc(platform='tpu', topology_name=topology.name,
                                            **options).devices
    except jax.errors.JaxRuntimeError as error:
        raise Refusal(f'--topology={topology.name}: {error}') from error
    except RuntimeError as error:
        raise Refusal(
            f"--topology={topology.name} needs the TPU compiler, but no TPU: pip install "
            f"'jax[tpu]' ({error}).") from error


def link_rate(topology: Topology, places: Sequence[Sequence[int]]) -> float:
    """Bytes per second that each device of a group can send to the others, at best.

    `places` are the devices' coordinates, of GPUs their numbers. Of a torus, the links along the
    dimensions in which they differ count, both ways around; a slice that is no torus has less.
    """
    chip = topology.chip
    if not topology.is_tpu:
        hosts = {place // GPUS_PER_HOST for place, in places}
        return chip.links if len(hosts) == 1 else chip.network
    spanned = sum(len(set(along)) > 1 for along in zip(*places))
    return chip.links * spanned / chip.dimensions


def _cpu_devices(count):
    if jax.config.jax_num_cpu_devices < count:      # type: ignore[attr-defined]  # made when run
        try:
            jax.config.update('jax_num_cpu_devices', count)
        except RuntimeError:
            pass    # JAX runs already: what there is may be enough
    found = jax.devices('cpu')
    if len(found) < count:
        raise Refusal(f'{count} GPUs are planned with as many CPU devices, of which this '
                         f'process has {len(found)}: set JAX_NUM_CPU_DEVICES={count}.')
    return found[:count]

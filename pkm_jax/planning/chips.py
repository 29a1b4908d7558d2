"""The devices that a plan can be made for, and how fast some of them reach others."""

import math
import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from pkm_jax.accelerators import CHIPS, GIB, Chip
from pkm_jax.refusal import Refusal
from pkm_jax.training.layout_time import Rates

GPUS_PER_HOST = 8
RESERVED = GIB // 4     # of a TPU's memory: what the v5e compiler leaves to its runtime
GPU_SHARE = 0.75        # of a GPU's memory: JAX's, where XLA_PYTHON_CLIENT_MEM_FRACTION is not set


# The TPU compiler asks the machine what it is. It need not be one with a TPU.
NO_TPU_HERE = {'TPU_SKIP_MDS_QUERY': '1', 'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
               'TPU_WORKER_HOSTNAMES': 'localhost', 'TPU_ACCELERATOR_TYPE': 'v5litepod-4'}


# Chips of which no compiler that was tried can make a topology.
UNKNOWN_TO_LIBTPU = ('tpu8t:', 'tpu8i:')


# How Cloud TPU and SkyPilot name slices, by chips or by cores.
ACCELERATOR = re.compile(r'(?:tpu-)?(v5litepod|v6e|v5p|v4)-(\d+)')


class Topology(NamedTuple):
    """A number of chips of one kind: chips along each dimension of a slice, or GPUs."""
    name: str
    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def is_tpu(self) -> bool:
        return self.chip.dimensions > 0

    @property
    def chips(self) -> int:
        return math.prod(self.shape) * self.slices

    @property
    def size(self) -> int:
        """How many devices JAX sees."""
        return self.chips * self.chip.cores


def parse(text: str, slices: int = 1) -> Topology:
    """Slices of the topology called 'v5e:16x16' (chips along each dimension) or 'v5litepod-256' (as
    Cloud TPU names it), or the GPUs 'h200:8'.

    Raises:
      Refusal: there is no such chip, the shape is not one of its, or it has no such slices.
    """
    kind, _, sizes = _named_by_shape(text).partition(':')
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
    if slices < 1 or slices > 1 and not (chip.dimensions and chip.network):
        raise Refusal(f'--slices={slices} of {text}: ' + (
            'must be 1 or more.' if slices < 1 else 'the network between slices is not known.'
            if chip.dimensions else f'GPUs have no slices: --topology={kind}:{slices * shape[0]}.'))
    return Topology(f'{kind}:{sizes}', chip, shape, slices)


def _named_by_shape(text: str) -> str:
    """'v5e:4x4' for 'v5litepod-16', the usual shape of so many chips; other names as they are."""
    match = ACCELERATOR.fullmatch(text)
    if not match:
        return text
    kind, number = match[1].replace('v5litepod', 'v5e'), int(match[2])
    dimensions = CHIPS[kind].dimensions
    chips = number // 2 if dimensions == 3 else number      # v4 and v5p count cores
    if chips & (chips - 1) or chips in (0, 2):
        raise Refusal(f'--topology={text}: give its shape, such as '
                      f'{kind}:{"x".join(["4"] * dimensions)}.')
    power = chips.bit_length() - 1
    sizes = [2 ** ((power + place) // dimensions) for place in range(dimensions)]
    return f'{kind}:' + 'x'.join(map(str, sorted(sizes, key=lambda size: size == 1)))


def devices(topology: Topology) -> Sequence[jax.Device]:
    """Devices to compile for: those of the TPU topology, or as many virtual CPU devices as GPUs.

    Raises:
      Refusal: the TPU compiler is not installed.
      Refusal: the compiler refuses the topology, or JAX already runs with fewer CPU devices.
    """
    if not topology.is_tpu:
        return _cpu_devices(topology.size)
    os.environ.update(NO_TPU_HERE)
    options: dict[str, Any] = {'num_slices': topology.slices} if topology.slices > 1 else {}
    if any(size % 2 for size in topology.shape[:2]):    # hosts have 2 × 2 chips, or one
        options['chips_per_host_bounds'] = (1, 1, 1)
    if topology.name.startswith('v4:'):     # the two cores of a chip as one device
        options['chip_config_name'] = 'megacore'
    try:
        return topologies.get_topology_desc(platform='tpu', topology_name=topology.name,
                                            **options).devices
    except jax.errors.JaxRuntimeError as error:
        if topology.name.startswith(UNKNOWN_TO_LIBTPU):
            raise Refusal(
                f'--topology={topology.name}: the TPU compiler that is installed knows no such '
                f'chip, nor does any up to libtpu 0.0.50, of which this was last tried. Install a '
                f'newer one, or plan for another chip ({error}).') from error
        raise Refusal(f'--topology={topology.name}: {error}') from error
    except RuntimeError as error:
        raise Refusal(
            f"--topology={topology.name} needs the TPU compiler, but no TPU: pip install "
            f"'jax[tpu]' ({error}).") from error


def available_bytes(topology: Topology) -> int:
    """Memory of a device that a program can use."""
    return (topology.chip.memory - RESERVED if topology.is_tpu else
            int(topology.chip.memory * GPU_SHARE))


def rates(topology: Topology) -> Rates:
    """Those that a layout for it is chosen by."""
    return Rates(topology.chip, topology.size // topology.slices if topology.is_tpu else
                 GPUS_PER_HOST)


def link_rate(topology: Topology, places: Sequence[Sequence[int]]) -> float:
    """Bytes per second that each device of a group can send to the others, at best.

    `places` are the devices' coordinates and slices, of GPUs their numbers. Of a torus, the links
    along the dimensions in which they differ count, both ways around; a slice that is no torus has
    less. The cores of one chip get what one dimension has, and can more.
    """
    chip = topology.chip
    if not topology.is_tpu:
        hosts = {place // GPUS_PER_HOST for place, in places}
        return chip.links if len(hosts) == 1 else chip.network
    *torus, slices = [len(set(along)) > 1 for along in zip(*places)]
    return chip.network if slices else chip.links * max(sum(torus), 1) / chip.dimensions


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

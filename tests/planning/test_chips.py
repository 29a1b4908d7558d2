"""Topologies by name, and what their links carry."""

import re

import jax
import pytest

from pkm_jax.accelerators import CHIPS, peak_flops
from pkm_jax.planning import chips
from pkm_jax.refusal import Refusal
from tests.planning.tiny import needs_tpu_compiler


def test_topologies_by_name():
    pod = chips.parse('v5e:16x16')
    assert (pod.shape, pod.chip, pod.is_tpu) == ((16, 16), CHIPS['v5e'], True)
    assert chips.parse('v5p:4x4x4').shape == (4, 4, 4)
    assert chips.parse('h200:8').shape == (8,) and not chips.parse('h200:8').is_tpu
    assert (pod.size, chips.parse('v5e:4x4', 3).size, chips.parse('tpu7x:2x2x1').size) == (256, 48, 8)


@pytest.mark.parametrize('name, shape', [
    ('v5litepod-1', '1x1'), ('v5litepod-8', '2x4'), ('v5litepod-256', '16x16'), ('v6e-32', '4x8'),
    ('tpu-v6e-4', '2x2'), ('v5p-8', '2x2x1'), ('v5p-16', '2x2x2'), ('v4-64', '2x4x4'),
    ('tpu-v5p-512', '4x8x8')])
def test_slices_as_clouds_name_them(name, shape):
    """cloud.google.com/tpu/docs/{v5e,v6e,v5p,v4}: their usual shapes."""
    kind = re.search(r'v\d(lite|e|p)?', name)[0].replace('v5lite', 'v5e')
    assert chips.parse(name) == chips.parse(f'{kind}:{shape}')


@pytest.mark.parametrize('text, slices, message', [
    ('v5e:4x4', 0, '--slices=0 .*1 or more'), ('v4:2x2x1', 2, 'network .* not known'),
    ('h100:8', 2, 'no slices: --topology=h100:16'), ('v6e-2', 1, 'give its shape, such as v6e:4x4'),
    ('v5p-24', 1, 'such as v5p:4x4x4')])
def test_slices_that_there_are_not(text, slices, message):
    with pytest.raises(Refusal, match=message):
        chips.parse(text, slices)


@pytest.mark.parametrize('text, message', [
    ('v3:4x4', "'v3' is none of v5e, v6e"), ('v5e', 'along each of 2 dimensions, such as v5e:4x4'),
    ('v5p:4x4', 'such as v5p:4x4x4'), ('v5e:4xfour', '2 dimensions'), ('v5e:0x4', '2 dimensions'),
    ('v6e:32x16', '16x16 chips at most'), ('h200:2x4', 'each of 1 dimension, such as h200:8')])
def test_other_topologies_are_refused(text, message):
    with pytest.raises(Refusal, match=message):
        chips.parse(text)


def test_links_along_the_dimensions_that_a_group_spans():
    v5e, v5p = chips.parse('v5e:4x4'), chips.parse('v5p:4x4x4')
    row = [(0, 0, 0, 0), (1, 0, 0, 0)]     # the last: their slice
    assert chips.link_rate(v5e, row) == 100e9
    assert chips.link_rate(v5e, [*row, (0, 1, 0, 0)]) == 200e9
    assert chips.link_rate(v5p, row) == 200e9
    assert chips.link_rate(v5e, [*row, (0, 0, 0, 1)]) == 3.125e9
    assert chips.link_rate(chips.parse('tpu7x:2x2x1'), [(0, 0, 0, 0)] * 2) == 100e9     # two cores


def test_gpus_of_several_hosts_share_a_network():
    gpus = chips.parse('h100:16')
    assert chips.link_rate(gpus, [(8,), (15,)]) == 450e9
    assert chips.link_rate(gpus, [(number,) for number in range(16)]) == 50e9
    assert chips.link_rate(gpus, [(0,), (8,)]) == 50e9


def test_gpus_are_planned_with_cpu_devices():
    assert len(jax.devices('cpu')) == 8
    assert chips.devices(chips.parse('h200:4')) == jax.devices('cpu')[:4]
    with pytest.raises(Refusal, match='16 GPUs .* has 8: set JAX_NUM_CPU_DEVICES=16'):
        chips.devices(chips.parse('h200:16'))


def test_chips_of_two_cores_and_without_a_torus():
    """An 8i is two devices of half a chip each, linked to all others alike."""
    torus, flat = chips.parse('tpu8t:4x4x4'), chips.parse('tpu8i:8')
    assert (torus.size, flat.size) == (64, 16) and flat.is_tpu
    assert 2 * flat.chip.bandwidth == 8601e9 and 2 * flat.chip.memory == 288 * 2 ** 30
    assert chips.link_rate(torus, [(0, 0, 0, 0), (1, 0, 0, 0)]) == 400e9
    assert chips.link_rate(flat, [(0, 0), (1, 0)]) == 600e9
    with pytest.raises(Refusal, match='--slices=2 of tpu8i:8: the network between slices is not known'):
        chips.parse('tpu8i:8', 2)


@needs_tpu_compiler
@pytest.mark.parametrize('name', ['tpu8t:2x2x1', 'tpu8i:4'])
def test_chips_that_the_compiler_does_not_know_are_refused_in_so_many_words(name):
    with pytest.raises(Refusal, match=f'--topology={name}: the TPU compiler that is installed '
                                      'knows no such chip.* Install a newer one'):
        chips.devices(chips.parse(name))


def test_peak_rates_by_what_jax_calls_a_device():
    assert peak_flops('TPU8t') == 996.1e12 and peak_flops('TPU8i') == 550.5e12
    assert peak_flops('TPU9') is None


def test_a_missing_compiler_is_named(monkeypatch):
    def missing(**_):
        raise RuntimeError('JAX TPU support not installed')

    monkeypatch.setattr(chips.topologies, 'get_topology_desc', missing)
    with pytest.raises(Refusal, match=r"v5e:2x2 needs the TPU compiler.*'jax\[tpu\]'"):
        chips.devices(chips.parse('v5e:2x2'))

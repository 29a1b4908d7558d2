"""Estimates of a tiny run: for TPUs by their own compiler, where it is installed, and for GPUs."""

import contextlib
import math
import multiprocessing
import re
from concurrent.futures import ProcessPoolExecutor

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from configs import bert_base_pkm_pod
from pkm_jax.mesh import OWN, Shards, make_mesh, slice_of
from pkm_jax.planning import chips, device_memory, hlo
from pkm_jax.planning.device_memory import DeviceMemory
from pkm_jax.planning.estimate import Estimate, estimate, table_sized
from pkm_jax.planning.text import text_of
from pkm_jax.refusal import Refusal
from pkm_jax.training import loop
from pkm_jax.training.layout import Layout
from pkm_jax.training.program import abstract_batch
from tests.planning.tiny import SLOTS, WIDTH, needs_tpu_compiler, run_of, shrunk


@pytest.fixture
def tiny(config):
    return shrunk(config)


@pytest.mark.slow
@needs_tpu_compiler
def test_programs_compiled_for_tpus(tiny):
    found = estimate(run_of(tiny), chips.parse('v5e:2x2'))
    assert found.fits and found.layout.shards == Shards(1, 2, 2)
    sizes = {name: memory.bytes for name, memory in found.memory.items()}
    assert sizes.keys() == {'step', 'first state', 'evaluation'}
    for of_program in sizes.values():   # nobody takes the state away while another program runs
        assert of_program['value tables'] == SLOTS * WIDTH * 4 / 4
        assert of_program['optimizer state of value tables'] == SLOTS * WIDTH * 8 / 4
        assert 0 < of_program[device_memory.PROGRAM] < 1e9
    assert sizes['step']['batch'] == 16 * (2 * 16 + 1 + 3 * 3) * 4 / 4
    # Three counts of two words, of the slots of a shard: never whole.
    assert 0 <= sizes['evaluation'][device_memory.COUNTS] - 3 * 2 * 4 * SLOTS / 2 < 100
    assert found.counted_flops > 0 and 0 < found.moved_bytes < found.counted_bytes
    assert found.table_sized == () and found.unknown_loops == 0
    along = {(one.kind, axes) for one, axes, _ in found.transfers}
    assert ('all-gather', 'rows × columns') in along and ('all-to-all', 'columns') in along
    text = text_of(found, 'tiny')
    assert 'tiny on v5e:2x2: 4 devices as data 1, rows 2, columns 2; compiled in' in text
    assert re.search(r'1 all-reduce +\S+ \+\d+ +rows × columns +\d', text)
    assert re.search(r'estimate +\d+\.\d\d ms', text) and 'FITS: 0.' in text
    assert re.search(r'compiled side by side: step \d+ s, step with norms \d+ s, first state \d+ s, '
                     r'evaluation \d+ s', text)
    assert found.unknown_operands == () and 'WARNING' not in text


def planned(run, **fields):
    """An estimate of numbers that nobody compiled."""
    kinds = dict.fromkeys([*device_memory.KINDS, device_memory.TEMPORARY], 10 ** 9)
    memory = {name: DeviceMemory(dict(kinds), 16 * 10 ** 9) for name in ('step', 'evaluation')}
    whole = Estimate(
        chips.parse('v5e:2x2'), run, Layout(Shards(1, 2, 2), True, ()), memory, {},
        {'step': 60., 'evaluation': 9.}, 1e12, 1e12, 1e9, {'read': 10 ** 9}, (), 0, None, (), ())
    return whole._replace(**fields)


def test_the_program_that_needs_most_decides(tiny):
    run = run_of(tiny)
    assert 'FITS: 7.00 of 16.00 GB, 44%' in text_of(planned(run), 'tiny')
    assert 'compiled side by side: step 60 s, evaluation 9 s' in text_of(planned(run), 'tiny')
    memory = planned(run).memory
    memory['evaluation'].bytes[device_memory.COUNTS] = 10 ** 10
    full = planned(run, memory=memory)
    assert not full.fits and full.largest == 'evaluation'
    text = text_of(full, 'full')
    assert re.search(r'in all +7.00 +17.00   of 16.00', text)
    assert re.search('usage counts {28,}10.00\n', text)
    assert 'DOES NOT FIT: 17.00 GB or more of 16.00 GB (the evaluation, more than the step), ' in text
    refused = planned(run, refusals={'evaluation': 'RESOURCE_EXHAUSTED: so much'})
    assert 'The compiler of the evaluation: RESOURCE_EXHAUSTED: so much' in text_of(refused, 'one')
    assert 'a step of a device' in text_of(refused, 'one') and not refused.fits


def test_operands_of_unknown_size_are_named_in_the_plan(tiny):
    text = text_of(planned(run_of(tiny), unknown_operands=('a.1', 'b')), 'tiny')
    assert ('WARNING: 2 operands whose size the program does not tell count as 0 bytes of HBM '
            'traffic: a.1, b\n') in text


def test_activations_that_do_not_fit_gpus_are_found(tiny):
    tiny.memory.shards.update(rows=1, columns=8)
    tiny.train.batch = 2 ** 24      # with more, XLA would refuse to count the reads
    tiny.model.feed_forward_width = 1024
    found = estimate(run_of(tiny), chips.parse('h200:8'))
    assert not found.fits and found.memory['step'].bytes[device_memory.TEMPORARY] > 141e9


@pytest.mark.parametrize('shape, axis, found', [
    ((SLOTS, WIDTH), 'rows', ['all-gather of f32[64,64]']),
    ((SLOTS, WIDTH), 'columns', ['all-gather of f32[32,128]']),
    ((SLOTS + 2, WIDTH), 'rows', [])])      # other arrays may be gathered
def test_gathered_tables_are_found(tiny, shape, axis, found):
    layout = Layout(Shards(2, 2, 2), True, ())
    mesh, model = make_mesh(layout.shards), run_of(tiny).model

    def gather(table):
        return jax.lax.all_gather(table, axis, axis=OWN.memory.index(axis), tiled=True)

    program = jax.jit(jax.shard_map(gather, mesh=mesh, in_specs=OWN.table, out_specs=P(),
                                    check_vma=False))
    text = program.lower(jax.ShapeDtypeStruct(shape, 'float32')).compile().as_text()
    assert list(table_sized(hlo.Module(text).collectives(8), layout, model)) == found


def test_a_table_read_past_its_layout_is_found(tiny):
    """The partitioner gathers a table where a program indexes it as if it were whole."""
    layout = Layout(Shards(2, 2, 2), True, ())
    mesh, model = make_mesh(layout.shards), run_of(tiny).model
    program = jax.jit(lambda table: jnp.sort(table, axis=0),
                      in_shardings=NamedSharding(mesh, OWN.table),
                      out_shardings=NamedSharding(mesh, P()))
    text = program.lower(jax.ShapeDtypeStruct((SLOTS, WIDTH), 'float32')).compile().as_text()
    assert table_sized(hlo.Module(text).collectives(8), layout, model)


def test_batches_have_the_shapes_that_are_planned(tiny, corpus):
    tiny.data.corpus = str(corpus)
    run = run_of(tiny)
    data = run.task.prepare('', print)
    with contextlib.closing(loop._stream(run, data)) as stream:
        batch = next(stream)
    planned = abstract_batch(run, make_mesh(Shards(8)))
    assert {name: (array.shape, array.dtype) for name, array in batch.items()} == {
        name: (array.shape, array.dtype) for name, array in planned.items()}


@needs_tpu_compiler
@pytest.mark.parametrize('topology', ['v5e:4x4', 'v6e:4x8', 'v5p:4x4x4', 'v4:2x2x1'])
def test_every_layout_finds_its_place_on_a_torus(topology):
    devices = chips.devices(chips.parse(topology))
    for rows, columns in [(1, 1), (2, 1), (1, 2), (2, 2), (4, 1), (1, 4)]:
        shards = Shards(len(devices) // (rows * columns), rows, columns)
        mesh = make_mesh(shards, devices)
        assert mesh.devices.shape == shards
        assert {device.id for device in mesh.devices.flat} == {device.id for device in devices}


@needs_tpu_compiler
@pytest.mark.slow
def test_the_pod_configuration_fits():
    with jax.numpy_dtype_promotion('standard'):     # which the gradient of jax's attention needs
        found = estimate(run_of(bert_base_pkm_pod.get_config()), chips.parse('v5e:16x16'))
    assert found.fits and found.table_sized == ()
    tables = found.memory['step'].bytes['value tables']
    assert tables * math.prod(found.layout.shards[1:]) == 4096 ** 2 * 768 * 2


@pytest.mark.slow
@needs_tpu_compiler
def test_slices_share_data_and_no_table(tiny):
    """Between slices there is a network: gradients cross it, memory groups do not."""
    found = estimate(run_of(tiny), chips.parse('v5e:2x2', slices=2))
    assert found.fits and found.layout.shards == Shards(2, 2, 2)
    between = [one for one in found.transfers if one.axes == 'data']
    assert {one.collective.kind for one in between} >= {'all-reduce'}
    assert all(len(one.collective.groups) == 4 for one in between)      # pairs, one a device
    assert sum(one.collective.bytes_sent for one in between) == pytest.approx(
        3.125e9 * sum(one.seconds for one in between))
    assert '2 slices of v5e:2x2: 8 devices as data 2, rows 2, columns 2' in text_of(found, 'tiny')
    mesh = make_mesh(found.layout.shards, chips.devices(found.topology))
    assert all(len({slice_of(device) for device in group.flat}) == 1 for group in mesh.devices)
    tiny.memory.shards.update(rows=4, columns=2)
    with pytest.raises(Refusal, match='2 slices hold 1 copies of .* divides the 4 devices of a slice'):
        estimate(run_of(tiny), chips.parse('v5e:2x2', slices=2))


@pytest.mark.slow
@needs_tpu_compiler
def test_both_cores_of_a_chip_are_devices(tiny):
    """In a process of its own: libtpu (of jax 0.10.2) ends with SIGSEGV where it has compiled the
    same programs for v5e:2x2 before."""
    with ProcessPoolExecutor(1, multiprocessing.get_context('spawn')) as processes:
        fits, shards, seconds = processes.submit(_planned, tiny, 'tpu7x:2x2x1').result()
    assert fits and shards == Shards(2, 2, 2) and seconds > 0


def _planned(config, topology):
    found = estimate(run_of(config), chips.parse(topology))
    return found.fits, found.layout.shards, found.step_seconds

"""Plans of a tiny run: for TPUs by their own compiler, where it is installed, and for GPUs."""

import contextlib
import importlib.util
import math
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

from configs import bert_base_pkm_pod
from pkm_jax import compile_check
from pkm_jax.data import dataset
from pkm_jax.mesh import OWN, Shards, make_mesh
from pkm_jax.planning import check as checks, chips, hlo, memory
from pkm_jax.planning.report import report
from pkm_jax.training import loop, settings
from pkm_jax.training.plan import Plan
from pkm_jax.training.program import abstract_batch

needs_tpu_compiler = pytest.mark.skipif(
    importlib.util.find_spec('libtpu') is None and 'TPU_LIBRARY_PATH' not in os.environ,
    reason="the TPU compiler is not installed: pip install 'jax[tpu]'")
SLOTS, WIDTH = 64, 128


@pytest.fixture
def tiny(config):
    """One layer, its memory split by rows and by columns, no text."""
    config.model.update(layers=1, width=WIDTH, attention_heads=1, feed_forward_width=48,
                        dropout=0., attention_dropout=0.)
    config.memory.update(layers=(0,), sub_keys=8, top_k=2, updates='sparse')
    config.memory.shards.update(rows=2, columns=2)
    config.data.update(corpus='', vocab_size=128)
    return config


@needs_tpu_compiler
def test_a_step_compiled_for_tpus(tiny):
    found = checks.check(tiny, chips.parse('v5e:2x2'))
    assert found.fits and found.plan.shards == Shards(1, 2, 2)
    assert found.memory.bytes['value tables'] == SLOTS * WIDTH * 4 / 4
    assert found.memory.bytes['optimizer state of value tables'] == SLOTS * WIDTH * 8 / 4
    assert found.memory.bytes['batch'] == 16 * (2 * 16 + 1 + 3 * 3) * 4 / 4
    assert 0 < found.memory.bytes[memory.PROGRAM] < 1e9
    assert found.counted_flops > 0 and found.loop_bytes > 0
    assert found.table_sized == () and found.unknown_loops == 0
    along = {(one.kind, axes) for one, axes, _ in found.exchanges}
    assert ('all-gather', 'rows × columns') in along and ('all-to-all', 'columns') in along
    text = report(found, 'tiny')
    assert 'tiny on v5e:2x2: 4 devices as data 1, rows 2, columns 2; compiled in' in text
    assert re.search(r'1 all-reduce +\S+ \+\d+ +rows × columns +\d', text)
    assert re.search(r'estimate +\d+\.\d\d ms', text) and 'FITS: 0.' in text

    full = found._replace(memory=found.memory._replace(available=1000))
    assert not full.fits and 'DOES NOT FIT' in report(full, 'full')


@needs_tpu_compiler
def test_what_the_compiler_refuses_does_not_fit(tiny, capsys):
    tiny.memory.update(placement='none', layers=())
    tiny.train.batch = 2 ** 23      # 2 million sequences a chip
    assert not compile_check.run(tiny, 'v5e:2x2')
    text = capsys.readouterr().out
    assert re.search(r'DOES NOT FIT: [\d.]+ GB or more of 16.91 GB, [\d.]+ GB too much\. '
                     r'Try a larger train.accumulate.* The compiler: RESOURCE_EXHAUSTED', text)
    too_much = float(re.search(r'([\d.]+) GB too much', text)[1])
    assert too_much > 10


def test_gpus_are_estimated(tiny, capsys):
    tiny.memory.shards.update(rows=1, columns=8)
    assert compile_check.run(tiny, 'h200:8')
    text = capsys.readouterr().out
    assert 'run on h200:8: 8 devices as data 1, rows 1, columns 8; compiled for as many CPU' in text
    assert 'estimated: nothing here is compiled' in text
    assert re.search(r'\d all-reduce +\S+ \+\d+ +columns +\d', text) and 'of 105.75 GB' in text

    tiny.train.batch = 2 ** 26
    found = checks.check(tiny, chips.parse('h200:8'))
    assert not found.fits and found.memory.bytes[memory.TEMPORARY] > 141e9


@pytest.mark.parametrize('shape, axis, found', [
    ((SLOTS, WIDTH), 'rows', ['all-gather of f32[64,64]']),
    ((SLOTS, WIDTH), 'columns', ['all-gather of f32[32,128]']),
    ((SLOTS + 2, WIDTH), 'rows', [])])      # other arrays may be gathered
def test_gathered_tables_are_found(tiny, shape, axis, found):
    plan = Plan(Shards(2, 2, 2), True, ())
    mesh, model = make_mesh(plan.shards), settings.model_config(tiny, 128)

    def gather(table):
        return jax.lax.all_gather(table, axis, axis=OWN.memory.index(axis), tiled=True)

    program = jax.jit(jax.shard_map(gather, mesh=mesh, in_specs=OWN.table, out_specs=P(),
                                    check_vma=False))
    text = program.lower(jax.ShapeDtypeStruct(shape, 'float32')).compile().as_text()
    assert list(checks.table_sized(hlo.Program(text).collectives(8), plan, model)) == found


def test_a_table_read_past_its_layout_is_found(tiny):
    """The partitioner gathers a table where a program indexes it as if it were whole."""
    plan = Plan(Shards(2, 2, 2), True, ())
    mesh, model = make_mesh(plan.shards), settings.model_config(tiny, 128)
    program = jax.jit(lambda table: jnp.sort(table, axis=0),
                      in_shardings=NamedSharding(mesh, OWN.table),
                      out_shardings=NamedSharding(mesh, P()))
    text = program.lower(jax.ShapeDtypeStruct((SLOTS, WIDTH), 'float32')).compile().as_text()
    assert checks.table_sized(hlo.Program(text).collectives(8), plan, model)


def test_batches_have_the_shapes_that_are_planned(tiny, corpus):
    tiny.data.corpus = str(corpus)
    prepared = dataset.prepare(tiny.data.corpus, vocab_size=120, length=tiny.data.length,
                               validation_fraction=.1, cache=tiny.data.cache)
    with contextlib.closing(loop._stream(tiny, prepared)) as stream:
        batch = next(stream)
    planned = abstract_batch(tiny, make_mesh(Shards(8)))
    assert {name: (array.shape, array.dtype) for name, array in batch.items()} == {
        name: (array.shape, array.dtype) for name, array in planned.items()}


def test_what_cannot_be_planned_is_refused():
    done = subprocess.run(
        [sys.executable, '-m', 'pkm_jax.compile_check', '--config=configs/quickstart.py',
         '--topology=v9:4x4'], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("Not planned: --topology=v9:4x4: 'v9' is none of v5e")


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
    found = checks.check(bert_base_pkm_pod.get_config(), chips.parse('v5e:16x16'))
    assert found.fits and found.table_sized == ()
    tables = found.memory.bytes['value tables']
    assert tables * math.prod(found.plan.shards[1:]) == 4096 ** 2 * 768 * 2

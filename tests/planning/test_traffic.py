"""HBM traffic read from programs: compiled for a TPU, and as TPUs' are written."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from pkm_jax.planning import chips, hlo
from pkm_jax.planning.traffic import Moved, Traffic, _part
from tests.planning.test_hlo import TPU as ASYNCHRONOUS
from tests.planning.tiny import needs_tpu_compiler


def moved(text):
    """Bytes read and written by instruction, loops as often as they run."""
    return {one.name: (one.read * one.times, one.written * one.times)
            for one in Traffic(hlo.Module(text)).instructions()}


def traffic_of(text):
    """Of a program whose instructions have been counted."""
    found = Traffic(hlo.Module(text))
    found.by_part()
    return found


def whole(text):
    """The program with a parameter in every computation, each by a name of its own."""
    blocks = []
    for block in text.split('\n\n'):
        heading = re.match(r'%([\w.\-]+) \(p: (.*)\) -> .*\{\n', block)
        if heading:
            block = re.sub(r'%p\b', f'%p.{heading[1]}', block).replace(
                '{\n', f'{{\n  %p.{heading[1]} = {heading[2]} parameter(0)\n', 1)
        blocks.append(block)
    return '\n\n'.join(blocks)


TPU = whole(ASYNCHRONOUS)


def test_a_collective_moves_once_what_it_takes_and_leaves():
    """Neither what fusions on the way carry nor its end moves anything; a scatter of sums does."""
    found = moved(TPU)
    assert found['b'] == (2 * 3 * 4, 16 * 3 * 4)
    assert 'c' not in found and 'd' not in found
    assert found['e'] == (16 * 3 * 4, 2 * 3 * 4)


TILE = 8 * 128 * 4


def test_loops_count_as_often_as_they_run_and_the_chip_not_at_all():
    """Three iterations; [4, 8] of float32 fills a tile."""
    found = moved(TPU)
    assert found['y'] == (3 * TILE, 0) and found['z'] == (0, 3 * TILE)
    assert found['v'] == (3 * TILE, 0)


PROGRAM = """HloModule step, is_scheduled=true

%taken (p0: f32[64,192], p1: s32[3]) -> f32[3,192] {
  %p0 = f32[64,192]{1,0:T(8,128)} parameter(0)
  %p1 = s32[3]{0:T(128)S(1)} parameter(1)
  ROOT %g = f32[3,192]{1,0:T(4,128)} gather(%p0, %p1), offset_dims={1}
}

%put (q0: f32[64,192], q1: f32[8,192]) -> f32[64,192] {
  %q0 = f32[64,192]{1,0:T(8,128)} parameter(0)
  %q1 = f32[8,192]{1,0:T(8,128)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  ROOT %u = f32[64,192]{1,0:T(8,128)} dynamic-update-slice(%q0, %q1, %zero, %zero)
}

ENTRY %main (a: f32[64,192], i: s32[3], r: f32[8,192]) -> f32[64,192] {
  %a = f32[64,192]{1,0:T(8,128)} parameter(0)
  %i = s32[3]{0:T(128)S(1)} parameter(1)
  %r = f32[8,192]{1,0:T(8,128)} parameter(2)
  %rows = f32[3,192]{1,0:T(4,128)S(1)} fusion(%a, %i), kind=kCustom, calls=%taken
  %early = (f32[8,192]{1,0:T(8,128)S(1)}, f32[8,192]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%r)
  %there = f32[8,192]{1,0:T(8,128)S(1)} copy-done(%early)
  %part = ((f32[64,192]{1,0:T(8,128)}), f32[16,192]{1,0:T(8,128)S(1)}, s32[]{:S(2)}) slice-start(%a), slice={[0:16], [0:192]}
  %columns = f32[64,192]{0,1:T(8,128)} copy(%a)
  %kernel = f32[64,192]{1,0:T(8,128)} custom-call(%columns), custom_call_target="tpu_custom_call", backend_config={"cost_estimate":{"flops":"1","bytes_accessed":"777"}}
  %sorted = (s32[65536]{0:T(1024)}, s32[65536]{0:T(1024)}) sort(%keys, %keys), dimensions={0}, backend_config={"used_scoped_memory_configs":[{"memory_space":"1","offset":"0","size":"131072"}]}
  %keys = s32[65536]{0:T(1024)} parameter(3)
  ROOT %done = f32[64,192]{1,0:T(8,128)} fusion(%kernel, %r), kind=kLoop, calls=%put
}
"""


def test_parts_padding_kernels_and_passes_of_sorts():
    """192 columns fill 256, or 128 times 192 rows; 512 KiB sorted by 128 KiB merge in two levels."""
    found, row = moved(PROGRAM), 256 * 4
    assert found['rows'] == (4 * row, 0)        # three rows in a tile of four
    assert found['early'] == (8 * row, 0) and 'there' not in found
    assert found['part'] == (16 * row, 0)
    assert found['columns'] == (64 * row, 192 * 128 * 4)
    assert found['kernel'] == (777, 0)
    assert found['sorted'] == (11 * 65536 * 4, 12 * 65536 * 4)      # its key twice, 1 + 2 + 3 passes
    assert found['done'] == (8 * row, 8 * row)


def test_operands_that_the_program_does_not_define_are_named():
    assert traffic_of(PROGRAM).unknown == set()
    lost = re.sub('  %r = .*\n', '', PROGRAM)
    found = traffic_of(lost)
    assert found.unknown == {'r'} and moved(lost)['done'] == (0, 8 * 256 * 4)


@pytest.mark.parametrize('source, part', [
    ('jit(step)/transpose(jvp(read))/while/body/dynamic_update_slice', 'read, backward'),
    ('jit(step)/jvp(retrieval)/dot_general', 'retrieval'),
    ('jit(step)/jvp(layers)/dynamic_update_slice', 'model'),
    ('jit(step)/update/mul', 'update of parameters, norms')])
def test_what_a_part_is_follows_from_its_scopes(source, part):
    assert _part(Moved('fusion.1', 'fusion', source, 8, 0, 1)) == part


def compiled(function, *shapes):
    whole = SingleDeviceSharding(chips.devices(chips.parse('v5e:1x1'))[0])
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=whole) for shape in shapes]
    return jax.jit(function, out_shardings=whole).lower(*arrays).compile().as_text()


@needs_tpu_compiler
@pytest.mark.parametrize('function, shapes, read, written', [
    (lambda x: jnp.sin(x) + 1, [(2 ** 15, 1024)], 1, 1),
    pytest.param(lambda x, y: x @ y, [(2 ** 15, 1024), (1024, 1024)], 1 + 1 / 32, 1,
                 marks=pytest.mark.slow),
    (lambda x: jnp.sum(x * x), [(2 ** 15, 1024)], 1, 0)])
def test_programs_of_one_pass_move_their_arrays_once(function, shapes, read, written):
    found = moved(compiled(function, *shapes)).values()
    size = 2 ** 25 * 4
    assert sum(one for one, _ in found) == pytest.approx(read * size, rel=.01)
    assert sum(one for _, one in found) == pytest.approx(written * size, rel=.01, abs=1e5)

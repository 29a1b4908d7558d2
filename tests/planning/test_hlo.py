"""Collectives and loops, read from the text of programs: compiled here, and as TPUs' are."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from pkm_jax.mesh import Shards, make_mesh
from pkm_jax.planning import hlo

SHAPE = {'data': 2, 'rows': 2, 'columns': 2}


def compiled(function, *shapes):
    """The text of a function of each device's parts, of arrays split over all devices."""
    mesh = make_mesh(Shards(2, 2, 2))
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    split = jax.shard_map(function, mesh=mesh, in_specs=P(tuple(SHAPE)), out_specs=P(tuple(SHAPE)),
                          check_vma=False)
    return hlo.Module(jax.jit(split).lower(*arrays).compile().as_text())


@pytest.mark.parametrize('function, kind, axes, shape, sent', [
    (lambda x: jax.lax.all_gather(x, ('rows', 'columns'), tiled=True), 'all-gather',
     'rows × columns', '[8,3]', 8 * 3 * 4 * 3 / 4),
    (lambda x: jax.lax.psum(x, 'data'), 'all-reduce', 'data', '[2,3]', 2 * 2 * 3 * 4 / 2),
    (lambda x: jax.lax.psum(x, tuple(SHAPE)), 'all-reduce', 'data × rows × columns', '[2,3]',
     2 * 2 * 3 * 4 * 7 / 8),
    (lambda x: jax.lax.psum_scatter(x, 'rows', tiled=True), 'reduce-scatter', 'rows', '[2,3]',
     2 * 3 * 4 / 2),
    (lambda x: jax.lax.ppermute(x, 'columns', [(0, 1), (1, 0)]), 'collective-permute', 'columns',
     '[2,3]', 2 * 3 * 4),
])
def test_collectives_of_a_compiled_program(function, kind, axes, shape, sent):
    found, = compiled(function, (16, 3)).collectives(8)
    assert (found.kind, found.axes(SHAPE), found.times) == (kind, axes, 1)
    assert str(found.shapes[0]).endswith(shape) and found.bytes_sent == sent


def test_an_all_to_all_keeps_its_size():
    exchange = functools.partial(jax.lax.all_to_all, axis_name='columns', split_axis=0,
                                 concat_axis=1, tiled=True)
    found, = compiled(exchange, (16, 4)).collectives(8)
    assert (found.kind, found.axes(SHAPE)) == ('all-to-all', 'columns')
    assert found.bytes_sent == 2 * 4 * 4 / 2


def test_collectives_in_loops_count_as_often_as_they_run():
    def repeat(x):
        return jax.lax.scan(lambda total, _: (jnp.sin(jax.lax.psum(total, 'rows')), None), x,
                            length=5)[0]

    program = compiled(repeat, (16, 3))
    assert [found.times for found in program.collectives(8)] == [5]
    assert program.unknown_loops() == 0


def test_loops_that_data_ends_are_said_to_be_unknown():
    def halve(x):
        return jax.lax.while_loop(lambda x: jnp.sum(x) > 1, lambda x: jax.lax.psum(x, 'rows') / 4,
                                  x)

    program = compiled(halve, (16, 3))
    assert program.unknown_loops() == 1
    assert [found.times for found in program.collectives(8)] == [1]


ALL = tuple(range(8))


@pytest.mark.parametrize('text, groups', [
    ('replica_groups={{0,1},{2,3}}, use', ((0, 1), (2, 3))),
    ('replica_groups={}, use', (ALL,)),
    ('replica_groups=[2,4]<=[8], use', ((0, 1, 2, 3), (4, 5, 6, 7))),
    ('replica_groups=[4,2]<=[2,4]T(1,0), use', ((0, 4), (1, 5), (2, 6), (3, 7))),
    ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}, use",
     ((0, 4), (1, 5), (2, 6), (3, 7))),
    ("replica_groups=mesh['a'=8,'b'=1] {'a','b'}, use", (ALL,)),
    ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}, use",
     ((0, 4), (1, 5), (2, 6), (3, 7))),
    ('source_target_pairs={{0,2},{2,4},{1,3}}', ((0, 2, 4), (1, 3))),
])
def test_groups_in_every_notation(text, groups):
    assert hlo._groups(text, 8) == groups


TPU = """HloModule step, is_scheduled=true

%start.1 (p: s32[2,3]) -> (s32[2,3], s32[16,3]) {
  %g.1 = s32[16,3]{1,0:T(8,128)} all-gather(%p), channel_id=1, replica_groups=[1,8]<=[8], \
backend_config={"uses":"async_collective_fusion"}
  ROOT %c.1 = (s32[2,3], s32[16,3]) custom-call(%g.1), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.1 (p: s32[2,3]) -> s32[16,3] {
  ROOT %g.2 = s32[16,3]{1,0} all-gather(%p), channel_id=1, replica_groups=[1,8]<=[8]
}

%done.1 (p: s32[2,3]) -> s32[16,3] {
  %g.3 = s32[16,3]{1,0} all-gather(%p), channel_id=1, replica_groups=[1,8]<=[8]
  ROOT %c.3 = s32[16,3] custom-call(%g.3), custom_call_target="AsyncCollectiveDone"
}

%all-reduce-scatter.1 (p: f32[16,3]) -> f32[2,3] {
  %r.1 = f32[16,3]{1,0:T(8,128)} all-reduce(%p), replica_groups=[1,8]<=[8], to_apply=%sum
  ROOT %s.1 = f32[2,3]{1,0} dynamic-slice(%r.1, %zero), dynamic_slice_sizes={2,3}
}

%condition.1 (p: (s32[], f32[4,8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(3)
  %i.1 = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i.1, %limit), direction=LT
}

%body.1 (p: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %i.2 = s32[]{:T(128)S(6)} get-tuple-element(%p), index=0
  %x = f32[4,8]{1,0:T(8,128)} get-tuple-element(%p), index=1
  %y = f32[4,8]{1,0:T(8,128)S(1)} fusion(%x), kind=kLoop, calls=%inside
  %z = f32[4,8]{1,0:T(8,128)} fusion(%y), kind=kLoop, calls=%inside
  %v = f32[2,8]{1,0:T(8,128)S(1)} fusion(%z), kind=kLoop, calls=%inside
  %gather_fusion = f32[3,8]{1,0:T(8,128)S(1)} fusion(%x), kind=kCustom, calls=%inside
  %scatter_custom_fusion = f32[4,8]{1,0:T(8,128)} fusion(%v), kind=kCustom, calls=%inside
  ROOT %t = (s32[], f32[4,8]{1,0:T(8,128)}) tuple(%i.2, %scatter_custom_fusion)
}

%inside (p: f32[4,8]) -> f32[4,8] {
  ROOT %n = f32[4,8]{1,0} negate(%p)
}

ENTRY %main (a: s32[2,3]) -> f32[2,3] {
  %a = s32[2,3]{1,0} parameter(0)
  %b = (s32[2,3], s32[16,3]) fusion(%a), kind=kCustom, calls=%start.1
  %b.0 = s32[2,3]{1,0} get-tuple-element(%b), index=0
  %b.1 = s32[16,3]{1,0} get-tuple-element(%b), index=1
  %c = (f32[5]{0}, s32[2,3]{1,0}, s32[16,3]{1,0}, s32[16,3]{1,0}) fusion(%b.1), kind=kOutput, calls=%async_collective_fusion.1
  %c.1 = s32[16,3]{1,0} get-tuple-element(%c), index=2
  %d = s32[16,3]{1,0} fusion(%c.1), kind=kCustom, output_to_operand_aliasing={{}: (0, {})}, calls=%done.1
  %e = f32[2,3]{1,0} fusion(%d), kind=kCustom, calls=%all-reduce-scatter.1
  %f = (s32[], f32[4,8]) while(%e), condition=%condition.1, body=%body.1
  ROOT %g = bf16[6]{0} all-reduce-start(%f), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%sum
}
"""


def test_collectives_as_tpus_fuse_them():
    """An asynchronous one counts once; a sum of which each keeps a part is a reduce-scatter."""
    gather, scatter, total = hlo.Module(TPU).collectives(8)
    assert (gather.kind, gather.bytes_sent) == ('all-gather', 16 * 3 * 4 * 7 / 8)
    assert (scatter.kind, scatter.bytes_sent) == ('reduce-scatter', 16 * 3 * 4 * 7 / 8)
    assert (total.kind, total.bytes_sent) == ('all-reduce', 2 * 12 * 3 / 4)
    assert total.axes(SHAPE) == 'rows × columns'
    assert gather.axes({'data': 2, 'rows': 1, 'columns': 4}) == 'data × columns'
    odd = total._replace(groups=((0, 3), (1, 2)))
    assert odd.axes(SHAPE) == '2 devices'


def test_loops_as_tpus_have_them():
    assert hlo.Module(TPU).unknown_loops() == 0
    skewed = TPU.replace('body=%body.1', 'body=%body.1, metadata={op_name="skewed_reads/while"}')
    skewed = skewed.replace('constant(3)', 'parameter(1)')
    for text, times in ((TPU, 3), (skewed, 0)):
        assert {number for line, number in hlo.Module(text).instructions()
                if '%gather_fusion' in line} == {times}

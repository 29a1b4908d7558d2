"""Retrieval, read and value rows over meshes of eight devices against one device."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from pkm_jax.memory import embedding_bag as bag
from pkm_jax.memory import product_keys, sharded
from pkm_jax.memory.replica_exchange import replica_exchange
from pkm_jax.memory.sparse_rows import SparseRows, in_order, sorted_like_reads
from pkm_jax.mesh import OWN, Shards, make_mesh

TOKENS, READS, SLOTS, WIDTH = 16, 6, 32, 16
# data × memory: 1×1, 1×8, 2×4, 4×2 and 8×1, the memory by rows, by columns and by both.
LAYOUTS = [Shards(1, 1, 1), Shards(1, 8, 1), Shards(1, 1, 8), Shards(1, 2, 4), Shards(2, 4, 1),
           Shards(2, 1, 4), Shards(2, 2, 2), Shards(4, 2, 1), Shards(4, 1, 2), Shards(8, 1, 1)]
layouts = pytest.mark.parametrize('shards', LAYOUTS, ids=lambda s: '×'.join(map(str, s)))


def mesh_of(shards):
    """Eight devices, or the first one alone."""
    if shards == Shards():
        return jax.make_mesh(shards, OWN.names, devices=jax.devices()[:1],
                             axis_types=(jax.sharding.AxisType.Auto,) * 3)
    return make_mesh(shards)


@functools.cache
def draw():
    """A table; slots, weights (those of two tokens are 0) and a gradient of the reads."""
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(TOKENS, READS))
    weights[3:5] = 0
    slots = rng.integers(0, SLOTS, (TOKENS, READS), np.int32)
    arrays = rng.normal(size=(SLOTS, WIDTH)), weights, rng.normal(size=(TOKENS, WIDTH))
    values, weights, direction = (array.astype(np.float32) for array in arrays)
    return values, slots, weights, direction


def dense(values, slots, weights, direction):
    """The read, and the gradients of values and weights."""
    read, pull = jax.vjp(lambda v, w: sharded.embedding_bag(v, slots, w), values, weights)
    return read, *pull(direction)


def sparse(values, slots, weights, direction, implementation=None, dtype=jnp.float32):
    """The same, the gradient of the values as SparseRows."""
    delta = sharded.no_delta(*values.shape, slots.size, dtype=dtype)
    read, pull, touched = jax.vjp(
        lambda d, w: sharded.sparse_embedding_bag(values, d, slots, w,
                                                  implementation=implementation),
        delta, weights, has_aux=True)
    rows, by_weight = pull(direction)
    return read, SparseRows(touched.ids, rows, touched.count), by_weight


def spread(rows, slots=SLOTS):
    """A table of zeros with these rows."""
    table = np.zeros((slots + 1, rows.rows.shape[1]), np.float32)
    ids = np.asarray(rows.ids)
    table[ids] = rows.rows
    assert len(set(ids[ids < slots])) == np.sum(ids < slots) == np.sum(rows.count)
    return table[:slots]


@functools.cache
def expected():
    return jax.jit(lambda *arrays: (
        bag.embedding_bag(*arrays[:3]),
        *jax.vjp(lambda v, w: bag.embedding_bag(v, arrays[1], w), arrays[0], arrays[2])[1](arrays[3])
    ))(*draw())


@layouts
def test_reads_and_dense_gradients_equal_those_of_one_device(shards):
    with jax.set_mesh(mesh_of(shards)):
        ours = jax.jit(dense)(*draw())
    for array, other in zip(ours, expected()):
        np.testing.assert_allclose(array, other, atol=1e-5)
    if shards.rows == 1:        # every sum has one device, and its order
        np.testing.assert_array_equal(ours[0], expected()[0])


@layouts
def test_compact_gradients_equal_the_dense_ones_of_one_device(shards):
    values, slots, weights, _ = draw()
    with jax.set_mesh(mesh_of(shards)):
        read, rows, by_weight = jax.jit(sparse)(*draw())
    theirs = expected()
    np.testing.assert_allclose(read, theirs[0], atol=1e-5)
    np.testing.assert_allclose(spread(rows), theirs[1], atol=1e-5)
    used = weights != 0
    np.testing.assert_allclose(by_weight[used], theirs[2][used], atol=1e-5)
    assert set(np.asarray(rows.ids)) - {SLOTS} == set(slots[used])
    exchanged = replica_exchange(shards, TOKENS, READS, SLOTS, WIDTH, 4, 4).what
    if exchanged != 'rows' and shards.rows == 1:        # every sum in the order of one device
        np.testing.assert_array_equal(spread(rows), theirs[1])


@pytest.mark.parametrize('shards', [Shards(2, 4, 1), Shards(1, 2, 4)])
def test_kernels_for_tpus_read_what_is_a_shards_own(shards):
    """Interpreted; replicas exchange tokens in one of the layouts, and rows in none."""
    with jax.set_mesh(make_mesh(shards)):
        read, rows, by_weight = jax.jit(functools.partial(sparse, implementation='tpu'))(*draw())
    used = draw()[2] != 0
    np.testing.assert_allclose(read, expected()[0], atol=1e-5)
    np.testing.assert_allclose(spread(rows), expected()[1], atol=1e-5)
    np.testing.assert_allclose(by_weight[used], expected()[2][used], atol=1e-5)


@pytest.mark.parametrize('slots', [SLOTS, 512])
def test_kernels_for_gpus_leave_out_reads_of_other_shards(slots):
    """Interpreted; with a place for every row of a part, and with fewer."""
    rng, (_, _, weights, direction) = np.random.default_rng(5), draw()
    given = (rng.normal(size=(slots, 256)).astype(np.float32),
             rng.integers(0, slots, (TOKENS, READS), np.int32), weights, np.tile(direction, 16))
    results = []
    for shards, implementation in (Shards(), 'xla'), (Shards(2, 2, 2), 'gpu'):
        with jax.set_mesh(mesh_of(shards)):
            results.append(jax.jit(functools.partial(sparse, implementation=implementation))(
                *given))
    (want, want_rows, want_by_weight), (read, rows, by_weight) = results
    used = weights != 0
    np.testing.assert_allclose(read, want, atol=1e-4)
    np.testing.assert_allclose(spread(rows, slots), spread(want_rows, slots), atol=1e-4)
    np.testing.assert_allclose(by_weight[used], want_by_weight[used], atol=1e-4)


def test_both_exchanges_occur_in_these_tests():
    assert {replica_exchange(shards, TOKENS, READS, SLOTS, WIDTH, 4, 4).what for shards in LAYOUTS
            } == {'nothing', 'tokens', 'rows'}


@pytest.mark.parametrize('slots, parts, apart, shards', [
    (32, 2, 1, Shards(2, 2, 2)),        # a place for each row of a part, nearly all in use
    (32, 2, 8, Shards(2, 2, 2)),        # the same, few in use
    (512, 2, 16, Shards(1, 4, 2)),      # fewer places in each read, one for each row in the sum
    (512, 6, 16, Shards(2, 2, 2)),
    (512, 2, 16, Shards(1, 2, 4)),      # fewer in the sum too
    (512, 2, 1, Shards(4, 1, 2)),
], ids=str)
def test_rows_are_taken_put_and_merged_where_they_live(slots, parts, apart, shards):
    """Several reads of one table, of slots that lie so far apart: their SparseRows added up."""
    arrays = draw()[1:]
    values = np.random.default_rng(1).normal(size=(slots, WIDTH)).astype(np.float32)

    def run(values, first, weights, direction):
        each = [sparse(values, (first * apart + shift) % slots, weights, direction)[1]
                for shift in range(parts)]
        merged = sharded.merge(jax.tree.map(lambda *leaves: jnp.stack(leaves), *each), slots)
        taken = sharded.take_rows(values, merged.ids)
        marks = sharded.put_rows(jnp.zeros(slots), merged.ids, merged.ids.astype(jnp.float32))
        return each, merged, sharded.put_rows(values, merged.ids, taken + merged.rows), marks

    with jax.set_mesh(make_mesh(shards)):
        each, merged, added, marks = jax.jit(run)(values, *arrays)
    total = sum(spread(rows, slots) for rows in each)
    np.testing.assert_allclose(spread(merged, slots), total, atol=1e-6)
    np.testing.assert_allclose(added, values + total, atol=1e-6)
    ids = np.asarray(merged.ids)
    np.testing.assert_array_equal(np.flatnonzero(marks), np.sort(ids[(ids > 0) & (ids < slots)]))


@pytest.mark.parametrize('shards', [Shards(8, 1, 1), Shards(2, 2, 2)])
def test_retrieval_equals_that_of_one_device(shards):
    rng = np.random.default_rng(0)
    query = rng.normal(size=(TOKENS, 2, 2, 3)).astype(np.float32)
    codebooks = rng.normal(size=(2, 2, 5, 3)).astype(np.float32)

    def loss(search, query, codebooks):
        scores, slots = search(query, codebooks, 3)
        return jnp.sum(scores ** 2), slots

    def run(search):
        differentiate = jax.value_and_grad(functools.partial(loss, search), (0, 1), has_aux=True)
        return jax.jit(differentiate)(query, codebooks)

    theirs = run(product_keys.top_k_product_keys)
    with jax.set_mesh(make_mesh(shards)):
        ours = run(sharded.top_k_product_keys)
    for array, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs)):
        np.testing.assert_allclose(array, other, rtol=1e-4, atol=1e-5)


def collectives(function, shards, slots=2 ** 20, tokens=64):
    """The compiled text of a function of `draw`'s arguments, for a large table."""
    mesh = make_mesh(shards)
    with jax.set_mesh(mesh):
        shapes = [((slots, WIDTH), jnp.float32, OWN.table),
                  ((tokens, READS), jnp.int32, OWN.tokens),
                  ((tokens, READS), jnp.float32, OWN.tokens),
                  ((tokens, WIDTH), jnp.float32, OWN.tokens)]
        return jax.jit(function).lower(*(
            jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(mesh, spec))
            for shape, dtype, spec in shapes)).compile()


def test_table_gradients_cross_the_devices_once():
    """One all-reduce of the table's size, not one a read."""
    text = collectives(dense, Shards(8, 1, 1)).as_text()
    assert text.count('all-reduce(') + text.count('all-reduce-start(') == 1
    assert 'all-gather' not in text


@pytest.mark.parametrize('shards', [Shards(2, 2, 2), Shards(1, 1, 8)])
def test_nothing_of_a_table_is_gathered_or_made(shards):
    compiled = collectives(sparse, shards)
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes + memory.output_size_in_bytes < 2 ** 20 * WIDTH * 4 / 100
    assert f'f32[{2 ** 20},{WIDTH}]' not in compiled.as_text()


def lossless(shards=LAYOUTS[0], platform='gpu', kind='NVIDIA H200', width=1024,
             dtype=jnp.bfloat16, slots=4096, implementation=None):
    """`rows_dtype` in a mesh of devices that are not here."""
    like = jax.ShapeDtypeStruct
    mesh = AbstractMesh(shards, OWN.names, abstract_device=AbstractDevice(kind, None, platform))
    with use_abstract_mesh(mesh):
        return sharded.rows_dtype(like((slots, width), jnp.dtype(dtype)),
                                  like((64, READS), jnp.dtype(jnp.float32)),
                                  implementation=implementation)


@pytest.mark.parametrize('shards', [Shards(), Shards(1, 8, 1), Shards(1, 2, 4), Shards(4, 2, 1)])
def test_rows_of_gpus_need_no_more_than_the_dtype_of_the_table(shards):
    assert lossless(shards) == jnp.bfloat16
    assert lossless(shards, dtype=jnp.float32) == jnp.float32


def test_rows_that_are_not_rounded_stay_float32():
    """On other devices, in plain jnp, and where those of replicas are added up."""
    assert replica_exchange(Shards(4, 1, 1), 64, READS, 8, 1024, 2, 4).what == 'rows'
    like = jax.ShapeDtypeStruct((64, 128), jnp.dtype(jnp.bfloat16))
    assert sharded.rows_dtype(like, like) == jnp.float32
    for case in (dict(platform='cpu'), dict(platform='tpu'), dict(kind='AMD Instinct MI300X'),
                 dict(implementation='xla'), dict(width=96), dict(shards=Shards(1, 1, 16)),
                 dict(shards=Shards(4), slots=8)):
        assert lossless(**case) == jnp.float32, case


@pytest.mark.parametrize('slots', [SLOTS, 2 * TOKENS * READS], ids=['in place', 'compact'])
def test_narrow_rows_of_gpus_are_the_same_numbers(slots):
    """The kernel interpreted, to the bit: float32 rows are those of the table's dtype, widened."""
    rng = np.random.default_rng(0)
    _, _, weights, _ = draw()
    given = [jnp.asarray(rng.normal(size=(slots, 128)), jnp.bfloat16),
             rng.integers(0, slots, (TOKENS, READS), np.int32), weights,
             jnp.asarray(rng.normal(size=(TOKENS, 128)), jnp.bfloat16)]
    narrow, wide = (jax.jit(functools.partial(sparse, implementation='gpu', dtype=dtype))(*given)
                    for dtype in (jnp.bfloat16, jnp.float32))
    assert (narrow[1].rows.dtype, wide[1].rows.dtype) == (jnp.bfloat16, jnp.float32)
    assert np.any(np.asarray(wide[1].rows))
    for one, other in zip(jax.tree.leaves(narrow), jax.tree.leaves(wide), strict=True):
        np.testing.assert_array_equal(np.asarray(one, np.float32), np.asarray(other, np.float32))


@pytest.mark.parametrize('shards', [Shards(), Shards(2, 2, 2)], ids=['one', 'eight'])
def test_reads_of_no_slot_are_none(shards):
    values, slots, weights, direction = draw()
    slots[:2, 0], (fewer := weights.copy())[:2, 0] = (-1, SLOTS + 3), 0
    with jax.set_mesh(mesh_of(shards)):
        for read in sparse, dense:
            got, want = (jax.jit(read)(values, slots, chosen, direction)
                         for chosen in (weights, fewer))
            np.testing.assert_array_equal(got[0], want[0])
            for one, other in zip(jax.tree.leaves(got[1]), jax.tree.leaves(want[1]), strict=True):
                np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize('shards', [Shards(), Shards(1, 4, 2)], ids=['one', 'eight'])
def test_what_gpus_sort_twice_are_the_same_reads(shards):
    """What was touched, and its gradients: of which XLA for GPUs makes one sort."""
    like = jax.ShapeDtypeStruct
    with jax.set_mesh(mesh_of(shards)):
        compiled = jax.jit(functools.partial(sparse, implementation='gpu')).lower(
            like((4096, 256), jnp.float32), like((TOKENS, READS), jnp.int32),
            like((TOKENS, READS), jnp.float32), like((TOKENS, 256), jnp.float32)).compile()
    sorted_reads = re.findall(r' sort\((%[\w.]+)', compiled.as_text())
    assert len(sorted_reads) == 2 and len(set(sorted_reads)) == 1


def test_of_what_gpus_sort_twice_nothing_is_left_out():
    """A sort whose order nothing used would become one of slots alone, and not be the same."""
    ids = np.random.default_rng(1).integers(0, 9, (5, 4), np.int32)
    for platform, sorted_arrays in ('cuda', 2), ('cpu', 1):
        text = jax.jit(sorted_like_reads).trace(ids).lower(
            lowering_platforms=(platform,)).as_text()
        operands, = re.findall(r'"stablehlo.sort"\((.*?)\)', text)
        assert len(operands.split(',')) == sorted_arrays
        order = re.search(r'(%\w+):2 = "stablehlo.sort"', text)
        assert (order is not None and f'compare LT, {order[1]}#1' in text) == (platform == 'cuda')
    for sort in sorted_like_reads, lambda ids: in_order(ids)[1]:
        np.testing.assert_array_equal(jax.jit(sort)(ids), np.sort(ids, None))


def test_sums_in_plain_jnp_are_narrowed_only_where_that_is_asked_for():
    values, slots, weights, direction = draw()
    values, direction = (jnp.asarray(array, jnp.bfloat16) for array in (values, direction))
    wide, narrow = (jax.jit(functools.partial(sparse, dtype=dtype))(
        values, slots, weights, direction)[1].rows for dtype in (jnp.float32, jnp.bfloat16))
    assert np.any(np.asarray(wide) != np.asarray(wide.astype(jnp.bfloat16), np.float32))
    np.testing.assert_array_equal(*(np.asarray(rows, np.float32)
                                    for rows in (wide.astype(jnp.bfloat16), narrow)))

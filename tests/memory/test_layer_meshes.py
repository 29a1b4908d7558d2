"""The layer in meshes: none, ours, and somebody else's, with Auto and with Explicit axes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from pkm_jax import (
    SparseRows,
    apply_updates,
    count_slots,
    lazy_adam,
    no_counts,
    no_delta,
    rowwise_adagrad,
    rowwise_adam,
    sparse_embedding_bag,
)
from pkm_jax.memory.layer import MemoryConfig, ProductKeyMemory
from pkm_jax.mesh import Axes, Shards, make_mesh
from pkm_jax.refusal import Refusal

WIDTH, SHAPE = 16, (8, 6)
SIZES = dict(sub_keys=8, heads=2, top_k=3, query_width=8, value_width=8)
kinds = pytest.mark.parametrize('kind', [AxisType.Auto, AxisType.Explicit], ids=str)
mostly_explicit = pytest.mark.parametrize('kind', [
    pytest.param(AxisType.Auto, marks=pytest.mark.slow), AxisType.Explicit], ids=str)
NAMED = {'data and columns': Axes(('dp',), (), ('tp',)), 'rows': Axes(('dp',), ('tp',), ()),
         'data twice': Axes(('tp', 'dp'), (), ()), 'one of two': Axes((), ('tp',), ())}


def build(**settings):
    return ProductKeyMemory(MemoryConfig(**SIZES), WIDTH, rngs=nnx.Rngs(0), **settings)


def foreign(kind):
    return jax.make_mesh((4, 2), ('dp', 'tp'), axis_types=(kind,) * 2)


def run(sparse=False, sharding=None, **settings):
    """The read, statistics and gradients of a layer in the mesh in use, under jit."""
    memory = build(**settings)
    graph, params, rest = nnx.split(memory, nnx.Param, ...)
    params = nnx.to_pure_dict(params)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(*SHAPE, WIDTH)), jnp.float32)
    mask = jnp.arange(6)[None] < jnp.arange(8)[:, None]
    delta = memory.no_delta(48) if sparse else None
    if sharding is not None:
        x, mask = jax.device_put((x, mask), sharding)

    def loss(params, x, delta):
        y, reads = nnx.merge(graph, params, rest).read(x, mask, delta=delta)
        return jnp.sum(jnp.sin(y)), (y, reads)

    (_, (y, reads)), (by_params, by_x, by_delta) = jax.jit(jax.value_and_grad(
        loss, (0, 1, 2), has_aux=True))(params, x, delta)
    if sparse:
        table = np.zeros((65, 8), np.float32)
        table[np.asarray(reads.touched.ids)] = by_delta
        by_params['values'] = table[:64]
    result = y, reads.slots, reads.weights, reads.batch_stats, by_params, by_x
    return jax.tree.map(np.asarray, result), y


@functools.cache
def expected():
    return run()[0]


def assert_expected(result):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6), result,
                 expected())


@pytest.fixture
def said(caplog):
    expected()      # outside any mesh, under which it would say something
    return caplog


@pytest.mark.parametrize('sparse', [False, True])
@pytest.mark.parametrize('shards', [Shards(2, 2, 2), Shards(8, 1, 1)])
def test_in_a_mesh_of_ours(shards, sparse, said):
    with jax.set_mesh(make_mesh(shards)):
        assert_expected(run(sparse)[0])
    assert not said.records


@kinds
@pytest.mark.parametrize('sparse', [False, True])
def test_a_mesh_of_somebody_elses_replicates_the_table_and_says_so_once(kind, sparse, said):
    mesh = foreign(kind)
    with jax.set_mesh(mesh):
        for _ in range(2):
            result, y = run(sparse, NamedSharding(mesh, P('dp')))
            assert_expected(result)
    text, = (record.getMessage() for record in said.records)
    assert "('dp', 'tp')" in text and 'every device' in text and 'axes=' in text
    assert y.sharding.spec[0] == 'dp'


@mostly_explicit
@pytest.mark.parametrize('sparse', [False, True])
@pytest.mark.parametrize('named', NAMED)
def test_named_axes_of_somebody_elses_mesh_split_the_table(kind, sparse, named, said):
    mesh = foreign(kind)
    with jax.set_mesh(mesh):
        assert_expected(run(sparse, NamedSharding(mesh, P('dp')), axes=NAMED[named])[0])
    assert not said.records


def sparse_steps(make=lazy_adam, axes=None, place=None):
    """Table and slot counts after two sparse steps of a layer in the mesh in use, under jit."""
    memory, optimizer = build(axes=axes), make(.1, axes=axes)
    if place is not None:
        memory.values.set_value(jax.device_put(memory.values[...], place))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(*SHAPE, WIDTH)), jnp.float32)
    graph, state = nnx.split(memory)

    @jax.jit
    def step(state, moments, counts, key):
        memory = nnx.merge(graph, state)

        def loss_of(delta):
            y, reads = memory.read(x, delta=delta)
            return jnp.sum(jnp.sin(y)), reads

        rows, reads = jax.grad(loss_of, has_aux=True)(memory.no_delta(48))
        touched = reads.touched
        updates, moments = optimizer.update(SparseRows(touched.ids, rows, touched.count), moments)
        table = memory.values
        table[...] = apply_updates(table[...], updates, key, axes=axes)
        return nnx.state(memory), moments, count_slots(counts, reads, jnp.ones(SHAPE, bool))

    moments, counts = optimizer.init(memory.values[...]), no_counts(64)
    for seed in range(2):
        state, moments, counts = step(state, moments, counts, jax.random.key(seed))
    return jax.tree.map(np.asarray, (state['values'][...], counts)), state['values'][...]


@functools.cache
def after_sparse_steps(make):
    return sparse_steps(make)[0]


@mostly_explicit
@pytest.mark.parametrize('named', [None, 'data and columns', 'rows'])
def test_sparse_steps_in_somebody_elses_mesh(kind, named):
    want, axes, mesh = after_sparse_steps(lazy_adam), NAMED.get(named), foreign(kind)
    place = None if axes is None else NamedSharding(mesh, axes.table)
    with jax.set_mesh(mesh):
        got, table = sparse_steps(axes=axes, place=place)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(got[1][:2], want[1][:2]):
        np.testing.assert_array_equal(ours, theirs)
    if place is not None:
        assert table.sharding.is_equivalent_to(place, 2)


@mostly_explicit
@pytest.mark.parametrize('make', [
    rowwise_adam, pytest.param(rowwise_adagrad, marks=pytest.mark.slow)])
def test_moments_of_rows_in_somebody_elses_mesh(kind, make):
    want, axes, mesh = after_sparse_steps(make), NAMED['rows'], foreign(kind)
    with jax.set_mesh(mesh):
        got, _ = sparse_steps(make, axes, NamedSharding(mesh, axes.table))
    np.testing.assert_allclose(got[0], want[0], rtol=1e-4, atol=1e-5)


@kinds
def test_sparse_steps_in_somebody_elses_mesh_of_one_device(kind):
    mesh = jax.make_mesh((1, 1), ('dp', 'tp'), devices=jax.devices()[:1], axis_types=(kind,) * 2)
    want = after_sparse_steps(lazy_adam)
    with jax.set_mesh(mesh):
        got, _ = sparse_steps()
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5, atol=1e-6)


@kinds
@pytest.mark.parametrize('named', [None, 'data and columns'])
def test_the_public_sparse_read_in_somebody_elses_mesh(kind, named):
    rng = np.random.default_rng(0)
    values, weights = (jnp.asarray(rng.normal(size=size), jnp.float32) for size in ((16, 4), (8, 3)))
    slots = jnp.asarray(rng.integers(0, 16, (8, 3)), jnp.int32)
    axes = NAMED.get(named)

    def rows_of(values, slots, weights):
        def total(delta):
            y, touched = sparse_embedding_bag(values, delta, slots, weights, axes=axes)
            return jnp.sum(jnp.sin(y)), touched

        return jax.grad(total, has_aux=True)(no_delta(16, 4, 24, axes=axes))

    with jax.set_mesh(foreign(kind)):
        rows, touched = jax.jit(rows_of)(values, slots, weights)
    dense = jax.grad(lambda values: jnp.sum(jnp.sin(
        jnp.einsum('trv,tr->tv', values[slots], weights))))(values)
    table = np.zeros((17, 4), np.float32)
    table[np.asarray(touched.ids)] = rows
    np.testing.assert_allclose(table[:16], dense, rtol=1e-5, atol=1e-6)


def test_named_axes_split_the_table_and_not_named_ones_do_not():
    """By what the compiled program holds of 64 rows: 8 columns, or half of them on each device."""
    def text(axes):
        memory = build(axes=axes)
        graph, state = nnx.split(memory)
        x = jax.device_put(jnp.ones((*SHAPE, WIDTH)), NamedSharding(mesh, P('dp')))
        return jax.jit(lambda state, x: nnx.merge(graph, state).read(x)[0]).lower(
            state, x).compile().as_text()

    mesh = foreign(AxisType.Auto)
    with jax.set_mesh(mesh):
        assert 'f32[64,4]' in text(NAMED['data and columns'])
        assert 'f32[64,4]' not in text(None)


@kinds
def test_axes_that_the_mesh_lacks_are_refused_naming_both(kind):
    with jax.set_mesh(foreign(kind)):
        with pytest.raises(Refusal, match=r"\('dp', 'tp'\).* \['model'\]"):
            run(axes=Axes(('dp',), (), ('model',)))


def test_sizes_that_do_not_divide_are_refused_by_name():
    with jax.set_mesh(make_mesh(Shards(1, 1, 8))):
        with pytest.raises(Refusal, match='7 tokens do not divide into 8'):
            build().read(jnp.ones((7, WIDTH)))
    with jax.set_mesh(make_mesh(Shards(1, 8, 1))):
        memory = ProductKeyMemory(MemoryConfig(**SIZES | dict(sub_keys=7)), WIDTH,
                                  rngs=nnx.Rngs(0))
        with pytest.raises(Refusal, match='49 slots do not divide into 8'):
            memory.read(jnp.ones((8, WIDTH)))


def test_a_kernel_in_a_mesh_that_xla_partitions_is_refused():
    with jax.set_mesh(foreign(AxisType.Auto)):
        with pytest.raises(Refusal, match='cannot split a kernel'):
            build(implementation='gpu').read(jnp.ones((8, WIDTH)))


def test_a_foreign_mesh_of_one_device_is_no_mesh(said):
    with jax.set_mesh(jax.make_mesh((1, 1), ('dp', 'tp'), devices=jax.devices()[:1])):
        assert_expected(run()[0])
    assert not said.records


def test_within_a_shard_map_each_device_reads_for_itself(said):
    memory = build()
    memory.eval()
    x = jnp.asarray(np.random.default_rng(0).normal(size=(*SHAPE, WIDTH)), jnp.float32)
    with jax.set_mesh(foreign(AxisType.Auto)):
        graph, state = nnx.split(memory)
        got = jax.jit(jax.shard_map(lambda state, x: nnx.merge(graph, state).read(x)[0],
                                    in_specs=(P(), P('dp')), out_specs=P('dp'),
                                    check_vma=False))(state, x)
    np.testing.assert_allclose(got, memory.read(x)[0], rtol=1e-5, atol=1e-6)
    assert not said.records

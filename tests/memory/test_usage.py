"""Usage metrics against cases worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from pkm_jax.memory.layer import MemoryReads, TableSlots
from pkm_jax.memory.usage import (
    NEVER,
    SlotCounts,
    count_slots,
    counts_spec,
    host_counts,
    mark_selected,
    no_counts,
    uniform_ceiling,
    usage_metrics,
    used_shares,
)
from pkm_jax.mesh import OWN, Shards, make_mesh
from pkm_jax.refusal import Refusal


def reads(slots, weights):
    return MemoryReads(jnp.asarray(slots, jnp.int32), jnp.asarray(weights, jnp.float32), {})


# Two real tokens and a padding one, two heads, two reads a head, six slots.
READS = reads([[[0, 1], [2, 0]], [[0, 3], [0, 1]], [[5, 4], [5, 4]]],
              [[[.75, .25], [.5, .5]], [[1, 0], [.5, .5]], [[0, 0], [0, 0]]])
REAL = jnp.asarray([True, True, False])


def test_counts_by_hand():
    counts = count_slots(no_counts(6), READS, REAL)
    twice = host_counts(count_slots(counts, READS, REAL))
    shares = used_shares(counts)
    counts = host_counts(counts)
    np.testing.assert_array_equal(counts.selected, [4, 2, 1, 1, 0, 0])
    np.testing.assert_array_equal(counts.best, [3, 0, 1, 0, 0, 0])
    np.testing.assert_array_equal(counts.mass, [2.75, .75, .5, 0, 0, 0])
    np.testing.assert_array_equal(twice.selected, [8, 4, 2, 2, 0, 0])
    np.testing.assert_array_equal(twice.mass, 2 * counts.mass)
    np.testing.assert_allclose(shares, [2 / 6, 3 / 6], rtol=1e-6)


def test_a_mask_of_any_shape_of_as_many_tokens():
    flat = count_slots(no_counts(6), READS, REAL)
    jax.tree.map(np.testing.assert_array_equal, flat, count_slots(no_counts(6), READS, REAL[None]))
    with pytest.raises(Refusal, match=r'real \(2, 2\) for the reads of 3 tokens'):
        count_slots(no_counts(6), READS, jnp.ones((2, 2), bool))


def test_counts_of_another_table_are_refused_when_traced():
    ours = READS._replace(table_slots=TableSlots(6))
    jax.jit(count_slots)(no_counts(6), ours, REAL)
    with pytest.raises(Refusal, match=r'Counts of 7 slots .* table of 6: .*no_counts\(6\)'):
        jax.jit(count_slots)(no_counts(7), ours, REAL)


def test_metrics_by_hand():
    metrics = usage_metrics(count_slots(no_counts(6), READS, REAL))
    assert metrics['top_k_usage'] == 3 / 6       # slot 3 was read with weight 0
    assert metrics['top_1_usage'] == 2 / 6
    z = np.array([2.75, .75, .5]) / 4
    np.testing.assert_allclose(metrics['kl'], np.log(6) + np.sum(z * np.log(z)))
    pairwise = np.abs(np.subtract.outer([2.75, .75, .5, 0, 0, 0], [2.75, .75, .5, 0, 0, 0])).sum()
    np.testing.assert_allclose(metrics['gini'], pairwise / (2 * 6 * 4))
    assert (metrics['slots_50'], metrics['slots_90'], metrics['slots_99']) == (1/6, 3/6, 3/6)


def test_extremes():
    def of(mass):
        mass = jnp.asarray(mass, jnp.float32)
        return usage_metrics(SlotCounts(mass.astype(jnp.int32), mass.astype(jnp.int32), mass))
    uniform, one = of([1, 1, 1, 1]), of([0, 5, 0, 0])
    assert (uniform['top_k_usage'], uniform['slots_50'], uniform['gini']) == (1, .5, 0)
    np.testing.assert_allclose([uniform['kl'], one['kl']], [0, np.log(4)], atol=1e-12)
    assert (one['top_1_usage'], one['slots_99'], one['gini']) == (.25, .25, .75)


def test_counts_of_numpy_and_of_the_device_give_the_same_metrics():
    counts = count_slots(no_counts(6), READS, REAL)
    assert usage_metrics(host_counts(counts)) == usage_metrics(counts)
    assert usage_metrics(SlotCounts(*map(np.asarray, counts))) == usage_metrics(counts)


@pytest.mark.slow
def test_counts_of_more_reads_than_float32_can_count():
    """40 batches of 2^19 tokens: one head reads slot 0 with weight 1, the other any of 64."""
    batch, batches = 2 ** 19, 40
    slots = np.zeros((batch, 2, 1), np.int32)
    slots[:, 1, 0] = np.arange(batch) % 64
    read = reads(slots, np.ones(slots.shape))
    counts = jax.jit(lambda counts: jax.lax.fori_loop(
        0, batches, lambda _, c: count_slots(c, read, jnp.ones(batch, bool)), counts))(
            no_counts(64))
    expected = np.full(64, batch // 64 * batches, np.int64)
    expected[0] += batch * batches
    assert expected[0] > 2 ** 24
    for got in host_counts(counts):
        np.testing.assert_array_equal(got, expected)
    z = expected / expected.sum()
    np.testing.assert_allclose(usage_metrics(counts)['kl'], np.log(64) + np.sum(z * np.log(z)),
                               rtol=1e-12)


@pytest.mark.parametrize('name, weight', [('selected', 1.), ('best', 1.), ('mass', 1.),
                                          ('mass', .3125)])
@pytest.mark.parametrize('before', [2 ** 24, 2 ** 31 - 1, 2 ** 32 - 1, 2 ** 33 + 5])
def test_one_more_is_counted_wherever_the_count_stands(name, weight, before):
    units = before << 30 if name == 'mass' else before
    start = no_counts(2)
    words = np.asarray([[units & 0xffffffff, 0], [units >> 32, 0]], np.uint32)
    counts = count_slots(start._replace(**{name: jnp.asarray(words)}),
                         reads([[[0]]], [[[weight]]]), jnp.asarray([True]))
    got = getattr(host_counts(counts), name)
    assert got.dtype == (np.float64 if name == 'mass' else np.int64)
    np.testing.assert_array_equal(got, [before + weight, 0])


def test_mass_is_that_of_a_float64_count():
    """Softmax weights of many scales over few slots, in batches of several sizes."""
    rng = np.random.default_rng(0)
    counts, mass = no_counts(16), np.zeros(16)
    for tokens in (3, 700, 5000, 40000):
        slots = np.argsort(rng.random((tokens, 2, 16)))[..., :3].astype(np.int32)
        weights = np.asarray(jax.nn.softmax(jnp.asarray(rng.normal(0, 8, slots.shape))))
        real = rng.random(tokens) < .8
        counts = jax.jit(count_slots)(counts, reads(slots, weights * real[:, None, None]),
                                      jnp.asarray(real))
        np.add.at(mass, slots[real], weights[real].astype(np.float64))
    np.testing.assert_allclose(host_counts(counts).mass, mass, rtol=1e-9)


def test_the_smallest_weight_counts_as_use():
    tiny = count_slots(no_counts(3), reads([[[0, 1]]], [[[1., 1e-30]]]), jnp.asarray([True]))
    assert usage_metrics(tiny)['top_k_usage'] == 2 / 3


@pytest.mark.parametrize('shards', [Shards(2, 2, 2), Shards(1, 8, 1)])
def test_counts_split_by_rows_are_those_of_one_device(shards):
    """Of tokens split over eight devices, some of them padding, after two batches."""
    rng = np.random.default_rng(0)
    slots = np.argsort(rng.random((48, 3, 16)))[..., :4].astype(np.int32)
    weights = np.asarray(jax.nn.softmax(jnp.asarray(rng.normal(0, 8, slots.shape))))
    read, real = reads(slots, weights), jnp.asarray(rng.random(48) < .8)
    whole = count_slots(count_slots(no_counts(16), read, real), read, real)
    mesh = make_mesh(shards)
    counts = jax.device_put(no_counts(16), NamedSharding(mesh, counts_spec(OWN)))
    with jax.set_mesh(mesh):
        count = jax.jit(count_slots)
        counts = count(count(counts, read, real), read, real)
    jax.tree.map(np.testing.assert_array_equal, counts, whole)
    assert all(field.addressable_shards[0].data.shape == (2, 16 // shards.rows) for field in counts)


def test_a_mask_split_over_somebody_elses_explicit_axes():
    """As of sequences that are split over devices too."""
    mesh = jax.make_mesh((2, 4), ('dp', 'tp'), axis_types=(AxisType.Explicit,) * 2)
    real = np.arange(32).reshape(4, 8) % 3 > 0
    ours = reads(np.arange(32)[:, None, None] % 9, np.ones((32, 1, 1)))
    want = count_slots(no_counts(9), ours, jnp.asarray(real))
    with jax.set_mesh(mesh):
        split = jax.device_put(real, NamedSharding(mesh, P(None, 'tp')))
        got = jax.jit(lambda real: count_slots(no_counts(9), ours, real))(split)
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_nothing_counted_is_an_error():
    with pytest.raises(Refusal, match='No real token'):
        usage_metrics(no_counts(4))


def test_last_selected_ignores_padding():
    last = mark_selected(jnp.full(6, NEVER, jnp.int32), READS, REAL, jnp.int32(7))
    np.testing.assert_array_equal(last, [7, 7, 7, 7, NEVER, NEVER])


def test_uniform_ceiling_is_what_uniform_picks_reach():
    rng = np.random.default_rng(0)
    picked = [len(set(rng.integers(0, 500, 300 * 2))) / 500 for _ in range(200)]
    assert abs(uniform_ceiling(500, 300, 2) - np.mean(picked)) < 0.003
    assert uniform_ceiling(1, 10, 1) == 1

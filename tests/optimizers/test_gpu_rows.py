"""The update of rows on GPUs: the kernel interpreted, against plain jnp and float64; and on one."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from pkm_jax import dispatch
from pkm_jax.ops import gpu
from pkm_jax.optimizers import gpu_rows, rules

# jax 0.12 says so where it lowers a kernel for the Triton backend.
pytestmark = pytest.mark.filterwarnings('ignore:The Pallas Triton backend:DeprecationWarning')
H200 = AbstractMesh((), (), abstract_device=AbstractDevice('NVIDIA H200', 132, 'gpu'))
BETA1, BETA2, EPSILON = .9, .999, 1e-8
RULES = {'sgd': rules.sgd_rule(), 'lazy_adam': rules.lazy_adam_rule(BETA1, BETA2, EPSILON),
         'rowwise_adam': rules.rowwise_adam_rule(BETA1, BETA2, EPSILON),
         'rowwise_adagrad': rules.rowwise_adagrad_rule(EPSILON)}
SLOTS, PLACES = 37, 13      # of neither are tiles of rows full
SOME = [1, 2, 3, 8, 12, 30, 35]
NUMBERS, SEED = rules.Numbers(.1, .7, .5), np.array([5, 2 ** 31 + 9], np.uint32)


def make(name, dtype, width, used, places=PLACES, slots=SLOTS, start=(0, 0)):
    """Arguments of `rules.reference`, but for the rule; the first `used` of `places` are in use,
    or, where all slots have one, those of slots that are `used`."""
    rng, rule = np.random.default_rng(1), RULES[name]
    ids = np.full(places, slots, np.int32)
    if places == slots:
        ids[used] = used
    else:
        ids[:len(used)] = used
    gradient = np.where((ids < slots)[:, None], rng.normal(size=(places, width)), 0)
    state = [rng.uniform(.1, 1, slots if one else (slots, width)) for one in rule.per_row]
    floats = gradient, np.mean((NUMBERS.scale * gradient) ** 2, axis=1)
    return [ids, np.array(start, np.int32), np.array(NUMBERS, np.float32), SEED,
            *(jnp.asarray(array, jnp.float32) for array in floats),
            jnp.asarray(rng.normal(size=(slots, width)), dtype),
            *(jnp.asarray(moment, jnp.float32) for moment in state)]


@functools.cache
def compiled(implementation, name):
    return jax.jit(functools.partial(rules.update_rows, implementation, rule=RULES[name]))


def run(implementation, name, arguments):
    return compiled(implementation, name)(*arguments)


def words(array):
    """The bits of a result."""
    return np.asarray(array).view({2: np.uint16, 4: np.uint32}[array.dtype.itemsize])


def check_rest_is_kept(ids, old, new):
    """Every bit of rows that are not in use."""
    for before, after in zip(old, new, strict=True):
        rest = np.setdiff1d(np.arange(len(before)), ids)
        np.testing.assert_array_equal(words(after)[rest], words(before)[rest])


def check_same(name, arguments):
    """Table and moments to the bit, as compiled without optimisations here (see conftest), with
    which XLA may round products and sums once; the norm but for the order of its sum."""
    (norm, *got), (other, *want) = (run(which, name, arguments) for which in ('gpu', 'xla'))
    np.testing.assert_allclose(norm, other, rtol=1e-5)
    assert norm.shape == (1, 1)
    for one, wanted in zip(got, want, strict=True):
        assert one.dtype == wanted.dtype and np.isfinite(np.asarray(one, np.float32)).all()
        np.testing.assert_array_equal(words(one), words(wanted))
    check_rest_is_kept(arguments[0], arguments[6:], got)
    return got


FAST = {('lazy_adam', 'bfloat16', 768), ('rowwise_adam', 'bfloat16', 1000),
        ('rowwise_adagrad', 'float32', 40), ('sgd', 'float32', 1)}


@pytest.mark.parametrize('places', [SLOTS, PLACES], ids=['in place', 'compact'])
@pytest.mark.parametrize('name, dtype, width', [
    pytest.param(*case, marks=[] if case in FAST else pytest.mark.slow) for case in
    itertools.product(RULES, ('float32', 'bfloat16'), (1, 40, 768, 1000))])
def test_rows_change_as_in_plain_jnp(name, dtype, width, places):
    """None, the last one, some, and as many as there are places."""
    every = range(SLOTS) if places == SLOTS else range(20, 20 + PLACES)
    for used in ([], [SLOTS - 1], SOME, every):
        check_same(name, make(name, dtype, width, np.array(used, int), places))


def test_ids_may_have_gaps():
    """As those of parts of a table that devices exchange."""
    arguments = make('rowwise_adam', 'bfloat16', 300, np.array(SOME))
    arguments[0][[0, 4]] = SLOTS
    check_same('rowwise_adam', arguments)


@pytest.mark.parametrize('name', ['lazy_adam', 'rowwise_adam'])
@pytest.mark.parametrize('implementation', ['gpu', 'xla', 'tpu'])
def test_narrow_gradients_change_rows_as_the_same_numbers_in_float32(name, implementation):
    arguments = make(name, 'bfloat16', 128, np.array([1, 2, 3, 8]), slots=38)
    arguments[0] = np.sort(arguments[0])
    narrow = arguments[4].astype(jnp.bfloat16)
    ours, theirs = (run(implementation, name, [*arguments[:4], gradient, *arguments[5:]])
                    for gradient in (narrow, narrow.astype(jnp.float32)))
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(words(one), words(other))


@pytest.mark.parametrize('name', ['lazy_adam', 'rowwise_adagrad'])
def test_agrees_with_float64(name):
    arguments = make(name, 'float32', 300, np.array(SOME))
    ids, gradient, table, *moments = (np.asarray(arguments[at], np.float64)
                                      for at in (0, 4, *range(6, len(arguments))))
    ids = ids[:len(SOME)].astype(int)
    gradient = NUMBERS.scale * gradient[:len(ids)]
    if name == 'lazy_adam':
        first, second = moments
        first[ids] = BETA1 * first[ids] + (1 - BETA1) * gradient
        second[ids] = BETA2 * second[ids] + (1 - BETA2) * gradient ** 2
        change = -NUMBERS.rate * NUMBERS.correction * first[ids] / (np.sqrt(second[ids]) + EPSILON)
    else:
        total, = moments
        total[ids] += np.mean(gradient ** 2, axis=1)
        change = -NUMBERS.rate * gradient / (np.sqrt(total[ids]) + EPSILON)[:, None]
    table[ids] += change
    norm, *got = run('gpu', name, arguments)
    np.testing.assert_allclose(norm, np.linalg.norm(change), rtol=1e-6)
    for one, want in zip(got, (table, *moments), strict=True):
        np.testing.assert_allclose(one, want, rtol=1e-6, atol=1e-7)


def test_parts_are_rounded_as_the_whole():
    """Of a table in four parts, each with the slot and the column that it starts with."""
    name, rows, width = 'lazy_adam', 20, 600
    whole = make(name, 'bfloat16', width, np.arange(0, 2 * rows, 3), 2 * rows, 2 * rows)
    _, *want = run('xla', name, whole)
    for first in (0, rows):
        for column in (0, 300):
            part = np.s_[first:first + rows, column:column + 300]
            ids, *_, squares = whole[:6]
            inside = np.minimum(ids[part[0]] - first, rows)
            _, *got = run('gpu', name, [
                inside, np.array([first, column], np.int32), *whole[2:4], whole[4][part],
                squares[part[0]], *(array[part] for array in whole[6:])])
            for one, other in zip(got, want, strict=True):
                np.testing.assert_array_equal(words(one), words(other[part]))


@pytest.mark.parametrize('name', ['lazy_adam', 'rowwise_adam'])
def test_what_is_not_finite_stays_in_its_row(name):
    """One of the table, one of the gradients, and numbers of places that are not in use."""
    arguments = make(name, 'bfloat16', 40, np.array(SOME))
    _, *clean = run('gpu', name, arguments)
    gradient = arguments[4].at[1].set(jnp.nan).at[-1].set(jnp.inf)
    _, *got = run('gpu', name, [*arguments[:4], gradient, arguments[5],
                                arguments[6].at[8].set(jnp.inf), *arguments[7:]])
    rest = np.setdiff1d(np.arange(SLOTS), (2, 8))
    for one, other in zip(got, clean, strict=True):
        np.testing.assert_array_equal(words(one)[rest], words(other)[rest])
    table = np.asarray(got[0], np.float32)
    assert np.isnan(table[2]).all() and np.isinf(table[8]).all()


@pytest.mark.parametrize('places, width, itemsize, tile, tiles', [
    (SLOTS, 1, 4, (128, 1), 1), (SLOTS, 40, 4, (2, 64), 1), (SLOTS, 768, 4, (1, 128), 3),
    (SLOTS - 1, 1, 4, (512, 1), 1), (PLACES, 40, 2, (16, 64), 1), (PLACES, 768, 4, (4, 128), 3),
    (PLACES, 200, 4, (4, 128), 2), (SLOTS, 768, 2, (1, 256), 3), (PLACES, 8000, 2, (4, 256), 3)])
def test_a_tile_has_sixteen_bytes_for_every_thread(places, width, itemsize, tile, tiles):
    *found, warps = gpu_rows.tiles_of(places, width, SLOTS, itemsize)
    assert found == [tile, tiles]
    assert tile[0] * tile[1] * itemsize == 32 * warps * 16


def how_it_is_lowered(name, dtype, places=PLACES):
    """The update for a GPU, from here."""
    with dispatch.recorded() as found, use_abstract_mesh(H200):
        jax.jit(functools.partial(rules.update_rows, None, rule=RULES[name])).trace(
            *make(name, dtype, 40, np.array([1]), places)).lower(lowering_platforms=('cuda',))
    how, = found['update of rows']
    return how


@pytest.mark.parametrize('name, places', [('rowwise_adam', SLOTS), ('lazy_adam', PLACES)])
def test_the_kernel_is_chosen_for_gpus(name, places):
    assert how_it_is_lowered(name, 'bfloat16', places) == 'a GPU kernel'


def test_what_it_lacks_is_said(monkeypatch, caplog):
    assert 'no kernel for a table of float16' in how_it_is_lowered('sgd', 'float16')
    some, none = (jax.eval_shape(lambda: make('sgd', 'float32', 40, SOME[:places], places))
                  for places in (1, 0))
    assert gpu_rows.unsupported(*some, rule=RULES['sgd']) is None
    assert gpu_rows.unsupported(*none, rule=RULES['sgd']) == 'no rows at all'
    monkeypatch.setattr(gpu, 'triton', None)
    assert 'which has no Triton backend' in how_it_is_lowered('sgd', 'float32')
    assert all('update of rows' in text for text in caplog.messages) and len(caplog.messages) == 2


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != 'gpu', reason='needs an NVIDIA GPU: '
                    'JAX_PLATFORMS=cuda pytest -m gpu')
@pytest.mark.parametrize('width', [1, 40, 768, 1000])
@pytest.mark.parametrize('places', [5000, 1111])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('name', RULES)
def test_a_gpu_changes_rows_as_plain_jnp_does(name, dtype, places, width):
    """But for roots, quotients and fused products: a few ulp, which can round a bfloat16 the other
    way; rows that are not in use to the bit, as is a second run."""
    used = np.sort(np.random.default_rng(0).permutation(5000)[:1001])
    arguments = make(name, dtype, width, used, places, 5000, start=(7, 3))
    (norm, *got), (other, *want), again = (
        run(which, name, arguments) for which in (None, 'xla', None))
    np.testing.assert_allclose(norm, other, rtol=1e-5)
    check_rest_is_kept(arguments[0], arguments[6:], got)
    for one, repeated in zip((norm, *got), again, strict=True):
        np.testing.assert_array_equal(words(one), words(repeated))
    for one, wanted in zip(got, want, strict=True):
        if one.dtype == jnp.bfloat16:
            assert np.mean(words(one) != words(wanted)) < 1e-3
        limit = 2 ** -7 if one.dtype == jnp.bfloat16 else 2e-6
        one, wanted = (np.asarray(array, np.float32) for array in (one, wanted))
        np.testing.assert_allclose(one, wanted, rtol=limit, atol=1e-6)

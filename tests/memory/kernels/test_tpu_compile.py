"""The kernels for TPUs as the TPU's compiler takes them, and what is counted of them."""

import itertools

import jax
import jax.numpy as jnp
import pytest

from benchmarks import tpu_compile
from benchmarks.jaxprs import equations
from pkm_jax.memory.layer import MemoryConfig
from tests.memory.layers import check_same
from tests.planning.tiny import needs_tpu_compiler

BF16, F32 = jnp.dtype('bfloat16'), jnp.dtype('float32')
KERNELS = [
    pytest.param(tpu_compile.reads(BF16, 768, 8), id='reads', marks=pytest.mark.slow),
    pytest.param(tpu_compile.searches(F32, 128, 8), id='searches'),
    pytest.param(tpu_compile.updates(BF16, 768, 'rowwise Adam'), id='updates')]


@needs_tpu_compiler
@pytest.mark.parametrize('kernels', KERNELS)
@pytest.mark.parametrize('chip', ['v5e', *(pytest.param(chip, marks=pytest.mark.slow)
                                           for chip in ('v4', 'v5p', 'v6e', 'tpu7x'))])
def test_the_compiler_takes_every_kernel(chip, kernels):
    for case in kernels:
        assert tpu_compile.compile_seconds(case, chip) > 0


@needs_tpu_compiler
@pytest.mark.slow
@pytest.mark.parametrize('chip', ['v4', 'v5e', 'v5p', 'v6e', 'tpu7x'])
def test_the_compiler_takes_every_update(chip):
    for dtype, width, optimizer in itertools.product(
            (BF16, F32), tpu_compile.UPDATED_WIDTHS, tpu_compile.UPDATES):
        for case in tpu_compile.updates(dtype, width, optimizer):
            assert tpu_compile.compile_seconds(case, chip) > 0


def test_operations_are_those_of_the_kernels():
    """Widen, multiply and add 6 of 8 sublanes for each read, and narrow each sum; scores in float32."""
    read, *_ = tpu_compile.reads(BF16, 768, 8)
    assert tpu_compile.counted(read) == (0, (3 * 32 + 1) * 16_384)
    search, gradients = tpu_compile.searches(F32, 128, 8)
    product = 6 * 2 * 16_384 * 4 * 2 * 128 * 256
    assert tpu_compile.counted(search)[0] == product
    flops, vectors = tpu_compile.counted(gradients)
    assert flops == 2 * product
    assert 3 * 8 <= vectors / (16_384 / 128 * 4 * 2 * 128 / 8) < 4 * 8 + 8


def test_products_have_a_precision_that_the_compiler_takes():
    """Of bfloat16 the default, though jax's here is the highest (tests/conftest.py)."""
    for dtype, precision in (BF16, jax.lax.Precision.DEFAULT), (F32, jax.lax.Precision.HIGHEST):
        for case in tpu_compile.searches(dtype, 128, 8):
            products = [eqn for eqn in equations(jax.make_jaxpr(case.run)(*case.arguments).jaxpr)
                        if eqn.primitive.name == 'dot_general']
            assert {eqn.params['precision'] for eqn in products} == {(precision, precision)}


def test_operations_and_bytes_of_updates_are_those_of_the_kernels():
    """Scale, rate, add, two selections, square and sum for each number; in HBM by the kernel too."""
    alone, = tpu_compile.updates(F32, 192, 'SGD')
    numbers = tpu_compile.SLOTS * 192 / 1024
    assert 7 <= tpu_compile.counted(alone)[1] / numbers < 7.2
    for case in (alone, *tpu_compile.updates(BF16, 768, 'rowwise Adam')):
        jaxpr = jax.make_jaxpr(case.run)(*case.arguments).jaxpr
        cost, = (eqn.params['cost_estimate'] for eqn in equations(jaxpr)
                 if eqn.primitive.name == 'pallas_call')
        assert cost.bytes_accessed == pytest.approx(case.bytes, rel=.01)
    assert case.copies == 2 * 2 * tpu_compile.SLOTS / 16


def test_floors_name_the_longest():
    read, *_ = tpu_compile.reads(BF16, 768, 8)
    assert tpu_compile.floor(read, 'v5e', *tpu_compile.counted(read)) == '1.02 b'
    assert tpu_compile.floor(read._replace(bytes=0.), 'v4', 0., 2.1e9 * 2) == '1000.00 v'
    assert tpu_compile.floor(read._replace(bytes=0., cores=1), 'v4', 0., 2.1e9) == '1000.00 v'


@pytest.mark.parametrize('sparse', [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_layer_by_kernels_is_the_layer_in_plain_jnp(sparse):
    """Interpreted, in float32: values, slots touched and gradients."""
    check_same('tpu', MemoryConfig(sub_keys=16, heads=2, top_k=4, query_width=32), (4, 6), sparse)

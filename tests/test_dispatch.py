"""The choice of a kernel by the platform that a program is lowered for."""

import functools
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

from pkm_jax import dispatch
from pkm_jax.dispatch import Choice, Kernel, check_implementation
from pkm_jax.memory.embedding_bag import embedding_bag
from pkm_jax.memory.layer import MemoryConfig, ProductKeyMemory
from pkm_jax.memory.product_keys import top_k_product_keys
from pkm_jax.mesh import OWN
from pkm_jax.refusal import Refusal

# jax 0.12 says so where it lowers a kernel for the Triton backend.
pytestmark = pytest.mark.filterwarnings('ignore:The Pallas Triton backend:DeprecationWarning')
H100 = AbstractMesh((), (), abstract_device=AbstractDevice('NVIDIA H100 80GB HBM3', 132, 'gpu'))
BAG = (jnp.ones((9, 128)), jnp.zeros((4, 4), jnp.int32), jnp.ones((4, 4)))


def kernels(function, *arguments, platforms=('cuda',)):
    """Names of the kernels in a program that is lowered for other devices, from here."""
    with use_abstract_mesh(H100):
        text = jax.jit(function).trace(*arguments).lower(lowering_platforms=platforms).as_text()
    assert len(re.findall('custom_call @.*triton', text)) == len(re.findall(' name = "', text))
    return set(re.findall(' (?:kernel_)?name = "([a-z_]+)"', text))


def double(x, *, factor=2):
    return {'result': x * factor}


def choice(reason=None, load=None):
    """Of an operation whose kernel gives other numbers than its reference."""
    kernel = Kernel(lambda x, *, factor=2, interpret: {'result': x * factor + (1 if interpret else 2)},
                    lambda x, *, factor=2: reason)
    return Choice('doubling', double, load or (lambda: kernel))


def test_plain_jax_to_compare_with():
    one, other = (functools.partial(choice(), None, factor=.5) for _ in range(2))
    with dispatch.recorded() as how, dispatch.without_kernels():
        assert constants(one, ('cuda',)) == .5
    assert how == {'doubling': ['plain XLA']} and constants(other, ('cuda',)) == 2


def constants(function, platforms):
    """The last number that the program for a platform adds, 0 if none."""
    text = jax.jit(function).trace(jnp.float32(1)).lower(lowering_platforms=platforms).as_text()
    return max(map(float, re.findall(r'dense<([\d.e+-]+)> : tensor<f32>', text)))


def test_the_platform_that_is_lowered_for_decides():
    run = functools.partial(choice(), None, factor=.5)
    assert [constants(run, (platform,)) for platform in ('cpu', 'tpu', 'cuda')] == [.5, .5, 2]
    assert constants(run, ('cpu', 'cuda')) == 2
    assert run(jnp.float32(3)) == {'result': 1.5}       # eagerly, on this CPU


def test_a_named_implementation_is_used_everywhere():
    for platform in ('cpu', 'tpu', 'cuda'):
        assert constants(functools.partial(choice(), 'xla', factor=.5), (platform,)) == .5
    assert constants(functools.partial(choice(), 'gpu', factor=.5), ('cuda',)) == 2
    assert choice()('gpu', jnp.float32(3)) == {'result': 7}     # interpreted
    for_tpus = Choice('doubling', double, choice().load, lambda: choice().load())
    assert [constants(functools.partial(for_tpus, 'tpu', factor=.5), (platform,))
            for platform in ('cpu', 'tpu', 'cuda')] == [1, 2, 1]
    assert [constants(functools.partial(for_tpus, None, factor=.5), (platform,))
            for platform in ('cpu', 'tpu')] == [.5, 2]
    assert [constants(functools.partial(for_tpus, 'xla', factor=.5), (platform,))
            for platform in ('cpu', 'tpu')] == [.5, .5]


def test_other_implementations_are_refused_by_name():
    with pytest.raises(Refusal, match="'tpu': the doubling has no such kernel"):
        choice()('tpu', jnp.float32(3))
    with pytest.raises(Refusal, match="implementation = 'cuda' is none of"):
        check_implementation('cuda')


def test_what_a_kernel_cannot_take_is_logged_once_or_refused(caplog):
    run = functools.partial(choice('a size of 3'), None, factor=.5)
    assert constants(run, ('cpu',)) == .5 and not caplog.records
    for _ in range(2):
        assert constants(lambda x: run(x), ('cuda',)) == .5
    text, = caplog.messages
    assert 'doubling' in text and 'a size of 3' in text
    with pytest.raises(Refusal, match='doubling does not support a size of 3'):
        choice('a size of 3')('gpu', jnp.float32(3))


def test_a_jax_without_the_backend_runs_the_reference(caplog):
    def load():
        raise ImportError('No module named triton')

    run = functools.partial(choice(load=load), None, factor=.5)
    assert constants(run, ('cpu',)) == .5 and not caplog.records
    assert constants(run, ('cuda',)) == .5
    text, = caplog.messages
    assert jax.__version__ in text and 'triton' in text


def test_under_vmap_the_choice_is_the_reference(caplog):
    x = jnp.arange(6.).reshape(2, 3)
    run = functools.partial(choice(), None)
    np.testing.assert_array_equal(jax.vmap(run)(x)['result'], x * 2)
    np.testing.assert_array_equal(jax.vmap(jax.vmap(run), 1, 1)(x)['result'], x * 2)
    assert not caplog.records
    jax.jit(jax.vmap(run)).trace(x).lower(lowering_platforms=('cuda',))
    assert 'jax.vmap' in caplog.messages[0]
    with pytest.raises(Refusal, match='doubling does not support jax.vmap'):
        jax.vmap(functools.partial(choice(), 'gpu'))(x)


@pytest.mark.parametrize('sparse', [False, True])
def test_a_layer_lowered_for_an_accelerator_from_a_cpu_has_its_kernels(sparse, caplog):
    memory = ProductKeyMemory(MemoryConfig(sub_keys=64, heads=2, top_k=8, query_width=64), 128,
                              rngs=nnx.Rngs(0))
    graph, params, rest = nnx.split(memory, nnx.Param, ...)

    def loss(params, x, delta):
        y, reads = nnx.merge(graph, params, rest).read(x, delta=delta)
        return jnp.sum(y ** 2), reads.batch_stats

    differentiate = jax.grad(loss, (0, 2) if sparse else 0, has_aux=True)
    arguments = params, jnp.ones((4, 8, 128)), memory.no_delta(32) if sparse else None
    assert kernels(differentiate, *arguments) == {
        'best_sub_keys', 'best_pairs', 'spread_score_gradients', 'read_rows', 'read_backward_cuts',
        'read_backward', 'read_backward_add', 'read_backward_clear'}
    assert not kernels(differentiate, *arguments, platforms=('cpu',))
    assert kernels(differentiate, *arguments, platforms=('tpu',)) == {
        'best_slots', 'retrieval_backward', 'read_rows', 'read_backward'}
    assert not caplog.records


def test_shapes_without_a_kernel_are_said_where_they_are_lowered_for_a_gpu(caplog):
    narrow = jnp.ones((9, 96)), *BAG[1:]
    assert kernels(embedding_bag, *BAG) == {'read_rows'}
    assert not kernels(embedding_bag, *narrow)
    assert ['width of 96' in text for text in caplog.messages] == [True]
    with pytest.raises(Refusal, match='width of 96'):
        embedding_bag(*narrow, implementation='gpu')
    with pytest.raises(Refusal, match='top_k = 33'):
        top_k_product_keys(jnp.ones((16, 1, 2, 16)), jnp.ones((1, 2, 64, 16)), 33,
                           implementation='gpu')


def test_kernels_are_imported_only_where_a_program_for_a_gpu_is_lowered():
    script = '''
import sys, jax, jax.numpy as jnp
from pkm_jax import embedding_bag
arguments = jnp.ones((9, 128)), jnp.zeros((4, 4), jnp.int32), jnp.ones((4, 4))
traced = jax.jit(jax.grad(lambda v, s, w: embedding_bag(v, s, w).sum())).trace(*arguments)
traced.lower().compile()
kernels = 'jax.experimental.pallas', 'pkm_jax.memory.kernels.gpu', 'pkm_jax.memory.kernels.tpu'
assert not [name for name in sys.modules if name.startswith(kernels)]
traced.lower(lowering_platforms=('tpu',))
assert not [name for name in sys.modules if name.startswith('pkm_jax.memory.kernels.gpu')]
sys.modules['jax.experimental.pallas.triton'] = None
sys.modules['jax'].__version_info__ = 0, 10, 2      # whose Mosaic GPU is not used
traced.lower(lowering_platforms=('cuda',))
'''
    done = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count('The kernel of the embedding bag does not support Mosaic GPU by jax') == 1


@pytest.mark.parametrize('platform', ['cuda', 'tpu'])
@pytest.mark.parametrize('sparse', [False, True])
def test_a_layer_in_a_mesh_of_one_device_has_its_kernels(sparse, platform):
    """Those of the search and of the read, and no other way to make either."""
    memory = ProductKeyMemory(MemoryConfig(sub_keys=128, heads=2, top_k=8, query_width=256), 128,
                              rngs=nnx.Rngs(0))
    x = jnp.ones((8, 16, 128))

    def loss_of(x):
        delta = memory.no_delta(128) if sparse else None
        return jnp.sum(memory.read(x, delta=delta)[0])

    one = AbstractMesh((1, 1, 1), OWN.names, axis_types=(AxisType.Auto,) * 3,
                       abstract_device=H100.abstract_device)
    with use_abstract_mesh(one), dispatch.recorded() as how:
        jax.jit(jax.grad(loss_of)).trace(x).lower(lowering_platforms=(platform,))
    kernel = {'cuda': 'a GPU kernel', 'tpu': 'a TPU kernel'}[platform]
    assert how == {'retrieval': [kernel], 'embedding bag': [kernel]}


def test_what_was_chosen_is_recorded():
    """For the platform of the lowering, with the reason where it is no kernel."""
    values, slots = jnp.ones((8, 128)), jnp.zeros((4, 2), jnp.int32)

    def chosen(values, platform):
        with use_abstract_mesh(H100), dispatch.recorded() as found:
            jax.jit(embedding_bag).trace(values, slots, jnp.ones((4, 2))).lower(
                lowering_platforms=(platform,))
        return found

    assert chosen(values, 'cpu') == {'embedding bag': ['plain XLA']}
    assert chosen(values, 'cuda') == {'embedding bag': ['a GPU kernel']}
    assert chosen(values, 'tpu') == {'embedding bag': ['a TPU kernel']}
    assert 'no kernel for values of float16' in chosen(
        values.astype(jnp.float16), 'tpu')['embedding bag'][0]
    assert 'no kernel for a value width of 96' in chosen(
        values[:, :96], 'cuda')['embedding bag'][0]


def test_all_ways_in_which_an_operation_is_made_are_recorded():
    values, slots, weights = jnp.ones((8, 128)), jnp.zeros((4, 2), jnp.int32), jnp.ones((4, 2))

    def reads(values):
        plain = embedding_bag(values, slots, weights, implementation='xla')
        return plain + 2 * embedding_bag(values, slots, weights), embedding_bag(
            values[:, :96], slots, weights)

    with use_abstract_mesh(H100), dispatch.recorded() as found:
        jax.jit(reads).trace(values).lower(lowering_platforms=('cuda',))
    assert found['embedding bag'] == ['plain XLA', 'a GPU kernel', 'plain XLA, slower: no kernel '
                                      'for a value width of 96 (a multiple of 128)']


def test_records_within_one_another_end_by_themselves():
    """Both are equal when the inner one ends; the outer one goes on."""
    values, slots, weights = jnp.ones((8, 128)), jnp.zeros((4, 2), jnp.int32), jnp.ones((4, 2))

    def lower(platform):
        jax.jit(embedding_bag).trace(values, slots, weights).lower(
            lowering_platforms=(platform,))

    with use_abstract_mesh(H100), dispatch.recorded() as outer:
        with dispatch.recorded() as inner:
            lower('cpu')
        lower('cuda')
    assert inner == {'embedding bag': ['plain XLA']}
    assert outer == {'embedding bag': ['plain XLA', 'a GPU kernel']}

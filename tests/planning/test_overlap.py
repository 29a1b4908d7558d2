"""Collectives that the TPU's compiler has run beside products: docs/scaling.md, "Overlap"."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from pkm_jax.memory.layer import MemoryConfig
from pkm_jax.mesh import Shards, make_mesh
from pkm_jax.models.bert import BertConfig, Block
from pkm_jax.planning import chips, hlo
from tests.planning.tiny import needs_tpu_compiler

pytestmark = [needs_tpu_compiler, pytest.mark.slow]
SCALING = Path(__file__).parents[2] / 'docs' / 'scaling.md'
TOKENS = P(('data', 'rows', 'columns'))


def carried(program):
    """Of each collective that is started in one place and done in another: kind and type of its
    result, and how many fusions with a matrix product go on with it in between."""
    module, found, going = hlo.Module(program.as_text()), [], {}
    for text, _ in module.instructions():
        name, called = re.match(r'(?:ROOT )?%([\w.\-]+)', text)[1], re.search(r'calls=%([\w.\-]+)', text)
        inside = '\n'.join(module.computations[called[1]]) if called else ''
        collective = re.search(r' = (\w+\[[\d,]*\])\S* (all-\w+|reduce-scatter)\(', inside)
        if name.startswith('async-collective-start'):
            going[name] = [*collective.groups()[::-1], 0]
        elif name.startswith('async-collective-done'):
            found.append(tuple(going.pop(name.replace('done', 'start'))))
        elif collective and ' convolution(' in inside:
            for one in going.values():
                one[2] += one[:2] == list(collective.groups()[::-1])
    assert not going
    return found


def test_the_exchange_of_slots_goes_on_beside_the_feed_forward_layer():
    """The memory stands beside that layer, which needs nothing that is exchanged."""
    mesh = make_mesh(Shards(1, 2, 2), chips.devices(chips.parse('v5e:2x2')))
    config = BertConfig(
        vocab_size=100, layers=1, dtype='bfloat16', dropout=0., attention_dropout=0., placement='add',
        memory_layers=(0,), memory=MemoryConfig(
            sub_keys=128, top_k=8, query_norm='layer', values_dtype='bfloat16',
            weights_dtype='bfloat16'))

    def on_mesh(one, spec):
        return jax.ShapeDtypeStruct(one.shape, one.dtype, sharding=NamedSharding(mesh, spec))

    with jax.set_mesh(mesh), jax.default_matmul_precision('default'):
        graph, params, rest = nnx.split(
            nnx.eval_shape(lambda: Block(config, 0, None, nnx.Rngs(0))), nnx.Param, ...)
        params = jax.tree_util.tree_map_with_path(
            lambda path, one: on_mesh(one, P('rows', 'columns') if "'values'" in
                                      jax.tree_util.keystr(path) else P()), params)
        states, lengths = (on_mesh(jax.ShapeDtypeStruct(*one), TOKENS) for one in (
            ((16, 512, 768), jnp.bfloat16), ((16,), jnp.int32)))
        program = jax.jit(lambda params, states, lengths: nnx.merge(graph, params, rest)(
            states, lengths, None)[0]).lower(params, states, lengths).compile()
    assert ('all-gather', 's32[8192,32]', 1) in carried(program)


def test_options_have_gradients_summed_beside_products():
    """Those that docs/scaling.md names, of which one alone changes nothing."""
    options = dict(re.findall(r'--(xla_\w+)=(\w+)', SCALING.read_text()))
    assert len(options) == 3
    mesh = make_mesh(Shards(4, 1, 1), chips.devices(chips.parse('v5e:2x2')))
    whole, split = NamedSharding(mesh, P()), NamedSharding(mesh, TOKENS)
    kernels = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=whole)
               for shape in 2 * ((768, 3072), (3072, 768))]
    states = jax.ShapeDtypeStruct((16, 512, 768), jnp.bfloat16, sharding=split)

    def loss(kernels, states):
        for up, down in zip(kernels[::2], kernels[1::2]):
            states += jax.nn.gelu(states @ up.astype(states.dtype)) @ down.astype(states.dtype)
        return jnp.square(states.astype(jnp.float32)).sum()

    with jax.set_mesh(mesh), jax.default_matmul_precision('default'):
        lowered = jax.jit(jax.grad(loss)).lower(kernels, states)
    assert carried(lowered.compile()) == []
    found = carried(lowered.compile(compiler_options=options))
    assert len(found) >= 2
    assert all(kind == 'all-reduce' and products for kind, _, products in found)

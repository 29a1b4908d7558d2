"""Memory by arithmetic, beside what the TPU's compiler said of the same steps."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest

from configs import bert_base_pkm, bert_base_pkm_pod, bert_large
from pkm_jax.accelerators import CHIPS
from pkm_jax.configuration.resolve import runs_of
from pkm_jax.mesh import Shards
from pkm_jax.planning import device_memory
from pkm_jax.training.layout import lay_out
from pkm_jax.training.layout_time import NOT_KNOWN, Rates


# Gigabytes of temporaries as compiled, from docs/scaling.md; the last with kernels, for a v6e.
@pytest.mark.parametrize('module, shards, backbone, tables, compiled, available', [
    (bert_base_pkm_pod, Shards(4, 16, 4), 0.48, 0.40, 8.03, 16.9),
    (bert_base_pkm, Shards(256), 0.46, 1.61, 5.31, 16.9),
    (bert_large, Shards(256), 1.34, 0, 3.96, 16.9),
    (bert_base_pkm, Shards(16), 0.46, 1.61, 26.31, 16.9),
    (bert_large, Shards(16), 1.34, 0, 54.30, 16.9),
    (bert_base_pkm_pod, Shards(8, 8, 4), 0.48, 0.81, 9.10, 34.1)])
def test_the_estimate_is_within_a_third_of_what_was_compiled(module, shards, backbone, tables,
                                                             compiled, available):
    config = module.get_config()
    config.memory.shards.update(rows=shards.rows, columns=shards.columns)
    run, = runs_of(config)
    run = run.with_vocabulary(run.task.vocab_size)
    layout = lay_out(run, math.prod(shards), device_bytes=int(available * 1e9))
    given = {'backbone parameters': int(backbone * 1e9), 'value tables': int(tables * 1e9)}
    estimate = device_memory.estimated(given, run, layout, NOT_KNOWN)[device_memory.TEMPORARY]
    assert estimate / 1e9 == pytest.approx(compiled, rel=1 / 3)


# Gigabytes of temporaries of a step of two layers on H200s with sparse updates, from
# docs/results.md: a memory of 2048² slots, 8 sequences a device and micro-batch.
@pytest.mark.parametrize('dtype, steps, shards, changes, compiled', [
    ('bfloat16', 1, Shards(), {}, 1.63), ('float32', 1, Shards(), {}, 2.45),
    ('bfloat16', 1, Shards(), {'sub_keys': 512}, 1.14),     # every row has its place
    ('bfloat16', 4, Shards(), {}, 11.51), ('float32', 4, Shards(), {}, 15.54),
    ('bfloat16', 4, Shards(), {'sub_keys': 512}, 3.07),
    ('bfloat16', 1, Shards(), {'layers': (0, 1)}, 2.21),
    ('bfloat16', 1, Shards(), {'layers': (0, 1), 'shared_values': True}, 5.06),
    ('bfloat16', 1, Shards(2), {}, 2.60), ('float32', 1, Shards(2), {}, 4.20),
    ('bfloat16', 1, Shards(1, 2), {}, 2.54), ('bfloat16', 1, Shards(1, 1, 2), {}, 1.74)])
def test_so_is_that_of_sparse_updates_on_gpus(dtype, steps, shards, changes, compiled):
    config = bert_base_pkm.get_config()
    config.model.update(layers=2, attention_dropout=0.)
    config.memory.update({'layers': (1,), 'sub_keys': 2048, 'updates': 'sparse',
                          'values_dtype': dtype, **changes})
    config.memory.shards.update(rows=shards.rows, columns=shards.columns)
    config.train.update(batch=8 * steps * math.prod(shards), gradient_accumulation_steps=steps)
    run, = runs_of(config)
    run, rates = run.with_vocabulary(run.task.vocab_size), Rates(CHIPS['h200'], 8)
    layout = lay_out(run, math.prod(shards), rates=rates)
    given = {'backbone parameters': int(.18e9), 'value tables': 0}
    estimate = device_memory.estimated(given, run, layout, rates)[device_memory.TEMPORARY]
    assert estimate / 1e9 == pytest.approx(compiled, rel=1 / 3)


def test_what_saves_memory_is_counted():
    config = bert_base_pkm.get_config()

    def activations(**changes):
        config.model.update(changes)
        run, = runs_of(config)
        return run.model.activation_bytes(run.train.micro_batch // 16, run.task.length,
                                          run.task.predictions())

    everything = activations()
    without_dropout = activations(attention_dropout=0.)
    assert activations(remat=True) < without_dropout / 3 < everything / 3


def test_norms_need_room_for_updates_where_there_are_few_activations():
    run, = runs_of(bert_base_pkm.get_config())
    layout = lay_out(run, 8)
    given = {'backbone parameters': 10 ** 9, 'value tables': 0}
    assert device_memory.estimated(given, run, layout, NOT_KNOWN)[device_memory.NORMS] == 0
    given['backbone parameters'] = 10 ** 12
    assert device_memory.estimated(given, run, layout, NOT_KNOWN)[device_memory.NORMS] > 9e11
    never = dataclasses.replace(run, log=dataclasses.replace(run.log, norms_every=0))
    assert device_memory.estimated(given, never, layout, NOT_KNOWN)[device_memory.NORMS] == 0


def test_the_larger_of_two_compiled_steps_counts():
    def compiled(function):
        return jax.jit(function).lower(jax.ShapeDtypeStruct((1000,), jnp.float32)).compile()

    given = {'batch': 4000}
    small, large = compiled(lambda x: x + 1), compiled(lambda x: jnp.sort(jnp.outer(x, x))[0])
    sums = [sum(device_memory.of_compiled(given, one, one).values()) for one in (small, large)]
    assert sums[0] < sums[1]
    found = device_memory.of_compiled(given, small, large)
    assert found[device_memory.NORMS] > 0 and sum(found.values()) == sums[1]
    assert sum(device_memory.of_compiled(given, large, small).values()) == sums[1]

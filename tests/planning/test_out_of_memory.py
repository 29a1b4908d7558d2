"""What a person reads where a device has no room: of what there is too much, and two settings."""

import jax
import pytest

from pkm_jax.configuration.resolve import runs_of
from pkm_jax.planning import out_of_memory
from pkm_jax.refusal import OutOfMemory
from pkm_jax.training import loop
from pkm_jax.training.compiling import Programs
from pkm_jax.training.layout import lay_out_here


def train(config):
    run, = runs_of(config)
    layout = lay_out_here(run)
    with out_of_memory.explained(run, layout):
        loop.train(run, layout)


def fail(monkeypatch, where, place, words):
    def full(*_, **__):
        raise jax.errors.JaxRuntimeError(words)

    monkeypatch.setattr(where, place, full)


@pytest.mark.slow
@pytest.mark.parametrize('where, place', [
    (loop, '_loop'), (Programs, 'first_state'), (Programs, 'wait')])
def test_it_is_said_what_there_is_too_much_of(config, monkeypatch, where, place):
    config.memory.update(sub_keys=256, updates='dense')
    config.memory.shards.update(rows=1, columns=1)
    fail(monkeypatch, where, place, 'RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes.\nmore')
    monkeypatch.setattr(out_of_memory, 'bytes_of_device', lambda: 16 * 10 ** 6)
    with pytest.raises(OutOfMemory) as refused:
        train(config)
    said = str(refused.value)
    assert 'Out of memory while trying to allocate 9 bytes.)' in said
    sizes = said.split('needs ')[1]
    # 2¹⁶ rows of 16 values of 4 bytes, and two moments each.
    assert sizes.index('optimizer state of value tables 8.39 MB') < sizes.index('value tables 4.19 MB')
    assert 'a device has 16 MB. Set ' in said
    assert "memory.updates='sparse' (" in said and ' or ' in said.split('Set ')[1]


@pytest.mark.slow
def test_activations_are_helped_by_smaller_parts(config, monkeypatch):
    config.train.batch = 4096
    fail(monkeypatch, loop, '_loop', 'RESOURCE_EXHAUSTED: Out of memory')
    monkeypatch.setattr(out_of_memory, 'bytes_of_device', lambda: 2 * 10 ** 6)
    with pytest.raises(OutOfMemory, match=r'\(temporaries: activations, gradients [^)]*\).* Set .*'
                                      r'train.gradient_accumulation_steps=\d+ \(1\.\d+ MB\)'):
        train(config)


@pytest.mark.slow
def test_other_errors_of_the_runtime_keep_their_traceback(config, monkeypatch):
    fail(monkeypatch, loop, '_loop', 'INTERNAL: something else')
    with pytest.raises(jax.errors.JaxRuntimeError, match='something else'):
        train(config)

"""Memory by arithmetic, beside what the TPU's compiler said of the same steps."""

import pytest

from configs import bert_base_pkm, bert_base_pkm_pod, bert_large
from pkm_jax.planning import memory
from pkm_jax.training import settings
from pkm_jax.training.plan import make_plan


# Gigabytes of temporaries as compiled, from docs/scaling.md.
@pytest.mark.parametrize('module, devices, backbone, tables, compiled', [
    (bert_base_pkm_pod, 256, 0.48, 0.40, 8.03), (bert_base_pkm, 256, 0.46, 1.61, 5.31),
    (bert_large, 256, 1.34, 0, 3.96), (bert_base_pkm, 16, 0.46, 1.61, 26.31),
    (bert_large, 16, 1.34, 0, 54.30)])
def test_the_estimate_is_within_a_third_of_what_was_compiled(module, devices, backbone, tables,
                                                             compiled):
    config = module.get_config()
    model = settings.model_config(config, config.data.vocab_size)
    plan = make_plan(config, model, devices, int(16.9e9))
    given = {'backbone parameters': int(backbone * 1e9), 'value tables': int(tables * 1e9)}
    estimate = memory.activations(config, model, plan)
    estimate += memory.gradients(given, config, model, plan)
    assert estimate / 1e9 == pytest.approx(compiled, rel=1 / 3)


def test_what_saves_memory_is_counted():
    config = bert_base_pkm.get_config()

    def activations(**changes):
        config.model.update(changes)
        model = settings.model_config(config, config.data.vocab_size)
        return memory.activations(config, model, make_plan(config, model, 16))

    everything = activations()
    without_dropout = activations(attention_dropout=0.)
    assert activations(remat=True) < without_dropout / 3 < everything / 3

"""The loss of masked language modelling by hand."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pkm_jax.models.bert import BertConfig
from pkm_jax.models.causal import CausalConfig
from pkm_jax.refusal import Refusal
from pkm_jax.tasks.masked_lm import MaskedLM

TASK = MaskedLM(length=8, max_predictions=3)
CONFIG = BertConfig(vocab_size=30, layers=1, width=8, attention_heads=2, feed_forward_width=16,
                    max_length=8)


def test_loss_and_accuracy_are_those_of_the_asked_words():
    rng = np.random.default_rng(0)
    data = {'tokens': rng.integers(5, 30, (2, 8)), 'segments': np.zeros((2, 8)),
            'lengths': np.array([8, 6]), 'mlm_positions': np.array([[1, 4, 0], [2, 0, 0]]),
            'mlm_labels': rng.integers(5, 30, (2, 3)), 'mlm_weights': np.array([[1, 1, 0], [1, 0, 0]])}
    data = {name: jnp.asarray(array, jnp.float32 if name == 'mlm_weights' else jnp.int32)
            for name, array in data.items()}
    model = CONFIG.build(nnx.Rngs(0))
    outcome = TASK.outcome(model, data, deterministic=True)
    states, _ = model(data['tokens'], data['segments'], data['lengths'])
    logits = np.asarray(model.mlm_logits(states, data['mlm_positions']), np.float64)
    asked = [(0, 0), (0, 1), (1, 0)]
    labels = np.asarray(data['mlm_labels'])
    loss = sum(np.log(np.exp(logits[at]).sum()) - logits[at][labels[at]] for at in asked)
    np.testing.assert_allclose(outcome.loss, loss, rtol=1e-5)
    assert float(outcome.sums['correct']) == sum(logits[at].argmax() == labels[at] for at in asked)
    assert TASK.terms(data) == 3 and TASK.real(data).sum() == 14


def test_arrays_are_those_of_an_example():
    assert {name: (array.shape, array.dtype) for name, array in TASK.arrays.items()} == {
        'tokens': ((8,), np.int32), 'lengths': ((), np.int32), 'segments': ((8,), np.int32),
        'mlm_positions': ((3,), np.int32), 'mlm_labels': ((3,), np.int32),
        'mlm_weights': ((3,), np.float32)}


@pytest.mark.parametrize('model', [CausalConfig(), BertConfig(output_heads=('pooler',))])
def test_models_without_the_head_are_refused(model):
    with pytest.raises(Refusal, match="needs a BERT with an 'mlm' head"):
        TASK.check(model)

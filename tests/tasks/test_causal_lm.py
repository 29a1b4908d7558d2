"""The loss of a causal language model by hand."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pkm_jax.data.labelled import Labelled
from pkm_jax.memory.layer import MemoryConfig
from pkm_jax.models.bert import BertConfig
from pkm_jax.models.causal import CausalConfig
from pkm_jax.refusal import Refusal
from pkm_jax.tasks.causal_lm import CausalLM

TASK = CausalLM(length=8)
CONFIG = CausalConfig(
    vocab_size=30, layers=1, width=8, attention_heads=2, feed_forward_width=16, max_length=8,
    memory=MemoryConfig(sub_keys=4, heads=1, top_k=2, query_width=4), memory_layers=(0,),
    placement='add')


def batch():
    tokens = np.random.default_rng(0).integers(5, 30, (3, 8))
    return {'tokens': jnp.asarray(tokens, jnp.int32), 'lengths': jnp.array([8, 5, 0], jnp.int32)}


def test_loss_and_accuracy_are_those_of_the_tokens_that_follow():
    data, model = batch(), CONFIG.build(nnx.Rngs(0))
    outcome = TASK.outcome(model, data, deterministic=True)
    logits = np.asarray(model.logits(model(data['tokens'], data['lengths'])[0]), np.float64)
    loss, correct = 0., 0
    for row, length in enumerate([8, 5, 0]):
        for t in range(1, length):
            scores, word = logits[row, t - 1], int(data['tokens'][row, t])
            loss += np.log(np.exp(scores).sum()) - scores[word]
            correct += scores.argmax() == word
    np.testing.assert_allclose(outcome.loss, loss, rtol=1e-5)
    assert float(outcome.sums['correct']) == correct and TASK.terms(data) == 11
    assert TASK.real(data).sum() == 13 and set(outcome.reads) == {0}


def test_a_row_without_tokens_counts_nowhere():
    data, model = batch(), CONFIG.build(nnx.Rngs(0))
    filled = {name: jnp.concatenate([array, array[2:]]) for name, array in data.items()}
    ours, theirs = (TASK.outcome(model, one, deterministic=True) for one in (filled, data))
    np.testing.assert_allclose(ours.loss, theirs.loss, rtol=1e-6)
    assert TASK.terms(filled) == TASK.terms(data)


def test_perplexity_is_of_the_mean():
    values = TASK.evaluation({'loss': np.float32(20.), 'terms': np.float32(8.),
                              'correct': np.float32(2.)}, {}, Labelled('', 0, {}), 'validation')
    assert values == pytest.approx({'loss': 2.5, 'accuracy': .25, 'perplexity': np.exp(2.5)})


def test_other_models_are_refused():
    with pytest.raises(Refusal, match="'causal_lm' needs model.family = 'causal'"):
        TASK.check(BertConfig())
    with pytest.raises(Refusal, match='data.length = 600 exceeds model.max_length = 8'):
        CausalLM(length=600).check(CONFIG)

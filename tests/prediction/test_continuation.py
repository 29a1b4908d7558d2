"""Prompts are continued as without a cache, whatever they are computed with."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pkm_jax.prediction.continuation import Continue, Sampling, draw
from pkm_jax.prediction.texts import Text
from pkm_jax.prediction.trained import open_trained
from pkm_jax.refusal import Refusal

PROMPTS = ['a b c', 'd', 'e f g h i j k l', 'a b c']


@pytest.fixture(scope='module')
def trained(folder_of):
    return open_trained(folder_of('causal'))


def continued(trained, sampling, prompts=PROMPTS, rows=4, most=6):
    texts = [Text((prompt,), '') for prompt in prompts]
    return [result['continuation'] for result in Continue(trained, sampling, most)(texts, rows)]


def test_greedy_text_is_that_of_the_model_called_anew_for_every_token(trained):
    found = continued(trained, Sampling(temperature=0.))
    model, vocabulary = nnx.merge(trained.graph, *trained.state), trained.vocabulary
    call = jax.jit(lambda tokens, length: model.logits(model(tokens, length)[0]))
    for prompt, ours in zip(PROMPTS, found):
        ids = [vocabulary.cls_id, *(vocabulary.ids[word] for word in prompt.split())]
        before = len(ids)
        while len(ids) < before + 6 and ids[-1] != vocabulary.sep_id:
            tokens = np.zeros((1, 48), np.int32)
            tokens[0, :len(ids)] = ids
            logits = np.array(call(tokens, jnp.array([len(ids)]))[0, len(ids) - 1])
            logits[[vocabulary.ids[name] for name in ('[PAD]', '[UNK]', '[CLS]', '[MASK]')]] = -1e9
            ids.append(int(logits.argmax()))
        decode = vocabulary.tokenizer().decode
        assert decode(ids[:before]) + ours == decode(ids)
    assert any(found)


def test_draws_depend_on_the_seed_and_the_prompt_and_on_nothing_beside_it(trained):
    sampling = Sampling(temperature=2., seed=3)
    found = continued(trained, sampling)
    assert found == continued(trained, sampling, rows=1)
    assert found[0] != found[3]
    assert found != continued(trained, dataclasses.replace(sampling, seed=4))


def test_a_prompt_that_leaves_no_room_loses_its_beginning(trained):
    way = Continue(trained, Sampling(temperature=0.), most=8)
    end = 'c ' * 20 + 'd ' * 19
    long, whole = way([Text(('a ' * 60 + end,), ''), Text((end,), '')], 1)
    assert long['continuation'] == whole['continuation']
    assert way.tally.truncated == 1 and way.tally.tokens == 80


def test_top_p_draws_among_the_likeliest_of_that_probability_alone():
    logits = jnp.log(jnp.array([.1, .45, .05, .3, .1]))
    keys = jax.random.split(jax.random.key(0), 4000)

    def shares(**settings):
        drawn = jax.vmap(lambda key: draw(Sampling(**settings), logits, key))(keys)
        return np.bincount(drawn, minlength=5) / len(keys)

    np.testing.assert_allclose(shares(top_p=.7), [0, .6, 0, .4, 0], atol=.03)
    np.testing.assert_allclose(shares(top_p=.4), [0, 1, 0, 0, 0])
    np.testing.assert_allclose(shares(), [.1, .45, .05, .3, .1], atol=.03)
    squared = np.array([.1, .45, .05, .3, .1]) ** 2
    np.testing.assert_allclose(shares(temperature=.5), squared / squared.sum(), atol=.03)
    assert shares(temperature=0.)[1] == 1


@pytest.mark.parametrize('settings, words', [
    (dict(temperature=-1.), '--temperature=-1'), (dict(top_p=0.), '--top_p=0'),
    (dict(top_p=1.5), '--top_p=1.5'), (dict(seed=-1), '--seed=-1')])
def test_settings_out_of_their_range_are_refused(settings, words):
    with pytest.raises(Refusal, match=words):
        Sampling(**settings)


def test_a_bert_continues_nothing(folder_of):
    with pytest.raises(Refusal, match='is no causal model'):
        Continue(open_trained(folder_of('plain')), Sampling(), 4)

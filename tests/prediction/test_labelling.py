"""Fine-tuned models say in use what their tasks say of the same texts."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pkm_jax.prediction.labelling import predictor
from pkm_jax.prediction.texts import Text
from pkm_jax.prediction.trained import open_trained


def use(folder, texts, rows=2):
    """What is said of texts, the model, and a function that calls it on rows of words."""
    trained = open_trained(folder)
    way = predictor(trained, trained.task)
    found = list(way([Text(parts, '') for parts in texts], rows))
    model, ids = nnx.merge(trained.graph, *trained.state), trained.vocabulary.ids
    call = nnx.jit(lambda model, *row: model(*row)[0])

    def states(words, segments=None):
        tokens = jnp.array([[ids[word] for word in words]])
        segments = jnp.zeros_like(tokens) if segments is None else jnp.array([segments])
        return call(model, tokens, segments, jnp.array([len(words)]))
    return found, way, model, states


def test_classes_have_the_names_and_probabilities_of_the_run(folder_of):
    texts = [('a b c',), ('d',), ('e ' * 30,)]
    found, way, model, states = use(folder_of('classes'), texts)
    assert way.tally.truncated == 1 and way.fields.names == ('review',)
    for (text,), result in zip(texts, found):
        logits = np.asarray(model.class_logits(states(['[CLS]', *text.split()[:14], '[SEP]'])))[0]
        shares = np.exp(logits) / np.exp(logits).sum()
        names = ['bad', 'fair', 'good']
        assert result['prediction'] == names[shares.argmax()]
        assert list(result['probabilities']) == names
        np.testing.assert_allclose(list(result['probabilities'].values()), shares, rtol=2e-5)
        assert result['prediction'] in way.readable(result)


def test_a_number_of_a_pair(folder_of):
    (result,), way, model, states = use(folder_of('number'), [('a b', 'c d e')])
    assert way.fields == (('text', 'other'), 2)
    words = ['[CLS]', 'a', 'b', '[SEP]', 'c', 'd', 'e', '[SEP]']
    expected = model.class_logits(states(words, [0] * 4 + [1] * 4))[0, 0]
    np.testing.assert_allclose(result['prediction'], expected, rtol=2e-5)


def test_an_answer_is_the_best_span_of_all_windows(folder_of):
    """19 words of context in windows of 19: the second one has a few words that the first lacks."""
    context = ' '.join('abcdefghijklmnopqrstuvwxya')
    found, way, model, states = use(folder_of('answers'), [('q', context), ('c', 'd e f')])
    best = {}
    words = context.split()
    room, step = 24 - 3 - 1, 24 - 3 - 1 - 4
    for start in range(0, len(words) - (room - step), step):
        part = words[start:start + room]
        row = ['[CLS]', 'q', '[SEP]', *part, '[SEP]']
        logits = np.asarray(model.span_logits(
            states(row, [0] * 3 + [1] * (len(part) + 1))))[0, 3:-1]
        for first in range(len(part)):
            for last in range(first, min(first + 3, len(part))):
                score = logits[first, 0] + logits[last, 1]
                span = ' '.join(words[start + first:start + last + 1])
                best[span] = max(score, best.get(span, -1e9))
    assert found[0]['answer'] == max(best, key=best.get)
    assert found[0]['candidates'][0]['score'] == pytest.approx(max(best.values()), rel=1e-5)
    assert found[1]['question'] == 'c' and found[1]['answer'] in 'd e f'
    assert found[1]['answer'] in way.readable(found[1])


def test_every_word_has_the_label_of_its_first_token(folder_of):
    texts = [('a bx. c',), ('d ' * 25,), ('e',)]
    found, way, model, states = use(folder_of('labels'), texts)
    names = ['O', 'B-PER', 'I-PER']
    assert found[0]['words'] == ['a', 'bx', '.', 'c']
    logits = np.asarray(model.token_logits(states(
        ['[CLS]', 'a', 'b', '##x', '.', 'c', '[SEP]'])))[0]
    assert found[0]['labels'] == [names[number] for number in logits.argmax(1)[[1, 2, 4, 5]]]
    assert len(found[1]['labels']) == 25 and len(found[2]['labels']) == 1
    named = sum(len(entity['words']) for entity in found[1]['entities'])
    assert named == sum(label != 'O' for label in found[1]['labels'])
    assert way.readable(found[0]).startswith('a bx. c')

"""Parameter groups, schedule and clipping, by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from pkm_jax.training.optimizer import group_of, make_optimizer, schedule


@pytest.mark.parametrize('path, group', [
    ('layers/3/memory/values', 'values'),
    ('layers/3/memory/codebooks', 'decayed'),
    ('layers/3/memory/query/kernel', 'decayed'),
    ('layers/3/memory/query/bias', 'undecayed'),
    ('layers/3/memory/query_norm/scale', 'undecayed'),
    ('layers/3/memory_scale', 'undecayed'),
    ('layers/3/attention/value/kernel', 'decayed'),
    ('layers/3/output_norm/bias', 'undecayed'),
    ('embeddings/word/embedding', 'decayed'),
    ('mlm/bias', 'undecayed'),
])
def test_groups(path, group):
    assert group_of(path) == group


def test_schedule():
    rate = schedule(2., warmup=4, steps=12)
    np.testing.assert_allclose([rate(s) for s in (0, 2, 4, 8, 12)], [0, 1, 2, 1, 0])
    np.testing.assert_allclose(schedule(2., warmup=0, steps=10)(5), 1.)


def test_first_update_by_hand(config):
    """Adam's first step moves by the learning rate, whatever the gradient's size."""
    config.train.update(warmup=0, steps=10, learning_rate=0.1, values_learning_rate=0.5,
                        weight_decay=0.01, clip=0., epsilon=1e-12)
    params = {'layers': {0: {'memory': {'values': jnp.full(2, 3.)}}},
              'pooler': {'kernel': jnp.full(2, 3.), 'bias': jnp.full(2, 3.)}}
    gradient = {'layers': {0: {'memory': {'values': jnp.asarray([2., -1.])}}},
                'pooler': {'kernel': jnp.asarray([2., -1.]), 'bias': jnp.asarray([2., -1.])}}
    optimizer = make_optimizer(config.train)
    updates, _ = optimizer.update(gradient, optimizer.init(params), params)
    np.testing.assert_allclose(updates['layers'][0]['memory']['values'], [-.5, .5], rtol=1e-5)
    np.testing.assert_allclose(updates['pooler']['bias'], [-.1, .1], rtol=1e-5)
    np.testing.assert_allclose(updates['pooler']['kernel'], [-.1 - .003, .1 - .003], rtol=1e-5)


def test_clipping_is_by_the_norm_of_all_groups(config):
    config.train.update(warmup=0, clip=1., epsilon=1e9)     # updates proportional to gradients
    optimizer = make_optimizer(config.train)

    def updates(values, bias):
        params = {'memory': {'values': jnp.zeros(1)}, 'bias': jnp.zeros(1)}
        gradient = {'memory': {'values': jnp.asarray([values])}, 'bias': jnp.asarray([bias])}
        return optimizer.update(gradient, optimizer.init(params), params)[0]

    unit, large = updates(.6, .8), updates(6., 8.)
    np.testing.assert_allclose(large['bias'], unit['bias'], rtol=1e-6)
    np.testing.assert_allclose(large['memory']['values'], unit['memory']['values'], rtol=1e-6)

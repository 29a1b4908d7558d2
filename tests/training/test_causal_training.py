"""A decoder with memory through the real loop: it learns, is killed, and goes on to the same bits."""

import collections
import json
import math

import numpy as np
import pytest

from configs import causal_pkm
from pkm_jax.checkpoints import store
from pkm_jax.configuration.resolve import runs_of
from tests.training.runs import killed_after, train


@pytest.fixture
def causal(corpus, cache, compile_once, tmp_path):
    config = causal_pkm.get_config()
    config.workdir = str(tmp_path / 'run')
    config.model.update(layers=2, width=32, attention_heads=2, feed_forward_width=64,
                        max_length=16, dtype='float32')
    config.memory.update(layers=(1,), sub_keys=8, heads=2, top_k=3, query_width=16, dead_after=5)
    config.data.update(corpus=str(corpus), cache=str(cache), vocab_size=120, length=16,
                       validation_fraction=0.1, workers=0)
    config.train.update(steps=80, batch=32, warmup=5, learning_rate=5e-3, values_learning_rate=1e-2)
    config.log.update(every=20, eval_every=40, eval_batches=2, checkpoint_every=40)
    return config


def entropy_of_frequencies(config):
    """Nats a token of the held-out text for the best guess that sees no other token."""
    run, = runs_of(config)
    records = run.task.prepare('', print).records('validation')
    counts = collections.Counter(int(token) for record in records for token in record['tokens'][1:])
    shares = np.array(list(counts.values())) / counts.total()
    return -np.sum(shares * np.log(shares))


def weights(folder):
    return {name: np.asarray(array)
            for name, array in store.read_weights(store.newest(folder)).items()}


@pytest.mark.slow
def test_the_loss_falls_below_that_of_word_frequencies(causal, tmp_path):
    straight = train(causal)
    last = [line for line in map(json.loads, (straight / 'metrics.jsonl').read_text().splitlines())
            if line['kind'] == 'eval'][-1]
    assert last['loss'] < entropy_of_frequencies(causal) - 1
    assert last['perplexity'] == pytest.approx(math.exp(last['loss']))
    assert last['memory']['1']['top_k_usage'] > .5

    causal.workdir = str(tmp_path / 'killed')
    with killed_after(50):
        train(causal)
    ours, theirs = weights(train(causal)), weights(straight)
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)

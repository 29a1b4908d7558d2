"""What every test runs under, and the tiny run that several of them train."""

import functools
import gc
import os

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('JAX_NUM_CPU_DEVICES', '8')
# Programs here are compiled more often than run: a third less time in all.
os.environ['XLA_FLAGS'] = '--xla_backend_optimization_level=0 ' + os.environ.get('XLA_FLAGS', '')

import jax
import numpy as np
import optax
import pytest
from absl import logging
from flax import nnx
from hypothesis import HealthCheck, settings

from configs import bert_base_pkm
from pkm_jax.console import warn_once
from pkm_jax.convert import huggingface
from pkm_jax.data import vocabulary
from pkm_jax.models.bert import BertConfig
from pkm_jax.models.interface import abstract_model

VERBOSITY = logging.get_verbosity()     # before any program

jax.config.update('jax_numpy_rank_promotion', 'raise')
jax.config.update('jax_numpy_dtype_promotion', 'strict')
jax.config.update('jax_default_matmul_precision', 'highest')


def _lenient(function):
    """Somebody else's function, which leaves the dtype of some results to jax."""
    @functools.wraps(function)
    def call(*arguments, **options):
        with jax.numpy_dtype_promotion('standard'):
            return function(*arguments, **options)

    return call


nnx.LayerNorm.__call__ = _lenient(nnx.LayerNorm.__call__)
jax.nn.dot_product_attention = _lenient(jax.nn.dot_product_attention)
optax.tree.bias_correction = _lenient(optax.tree.bias_correction)

gc.set_threshold(100_000, 20, 50)   # traces and compiled programs are many, and none is a cycle to free

# Files that nobody wrote: the same few in every run; --hypothesis-profile=thorough tries many more.
FIXTURES = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
settings.register_profile('default', max_examples=40, deadline=None, derandomize=True, database=None,
                          suppress_health_check=FIXTURES)
settings.register_profile('thorough', max_examples=5_000, deadline=None,
                          suppress_health_check=FIXTURES)
settings.load_profile('default')

WORDS = ('memory key value query slot layer table head token model weight score usage norm '
         'batch step rate loss train text word mask row sum').split()


@pytest.fixture(scope='session')
def compile_once(tmp_path_factory):
    """Most tests that train train the same model: programs are compiled once for all test processes."""
    jax.config.update('jax_compilation_cache_dir',
                      str(tmp_path_factory.getbasetemp().parent / 'compiled'))
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)


@pytest.fixture(scope='session')
def corpus(tmp_path_factory):
    """A text file whose sentences follow a simple rule, so that a model can learn something."""
    rng = np.random.default_rng(0)
    lines = []
    for _ in range(600):
        first = rng.integers(len(WORDS))
        lines.append(' '.join(WORDS[(first + i * 3) % len(WORDS)] for i in range(9)))
    path = tmp_path_factory.mktemp('corpus') / 'text.txt'
    path.write_text('\n'.join(f'{line} {number}' for number, line in enumerate(lines)))
    return path


@pytest.fixture(scope='session')
def tiny_bert(tmp_path_factory):
    """A Hugging Face folder with random weights of one small layer, and words of one piece."""
    config = BertConfig(vocab_size=5 + len(WORDS), layers=1, width=16, attention_heads=2,
                        feed_forward_width=32, max_length=32, output_heads=('pooler',))
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        near_one = path[-1].key == 'scale'
        return (near_one + .1 * rng.normal(size=leaf.shape)).astype(np.float32)

    model = abstract_model(config)
    params = jax.tree_util.tree_map_with_path(draw, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    folder = tmp_path_factory.mktemp('weights') / 'tiny_bert'
    huggingface.save(folder, config, params, {}, vocabulary=vocabulary.word_pieces(
        ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', *WORDS]))
    return folder


@pytest.fixture(autouse=True)
def heard():
    """What a program asked of absl's log, or has warned of, does not silence the next test."""
    logging.set_verbosity(VERBOSITY)
    warn_once.cache_clear()


@pytest.fixture(scope='session')
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp('prepared')


@pytest.fixture
def config(corpus, cache, compile_once, tmp_path):
    """Six steps of a two-layer model with a memory beside its second feed-forward layer."""
    config = bert_base_pkm.get_config()
    config.workdir = str(tmp_path / 'run')
    config.model.update(layers=2, width=16, attention_heads=2, feed_forward_width=32, max_length=16,
                        dtype='float32')
    config.memory.update(layers=(1,), sub_keys=6, heads=2, top_k=3, query_width=8, dead_after=2)
    config.data.update(corpus=str(corpus), cache=str(cache), vocab_size=120, length=16,
                       max_predictions=3, validation_fraction=0.1, workers=0)
    config.train.update(steps=6, batch=16, warmup=2)
    config.log.update(every=2, eval_every=3, eval_batches=2, checkpoint_every=3)
    return config

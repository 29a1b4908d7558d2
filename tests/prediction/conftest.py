"""Tiny models in folders, with words for their tokens."""

import json

import numpy as np
import pytest
from flax import nnx

from pkm_jax.checkpoints import arrays
from pkm_jax.configuration.resolve import described_model
from pkm_jax.data.vocabulary import word_pieces
from pkm_jax.memory.layer import MemoryConfig
from pkm_jax.models.bert import BertConfig
from pkm_jax.models.causal import CausalConfig
from pkm_jax.models.interface import flatten, unflatten

LETTERS = 'abcdefghijklmnopqrstuvwxy'
WORDS = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', *LETTERS, '##x', '##y', '.', '7', 'A']
SIZES = dict(layers=2, width=16, attention_heads=2, feed_forward_width=24, max_length=48)
MEMORY = dict(memory_layers=(1,), placement='add', memory=MemoryConfig(
    sub_keys=4, heads=2, top_k=3, query_width=8))
CONFIGS = {
    'bert': BertConfig(**SIZES, **MEMORY),
    'plain': BertConfig(**SIZES),
    'encoder': BertConfig(**SIZES, output_heads=('pooler',)),
    'causal': CausalConfig(**SIZES, **MEMORY, positions='learned'),
    'classes': BertConfig(**SIZES, output_heads=('pooler', 'classifier'), classes=3),
    'number': BertConfig(**SIZES, output_heads=('pooler', 'classifier'), classes=1),
    'answers': BertConfig(**SIZES, output_heads=('span',)),
    'labels': BertConfig(**SIZES, output_heads=('token_classifier',), classes=3),
}
TASKS = {
    'classes': {'task': 'classification', 'data': {
        'labels': ['bad', 'fair', 'good'], 'length': 16, 'train': 'train.tsv', 'text': 'review'}},
    'number': {'task': 'classification', 'data': {
        'problem': 'regression', 'length': 16, 'train': 'train.tsv', 'text_pair': 'other'}},
    'answers': {'task': 'question_answering', 'data': {
        'length': 24, 'stride': 4, 'n_best': 5, 'longest_answer': 3, 'buckets': [16, 24]}},
    'labels': {'task': 'token_classification', 'data': {
        'labels': ['O', 'B-PER', 'I-PER'], 'length': 12}},
}


@pytest.fixture(scope='session')
def folder_of(tmp_path_factory):
    """The folder of a run with a random model of a kind, of `CONFIGS`."""
    made = {}

    def make(kind):
        if kind not in made:
            made[kind] = write(tmp_path_factory.mktemp(kind), CONFIGS[kind], TASKS.get(kind, {}))
        return str(made[kind])
    return make


def write(folder, config, task):
    config = config.with_vocabulary(len(WORDS))
    model = config.build(nnx.Rngs(0))
    rng = np.random.default_rng(0)

    def drawn(kind, noise):
        return unflatten({path: np.asarray(leaf) + noise(leaf.shape).astype(np.float32)
                          for path, leaf in flatten(nnx.to_pure_dict(
                              nnx.state(model, kind))).items()})

    # Layers change much of what comes in: a tied head would repeat its words else.
    params = drawn(nnx.Param, lambda shape: rng.normal(scale=.5 if len(shape) > 1 else .1,
                                                       size=shape))
    statistics = drawn(nnx.BatchStat, lambda shape: .1 * rng.random(shape))
    (folder / 'config.json').write_text(json.dumps({**described_model(config), **task}))
    word_pieces(WORDS, lowercase=False).save(folder)
    arrays.write(folder / 'checkpoints', {'params': params, 'statistics': statistics})
    return folder

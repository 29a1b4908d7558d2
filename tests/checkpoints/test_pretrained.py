"""A Hugging Face folder, or a run converted from it, is a place to start training from."""

from pathlib import Path

import jax
import numpy as np
import pytest

from pkm_jax import convert_checkpoint
from pkm_jax.checkpoints import pretrained as loading
from pkm_jax.convert import huggingface
from pkm_jax.memory.layer import MemoryConfig
from pkm_jax.models.bert import BertConfig
from pkm_jax.models.interface import flatten, table_paths
from pkm_jax.optimizers.build import OptimizerConfig, make_optimizer
from pkm_jax.refusal import Refusal
from pkm_jax.training.state import initial_state

GOLDEN = Path(__file__).parents[1] / 'convert/goldens/pretraining'
WITH_MEMORY = BertConfig(
    vocab_size=40, layers=2, width=16, attention_heads=2, feed_forward_width=24, max_length=12,
    memory=MemoryConfig(sub_keys=4, heads=2, top_k=3, query_width=8), memory_layers=(1,),
    placement='add')


def fresh(config):
    optimizer = make_optimizer(OptimizerConfig(), 100, table_paths(config.memories),
                               config.is_backbone)
    return initial_state(0, config, optimizer, track_dead=False)


@pytest.mark.parametrize('kind', ['hugging_face', 'run'])
def test_weights_go_under_new_memories(kind, tmp_path, capsys):
    found = huggingface.load(GOLDEN)
    folder = GOLDEN
    if kind == 'run':
        folder = tmp_path / 'converted'
        convert_checkpoint.write_run(folder, found, GOLDEN)
    source = loading.open_pretrained(str(folder))
    state = fresh(WITH_MEMORY)
    loading.check_fits(source, jax.eval_shape(lambda: state), WITH_MEMORY, '')
    started = flatten(loading.load_pretrained(source, state).params)
    pretrained = flatten(found.params)
    for path, before in flatten(state.params).items():
        wanted = before if '/memory/' in path else pretrained[path]
        np.testing.assert_array_equal(started[path], wanted, err_msg=path)
    printed = capsys.readouterr().out
    new, left = printed.split('new:')[1].split('left:')
    assert 'layers/*/memory/values' in new and 'nsp/kernel' in left


def test_other_sizes_are_refused():
    wide = BertConfig(vocab_size=40, layers=2, width=32, attention_heads=2, feed_forward_width=24)
    with pytest.raises(Refusal, match=r'embeddings/word/embedding: \(40, 16\) there'):
        loading.check_fits(loading.open_pretrained(str(GOLDEN)),
                        jax.eval_shape(lambda: fresh(wide)), wide, '')


def test_other_words_are_refused(tmp_path):
    """As many words, of which two changed places."""
    found = huggingface.load(GOLDEN)
    words = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', *(f'w{i}' for i in range(35))]
    convert_checkpoint.write_run(tmp_path / 'run', found, GOLDEN)
    for name in ('tokenizer.json', 'tokenizer_config.json'):
        (tmp_path / 'run' / name).unlink(missing_ok=True)
    for path, order in ((tmp_path / 'run/vocab.txt', words),
                        (tmp_path / 'other.txt', words[:-2] + words[:-3:-1])):
        path.write_text('\n'.join(order) + '\n')
    source = loading.open_pretrained(str(tmp_path / 'run'))
    state = jax.eval_shape(lambda: fresh(WITH_MEMORY))
    loading.check_fits(source, state, WITH_MEMORY, str(tmp_path / 'run/vocab.txt'))
    with pytest.raises(Refusal, match='other words, or in another order'):
        loading.check_fits(source, state, WITH_MEMORY, str(tmp_path / 'other.txt'))


def test_a_source_without_vocabulary_is_refused():
    with pytest.raises(Refusal, match='Words must keep their indices'):
        loading.vocabulary_of(str(GOLDEN))

"""Original TensorFlow checkpoints give the same parameters as the same weights from PyTorch."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from pkm_jax.convert import huggingface, names, tensorflow
from pkm_jax.convert.tensors import StoredTensor, flatten
from pkm_jax.refusal import Refusal

GOLDENS = Path(__file__).parent / 'goldens'
NAMES = {   # as in the published uncased_L-12_H-768_A-12
    'embeddings/word/embedding': 'bert/embeddings/word_embeddings',
    'embeddings/segment/embedding': 'bert/embeddings/token_type_embeddings',
    'embeddings/norm/scale': 'bert/embeddings/LayerNorm/gamma',
    'layers/11/attention/query/kernel': 'bert/encoder/layer_11/attention/self/query/kernel',
    'layers/11/attention/output/bias': 'bert/encoder/layer_11/attention/output/dense/bias',
    'layers/11/attention_norm/bias': 'bert/encoder/layer_11/attention/output/LayerNorm/beta',
    'layers/0/feed_forward/up/kernel': 'bert/encoder/layer_0/intermediate/dense/kernel',
    'layers/0/feed_forward/down/bias': 'bert/encoder/layer_0/output/dense/bias',
    'layers/0/output_norm/scale': 'bert/encoder/layer_0/output/LayerNorm/gamma',
    'pooler/kernel': 'bert/pooler/dense/kernel',
    'mlm/transform/kernel': 'cls/predictions/transform/dense/kernel',
    'mlm/norm/bias': 'cls/predictions/transform/LayerNorm/beta',
    'mlm/bias': 'cls/predictions/output_bias',
    'nsp/kernel': 'cls/seq_relationship/output_weights',
    'span/bias': 'cls/squad/output_bias',
    'classifier/kernel': 'output_weights',
}


@pytest.fixture
def without_tensorflow(monkeypatch):
    """Hands the golden weights out under their TensorFlow names, as the reader would."""
    source = huggingface.load(GOLDENS / 'pretraining')
    stored = {}
    for path, array in flatten(source.params).items():
        array = array.T if path == 'nsp/kernel' else array
        stored[names.tensorflow(path)] = StoredTensor(array.shape, array.dtype, lambda a=array: a)
        stored[names.tensorflow(path) + '/adam_m'] = StoredTensor((), array.dtype, lambda: None)
    monkeypatch.setattr(tensorflow, 'open_tensors', lambda prefix: stored)
    return source, stored


def test_names_are_the_published_ones():
    assert {path: names.tensorflow(path) for path in NAMES} == NAMES


def assert_same(found, wanted):
    assert found.config == wanted.config
    assert flatten(found.params).keys() == flatten(wanted.params).keys()
    for path, array in flatten(wanted.params).items():
        np.testing.assert_array_equal(flatten(found.params)[path], array, err_msg=path)


def test_a_checkpoint_gives_the_same_parameters():
    pytest.importorskip('tensorflow', reason="pip install 'pkm_jax[tensorflow]' to run this test")
    found = tensorflow.load(GOLDENS / 'tensorflow')
    assert_same(found, huggingface.load(GOLDENS / 'pretraining'))
    assert set(found.log.left.values()) == {"the optimizer's"}
    assert 'global_step' in found.log.left and len(found.log.left) == 5


def test_a_truncated_checkpoint_is_refused(tmp_path):
    pytest.importorskip('tensorflow', reason="pip install 'pkm_jax[tensorflow]' to run this test")
    for cut in 'bert_model.ckpt.index', 'bert_model.ckpt.data-00000-of-00001':
        shutil.copytree(GOLDENS / 'tensorflow', tmp_path, dirs_exist_ok=True)
        (tmp_path / cut).write_bytes((tmp_path / cut).read_bytes()[:-20])
        with pytest.raises(Refusal, match='cannot be read as a TensorFlow checkpoint'):
            tensorflow.load(tmp_path)


def test_tensors_are_taken_by_name(without_tensorflow):
    source, stored = without_tensorflow
    found = tensorflow.load(GOLDENS / 'tensorflow')
    assert_same(found, source)
    assert len(found.log.left) == len(stored) / 2


def test_unknown_names_are_refused(without_tensorflow):
    _, stored = without_tensorflow
    stored['bert/adapter/kernel'] = stored['bert/pooler/dense/kernel']
    with pytest.raises(Refusal, match='bert/adapter/kernel.*convert_checkpoint --allow_unused'):
        tensorflow.load(GOLDENS / 'tensorflow')
    log = tensorflow.load(GOLDENS / 'tensorflow', allow_unused=True).log
    assert log.left['bert/adapter/kernel'] == 'not understood'


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, 'tensorflow', None)
    with pytest.raises(Refusal, match=re.escape("pip install 'pkm_jax[tensorflow]'")):
        tensorflow.load(GOLDENS / 'tensorflow')


def test_folders_without_a_checkpoint_or_with_two_are_refused(tmp_path):
    with pytest.raises(Refusal, match='bert_config.json'):
        tensorflow.load(tmp_path)
    shutil.copy(GOLDENS / 'tensorflow/bert_config.json', tmp_path)
    with pytest.raises(Refusal, match='no TensorFlow checkpoint'):
        tensorflow.load(tmp_path)
    (tmp_path / 'wiki.index').touch()       # of something else: no data beside it
    with pytest.raises(Refusal, match='no TensorFlow checkpoint'):
        tensorflow.load(tmp_path)
    for name in ('a.index', 'a.data-00000-of-00001', 'b.index', 'b.data-00000-of-00001'):
        (tmp_path / name).touch()
    with pytest.raises(Refusal, match='2 checkpoints'):
        tensorflow.load(tmp_path)

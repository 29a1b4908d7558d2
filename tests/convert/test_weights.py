"""Weight files: shards, truncated files, names that an index promises."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from pkm_jax.convert.tensors import StoredTensor
from pkm_jax.convert.weights import open_weights, write_weights
from pkm_jax.refusal import Refusal

GOLDENS = Path(__file__).parent / 'goldens'


@pytest.fixture
def sharded(tmp_path):
    return Path(shutil.copytree(GOLDENS / 'question_answering', tmp_path / 'source'))


def stored(array: np.ndarray) -> StoredTensor:
    return StoredTensor(array.shape, array.dtype, lambda: array)


@pytest.mark.parametrize('kept', [4, 100, 0.5, 0.999])
def test_a_truncated_file_is_refused(tmp_path, kept):
    whole = (GOLDENS / 'model/model.safetensors').read_bytes()
    (tmp_path / 'model.safetensors').write_bytes(
        whole[:kept if kept > 1 else int(kept * len(whole))])
    with pytest.raises(Refusal, match='model.safetensors is cut short or damaged'):
        open_weights(tmp_path)


def test_a_missing_shard_is_refused(sharded):
    lost = sorted(sharded.glob('model-*.safetensors'))[1]
    lost.unlink()
    with pytest.raises(Refusal, match=lost.name):
        open_weights(sharded)


def test_a_tensor_missing_from_its_shard_is_refused(sharded):
    index = sharded / 'model.safetensors.index.json'
    content = json.loads(index.read_text())
    content['weight_map']['bert.extra'] = sorted(content['weight_map'].values())[0]
    index.write_text(json.dumps(content))
    with pytest.raises(Refusal, match='bert.extra'):
        open_weights(sharded)


def test_a_truncated_index_is_refused(sharded):
    index = sharded / 'model.safetensors.index.json'
    index.write_text(index.read_text()[:100])
    with pytest.raises(Refusal, match='index.json is damaged'):
        open_weights(sharded)


def test_an_index_cannot_name_files_elsewhere(sharded):
    index = sharded / 'model.safetensors.index.json'
    shard = next(sharded.glob('model-*.safetensors'))
    shutil.copy(shard, sharded.parent / 'outside.safetensors')
    index.write_text(json.dumps({'weight_map': {'bert.x': '../outside.safetensors'}}))
    with pytest.raises(Refusal, match='outside.safetensors'):
        open_weights(sharded)


def test_a_sharded_pickle_is_read(tmp_path):
    shutil.copy(GOLDENS / 'masked_lm/pytorch_model.bin', tmp_path / 'pytorch_model-1.bin')
    names = open_weights(GOLDENS / 'masked_lm')
    (tmp_path / 'pytorch_model.bin.index.json').write_text(
        json.dumps({'weight_map': dict.fromkeys(names, 'pytorch_model-1.bin')}))
    assert open_weights(tmp_path).keys() == names.keys()


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(Refusal, match='no weights'):
        open_weights(tmp_path)


def test_shards_hold_at_most_what_is_asked_for(tmp_path):
    arrays = {f'x{i}': np.full((10, 10), i, np.float32) for i in range(7)}
    tensors = {name: stored(array) for name, array in arrays.items()}
    write_weights(tmp_path, tensors, shard_bytes=1000)
    files = sorted(tmp_path.glob('*.safetensors'))
    assert [file.name for file in files] == [f'model-0000{i}-of-00004.safetensors'
                                             for i in range(1, 5)]
    assert [len(load_file(file)) for file in files] == [2, 2, 2, 1]
    back = open_weights(tmp_path)
    for name, array in arrays.items():
        np.testing.assert_array_equal(back[name].read(), array)
    index = json.loads((tmp_path / 'model.safetensors.index.json').read_text())
    assert index['metadata']['total_size'] == 7 * 400


def test_transposed_arrays_are_written_in_order(tmp_path):
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    write_weights(tmp_path, {'x': stored(array.T)})
    np.testing.assert_array_equal(load_file(tmp_path / 'model.safetensors')['x'], array.T)


@pytest.mark.parametrize('name', ['x' * 300, '../source/model-00001-of-00005.safetensors', '\0', ''])
def test_a_shard_that_is_no_file_of_the_folder_is_refused(sharded, name):
    index = sharded / 'model.safetensors.index.json'
    listed = json.loads(index.read_text())
    listed['weight_map'][next(iter(listed['weight_map']))] = name
    index.write_text(json.dumps(listed))
    with pytest.raises(Refusal, match='which is not beside it'):
        open_weights(sharded)

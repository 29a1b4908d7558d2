"""Whatever bytes a file holds, a reader of checkpoints uses them or refuses them.

More of them: pytest --hypothesis-profile=thorough tests/convert/test_foreign_bytes.py
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from pkm_jax.convert import configuration, foreign, huggingface
from pkm_jax.convert.memories import add_memories
from pkm_jax.convert.tensors import flatten
from pkm_jax.convert.weights import open_state_dict, open_weights
from pkm_jax.refusal import Refusal
from tests.foreign_bytes import JSON, altered, damaged

GOLDENS = Path(__file__).parent / 'goldens'
CONFIG = json.loads((GOLDENS / 'memory_added/config.json').read_text())
INDEX = json.loads((GOLDENS / 'question_answering/model.safetensors.index.json').read_text())


@given(st.binary() | altered(CONFIG) | damaged(json.dumps(CONFIG).encode())
       | st.builds(lambda value: json.dumps(value).encode(), JSON))
def test_a_configuration_is_read_or_refused(tmp_path, content):
    (tmp_path / 'config.json').write_bytes(content)
    try:
        configuration.read(tmp_path / 'config.json')
    except Refusal as refusal:
        assert 'config.json' in str(refusal)


@pytest.mark.parametrize('file', ['model/model.safetensors', 'masked_lm/pytorch_model.bin',
                                  'pretraining/pytorch_model.bin'])
@given(data=st.data())
def test_weights_are_read_or_refused(tmp_path, file, data):
    content = data.draw(st.binary() | damaged((GOLDENS / file).read_bytes()))
    path = tmp_path / Path(file).name
    path.write_bytes(content)
    try:
        for tensor in open_state_dict(path).values():
            assert tensor.read().shape == tensor.shape
    except Refusal as refusal:
        assert path.name in str(refusal) or 'no tensor needs' in str(refusal)


@given(st.binary() | altered(INDEX) | st.builds(lambda value: json.dumps(value).encode(), JSON))
def test_an_index_of_shards_is_read_or_refused(tmp_path, content):
    source = tmp_path / 'source'
    if not source.exists():
        shutil.copytree(GOLDENS / 'question_answering', source)
    (source / 'model.safetensors.index.json').write_bytes(content)
    try:
        open_weights(source)
    except Refusal as refusal:
        assert 'index.json' in str(refusal)


@settings(max_examples=10)
@given(altered(CONFIG))
def test_a_folder_is_read_or_refused(tmp_path, content):
    source = tmp_path / 'source'
    if not source.exists():
        shutil.copytree(GOLDENS / 'memory_added', source)
    (source / 'config.json').write_bytes(content)
    try:
        found = foreign.load(source)
    except Refusal:
        return
    assert all(np.isfinite(array).all() for array in flatten(found.params).values())


BACKBONE = huggingface.load(GOLDENS / 'masked_lm')
NAMES = ['keys', 'values.weight', 'query_proj.weight', 'query_proj.query_mlps.0.weight',
         'query_proj.query_mlps.0.bias', 'query_proj.query_mlps.1.running_mean', 'other']
SHAPES = st.lists(st.sampled_from([1, 2, 3, 4, 9, 12, 16]), max_size=4)


@settings(max_examples=20)
@given(st.dictionaries(st.sampled_from([f'layers.{n}.{name}' for n in (0, 1, 7) for name in NAMES]),
                       SHAPES, max_size=9), st.sampled_from(['add', 'replace']), st.integers(-1, 4))
def test_memories_are_read_or_refused(tmp_path, shapes, placement, top_k):
    save_file({name: np.ones(shape, np.float32) for name, shape in shapes.items()},
              tmp_path / 'memory.safetensors')
    try:
        add_memories(BACKBONE, tmp_path / 'memory.safetensors', placement, top_k)
    except Refusal:
        pass

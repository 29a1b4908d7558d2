"""Folders as people have them: several kinds of weights, wrapped names, other heads, damage."""

import json
import pickle
import re
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pkm_jax.convert import foreign, huggingface, tensorflow
from pkm_jax.convert.model_card import TRIED
from pkm_jax.convert.tensors import flatten
from pkm_jax.refusal import Refusal

GOLDENS = Path(__file__).parent / 'goldens'


@pytest.fixture
def folder(tmp_path):
    """Copies a golden folder to change it."""
    return lambda name: Path(shutil.copytree(GOLDENS / name, tmp_path / name))


def rename(folder: Path, change, **config) -> Path:
    """Writes the folder's safetensors with names changed, and its configuration with `config`."""
    weights = {change(name): array
               for name, array in load_file(folder / 'model.safetensors').items()}
    save_file(weights, folder / 'model.safetensors')
    settings = json.loads((folder / 'config.json').read_text()) | config
    (folder / 'config.json').write_text(json.dumps(settings))
    return folder


def assert_same_parameters(found, wanted):
    found, wanted = flatten(found.params), flatten(wanted.params)
    assert found.keys() == wanted.keys()
    for path, array in wanted.items():
        np.testing.assert_array_equal(found[path], array, err_msg=path)


@pytest.mark.parametrize('files', [
    ['wiki.index'], ['bert_model.ckpt.index', 'bert_model.ckpt.data-00000-of-00001'],
    ['tf_model.h5', 'flax_model.msgpack'], ['training_args.bin', 'optimizer.pt']])
@pytest.mark.parametrize('name', ['masked_lm', 'model', 'question_answering'])
def test_pytorchs_weights_come_first(folder, name, files):
    source = folder(name)
    for file in files:
        (source / file).touch()
    assert_same_parameters(foreign.load(source), huggingface.load(GOLDENS / name))


def test_tensorflows_weights_are_read_where_there_are_no_others(tmp_path, monkeypatch):
    given = huggingface.load(GOLDENS / 'pretraining')
    monkeypatch.setattr(tensorflow, 'load', lambda folder, allow_unused: given)
    assert foreign.load(GOLDENS / 'tensorflow') is given
    with pytest.raises(Refusal, match='has no config.json'):
        foreign.load(tmp_path)


def test_weights_of_another_name_are_read_if_they_are_alone(folder):
    source = folder('masked_lm')
    (source / 'pytorch_model.bin').rename(source / 'last.ckpt')
    (source / 'training_args.bin').touch()
    assert_same_parameters(foreign.load(source), huggingface.load(GOLDENS / 'masked_lm'))
    shutil.copy(source / 'last.ckpt', source / 'best.ckpt')
    with pytest.raises(Refusal, match=r"several weight files, \['best.ckpt', 'last.ckpt'\]"):
        foreign.load(source)


def test_weights_that_cannot_be_read_are_named(folder):
    source = folder('model')
    (source / 'model.safetensors').rename(source / 'tf_model.h5')
    with pytest.raises(Refusal, match='has no weights.*tf_model.h5 cannot be read'):
        foreign.load(source)


@pytest.mark.parametrize('prefix', ['module.', '_orig_mod.', 'model.', 'module._orig_mod.',
                                    '_orig_mod.module.', 'model.model.', 'net.0.auto_model.'])
@pytest.mark.parametrize('name', ['model', 'masked_lm_untied', 'memory_shared'])
def test_what_wrappers_put_before_names_is_left_out(folder, name, prefix):
    source = rename(folder(name), lambda tensor: prefix + tensor)
    assert_same_parameters(foreign.load(source), huggingface.load(GOLDENS / name))


@pytest.mark.parametrize('inside', ['_orig_mod', '_fsdp_wrapped_module',
                                    '_checkpoint_wrapped_module'])
def test_wrappers_within_names_are_left_out(folder, inside):
    source = rename(folder('model'), lambda tensor: f'{inside}.' + re.sub(
        r'(layer\.\d+\.)', rf'\1{inside}.', tensor))
    assert_same_parameters(foreign.load(source), huggingface.load(GOLDENS / 'model'))


def test_another_number_of_layers_is_refused_before_a_model_is_planned(folder):
    source = rename(folder('model'), str, num_hidden_layers=10 ** 9)
    with pytest.raises(Refusal, match='num_hidden_layers = 1000000000, but the weights are of 2'):
        foreign.load(source)


def test_two_models_in_one_file_are_refused(folder):
    source = folder('model')
    weights = load_file(source / 'model.safetensors')
    save_file({f'{who}.{name}': array for name, array in weights.items()
               for who in ('student', 'teacher')}, source / 'model.safetensors')
    with pytest.raises(Refusal, match=r"2 models, \['student.', 'teacher.'\]"):
        foreign.load(source)


def within(path: Path, key: str) -> None:
    """Puts the state dict of a `torch.save` file under `key`, beside what Lightning also saves."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    (pickled,) = (name for name in entries if name.endswith('/data.pkl'))
    start, stop = b'\x80\x02', b'.'
    assert entries[pickled].startswith(start) and entries[pickled].endswith(stop)
    others = {'epoch': 3, 'loops': {'fit': {'done': True}}, 'lr_schedulers': [], 'path': None}
    dictionary = pickle.dumps(others, 2)[len(start):-len(stop)]
    name = b'X' + len(key).to_bytes(4, 'little') + key.encode()
    entries[pickled] = (start + dictionary + name + entries[pickled][len(start):-len(stop)]
                        + b's' + stop)      # set the item
    with zipfile.ZipFile(path, 'w') as archive:
        for entry, content in entries.items():
            archive.writestr(entry, content)


@pytest.mark.parametrize('key', ['state_dict', 'model_state_dict', 'model', 'module'])
def test_a_state_dict_among_other_things_is_read(folder, key):
    source = folder('masked_lm')
    within(source / 'pytorch_model.bin', key)
    (source / 'pytorch_model.bin').rename(source / 'last.ckpt')
    assert_same_parameters(foreign.load(source), huggingface.load(GOLDENS / 'masked_lm'))


@pytest.mark.parametrize('name, value', [
    ('encoder.layer.1.output.dense.weight', np.nan), ('embeddings.LayerNorm.bias', np.inf),
    ('embeddings.word_embeddings.weight', -np.inf)])
def test_weights_that_are_not_finite_are_refused_by_name(folder, name, value):
    source = folder('model')
    weights = load_file(source / 'model.safetensors')
    weights[name].flat[3] = value
    save_file(weights, source / 'model.safetensors')
    with pytest.raises(Refusal, match=f"'bert.{name}' holds 1 of .* infinite or NaN"):
        foreign.load(source)


@pytest.mark.parametrize('architecture', ['BertForMultipleChoice', 'MyBertTagger'])
def test_of_another_head_the_encoder_is_taken(folder, architecture):
    source = folder('model')
    weights = {f'bert.{name}': array
               for name, array in load_file(source / 'model.safetensors').items()}
    weights |= {'classifier.weight': np.zeros((9, 16), np.float32),
                'classifier.bias': np.zeros(9, np.float32)}
    save_file(weights, source / 'model.safetensors')
    found = foreign.load(rename(source, str, architectures=[architecture]))
    assert_same_parameters(found, huggingface.load(GOLDENS / 'model'))
    assert found.log.left['classifier.weight'] == f'of the head of {architecture}'


def test_a_classifier_of_tokens_is_known_by_its_missing_pooler(folder):
    source = folder('model_without_pooler')
    weights = load_file(source / 'model.safetensors')
    weights |= {'classifier.weight': np.ones((9, 16), np.float32),
                'classifier.bias': np.zeros(9, np.float32)}
    save_file(weights, source / 'model.safetensors')
    found = foreign.load(source)
    assert found.config.output_heads == ('token_classifier',) and found.config.classes == 9
    assert found.params['token_classifier']['kernel'].shape == (16, 9)


@pytest.mark.parametrize('file', ['config.json', 'model.safetensors'])
def test_a_git_lfs_pointer_is_called_that(folder, file):
    source = folder('model')
    (source / file).write_text('version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n')
    with pytest.raises(Refusal, match=f'{file} is a git-lfs pointer.*git lfs pull'):
        foreign.load(source)


@pytest.mark.parametrize('name, memory', [('masked_lm', False), ('memory_added', True)])
def test_the_model_card_says_what_loads_the_model(tmp_path, name, memory):
    model = huggingface.load(GOLDENS / name)
    huggingface.save(tmp_path / 'out', model.config, model.params, model.statistics)
    card = (tmp_path / 'out' / 'README.md').read_text()
    remote = ', trust_remote_code=True' * memory
    assert f"AutoModelForMaskedLM.from_pretrained('FOLDER'{remote})" in card
    assert (f'transformers 4.40 or later** (tried with {TRIED})' in card) == memory

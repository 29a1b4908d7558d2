"""Live against PyTorch: what we write, transformers loads in silence and computes as we do."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from pkm_jax.convert import huggingface
from pkm_jax.convert.configuration import ARCHITECTURES
from pkm_jax.convert_checkpoint import write_run
from pkm_jax.data.vocabulary import word_pieces

MAKE_GOLDENS = Path(__file__).with_name('make_goldens.py')
WORDS = ('[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', 'a', 'b', '##c')
pytestmark = pytest.mark.filterwarnings('default')  # those of other people's libraries


@pytest.fixture(scope='module')
def transformers(tmp_path_factory):
    """The library, offline; it keeps the modelling files that it runs in a folder of the test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('HF_HUB_OFFLINE', '1')
        patch.setenv('HF_MODULES_CACHE', str(tmp_path_factory.mktemp('modules')))
        pytest.importorskip('torch', reason='the live comparison needs torch and transformers')
        library = pytest.importorskip('transformers', reason='torch alone is not enough')
        library.logging.disable_progress_bar()
        yield library


@pytest.fixture(scope='module')
def goldens(transformers):
    """The script that makes the golden files."""
    spec = importlib.util.spec_from_file_location('make_goldens', MAKE_GOLDENS)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def batch(longest: int, words: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    lengths = np.array([longest, 4, 1])
    real = np.arange(longest) < lengths[:, None]
    tokens = np.where(real, rng.integers(5, words, (3, longest)), 0)
    return tokens, rng.integers(0, 2, (3, longest)), lengths


def load(transformers, folder: Path):
    """The folder through the auto class of its architecture, with what was said while loading."""
    (architecture,) = json.loads((folder / 'config.json').read_text())['architectures']
    name = architecture.removeprefix('Pkm').replace('Bert', 'AutoModel', 1)
    auto = getattr(transformers, name.replace('AutoModelModel', 'AutoModel'))
    return auto.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)


def test_transformers_loads_what_we_write_and_agrees(
        each_model, tmp_path, transformers, goldens, assert_equal_to_golden, capfd):
    huggingface.save(tmp_path / 'out', each_model.config, each_model.params, each_model.statistics,
                     shard_bytes=300)
    capfd.readouterr()
    model, said = load(transformers, tmp_path / 'out')
    assert not any(said.values()), said
    assert capfd.readouterr() == ('', '')
    assert type(model).__name__.removeprefix('Pkm') in ARCHITECTURES
    assert_equal_to_golden(each_model, goldens.run(model, *batch(9, 30)))


def test_transformers_reads_our_vocabulary(tmp_path, transformers, random_model):
    model = random_model()
    huggingface.save(tmp_path / 'out', model.config, model.params, model.statistics,
                     vocabulary=word_pieces(WORDS, lowercase=False))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / 'out')
    assert tokenizer('a bc A [MASK]')['input_ids'] == [2, 5, 6, 7, 1, 4, 3]


def test_transformers_reads_the_vocabulary_of_a_run(tmp_path, transformers, random_model):
    write_run(tmp_path / 'run', random_model(), tmp_path)
    word_pieces(WORDS, lowercase=False).save(tmp_path / 'run')
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / 'run')
    assert tokenizer('a bc')['input_ids'] == [2, 5, 6, 7, 3]


@pytest.mark.parametrize('memory', [{}, dict(memory_layers=(1,), placement='add')])
@pytest.mark.parametrize('kind, data', [
    ('classifier', {'labels': ['bad', 'fair', 'good'], 'problem': 'multi_label'}),
    ('token_classifier', {'labels': ['O', 'B-PER', 'I-PER']}),
])
def test_transformers_knows_the_names_of_classes(
        kind, data, memory, tmp_path, transformers, random_model):
    heads = ('pooler', kind) if kind == 'classifier' else (kind,)
    ours = random_model(output_heads=heads, classes=3, **memory)
    huggingface.save(tmp_path / 'out', ours.config, ours.params, ours.statistics,
                     run={'data': data})
    model, said = load(transformers, tmp_path / 'out')
    assert not any(said.values()), said
    assert list(model.config.id2label.values()) == data['labels']
    assert model.config.label2id[data['labels'][1]] == 1
    if kind == 'classifier':
        assert model.config.problem_type == 'multi_label_classification'


@pytest.mark.parametrize('architecture, memory', [
    *((name, None) for name in ARCHITECTURES),
    ('PkmBertForMaskedLM', dict(zero_start=True)),
    ('PkmBertModel', dict(placement='replace', layers=[1], query_norm='layer')),
])
def test_we_agree_with_what_transformers_writes(
        architecture, memory, tmp_path, goldens, assert_equal_to_golden, monkeypatch):
    monkeypatch.setattr(goldens, 'HERE', tmp_path)
    goldens.tiny('new', architecture, goldens.safetensors, memory)
    with np.load(tmp_path / 'goldens/new/expected.npz') as golden:
        assert_equal_to_golden(huggingface.load(tmp_path / 'goldens/new'), dict(golden))


@pytest.mark.parametrize('memory', [dict(zero_start=True, shared_values=True), dict()])
def test_a_saved_copy_of_a_model_with_memory_is_whole(
        memory, tmp_path, transformers, goldens, random_model, assert_equal_to_golden):
    ours = random_model(memory_layers=(0, 2), placement='add', **memory)
    huggingface.save(tmp_path / 'out', ours.config, ours.params, ours.statistics)
    model, _ = load(transformers, tmp_path / 'out')
    model.save_pretrained(tmp_path / 'copy')
    assert_equal_to_golden(huggingface.load(tmp_path / 'copy'), goldens.run(model, *batch(9, 30)))

"""GLUE as datasets of TFDS: what the direct reader reads, by the names of TFDS's own, without it."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from pkm_jax.data import columns
from pkm_jax.data.glue import TASKS, read_glue
from pkm_jax.data.glue_builder import PkmGlue, read_prepared
from pkm_jax.refusal import Refusal
from pkm_jax.tasks.glue import Glue
from tests.data.test_glue import FILES, write


@pytest.fixture(autouse=True)
def no_tensorflow(tmp_path, monkeypatch):
    """One is there, whose import would fail the test."""
    (tmp_path / 'other/tensorflow').mkdir(parents=True)
    (tmp_path / 'other/tensorflow/__init__.py').write_text('raise AssertionError("imported")')
    monkeypatch.syspath_prepend(tmp_path / 'other')
    yield
    assert 'tensorflow' not in sys.modules


def prepared(tmp_path, name, files):
    builder = tfds.builder(f'pkm_glue/{name}', data_dir=tmp_path / 'data')
    builder.download_and_prepare(
        download_config=tfds.download.DownloadConfig(manual_dir=tmp_path / files))
    return builder


@pytest.fixture
def files(tmp_path):
    def make(name, labelled='', test=''):
        (tmp_path / 'files').mkdir()
        return write(tmp_path / 'files', name, labelled or FILES[name][0], test or FILES[name][2])
    return make


@pytest.mark.parametrize('name', TASKS)
def test_equal_to_the_direct_reader(name, tmp_path, files):
    folder = files(name)
    prepared(tmp_path, name, 'files')
    direct, found = read_glue(folder, name, print), read_prepared(str(tmp_path / 'data'), name, print)
    assert found.keys() == direct.keys()
    for split, texts in direct.items():
        assert found[split][:2] == texts[:2] and len(found[split].places) == len(texts.places)
        if TASKS[name].labels or texts.labels is None:
            assert found[split].labels == texts.labels
        else:
            np.testing.assert_array_equal(*(columns.values_of(one.labels, one.places).astype(
                np.float32) for one in (found[split], texts)))
    task = Glue(name=name, folder=str(tmp_path / 'data'))
    assert task.read(print)['train'].texts == direct['train'].texts


def test_names_are_those_that_pipelines_read(tmp_path, files):
    """Of splits, features and labels, as TFDS's own 'glue' has them; the diagnostics apart."""
    folder = files('mnli')
    builder = prepared(tmp_path, 'mnli', 'files')
    assert set(builder.info.splits) == {'train', 'validation_matched', 'validation_mismatched',
                                        'test_matched', 'test_mismatched'}
    example, = builder.as_data_source('train')
    assert example == {'premise': b'a', 'hypothesis': b'b', 'label': 1, 'idx': 0}
    assert builder.info.features['label'].names == ['entailment', 'neutral', 'contradiction']
    assert builder.as_data_source('test_matched')[0]['label'] == -1
    with pytest.raises(Refusal, match='has no diagnostics'):
        prepared(tmp_path, 'ax', 'files')
    (tmp_path / 'files/AX').mkdir()
    (tmp_path / 'files/AX/diagnostic.tsv').write_text('index\tsentence1\tsentence2\n0\tc\td\n')
    (tmp_path / 'files/MNLI').rename(tmp_path / 'elsewhere')      # the diagnostics stand alone
    assert prepared(tmp_path, 'ax', 'files').as_data_source('test')[0]['hypothesis'] == b'd'
    found = read_prepared(str(tmp_path / 'data'), 'mnli', print)['test_ax']
    (tmp_path / 'alone').mkdir()
    shutil.move(tmp_path / 'data/pkm_glue/mnli', tmp_path / 'alone')
    assert read_prepared(str(tmp_path / 'data'), 'mnli', print) is None
    (tmp_path / 'elsewhere').rename(tmp_path / 'files/MNLI')
    assert found[:3] == read_glue(folder, 'mnli', print)['test_ax'][:3]


def test_the_order_is_that_of_the_files(tmp_path, files):
    """So that rows of predictions are those that GLUE's server takes."""
    files('sst2', 'sentence\tlabel\n' + ''.join(f'film {n}\t{n % 2}\n' for n in range(300)))
    source = prepared(tmp_path, 'sst2', 'files').as_data_source('train')
    assert [example['sentence'] for example in source] == [b'film %d' % n for n in range(300)]


def test_other_files_are_refused(tmp_path, files):
    files('sst2', 'sentence\tlabel\na\t2\n')
    with pytest.raises(Refusal, match=r"train.tsv, line 2: the label '2' is none"):
        prepared(tmp_path, 'sst2', 'files')
    assert read_prepared(str(tmp_path / 'data'), 'sst2', print) is None


def test_which_files_are_read_is_said_and_those_that_need_tensorflow_are_refused(tmp_path, files):
    """Also where both lie in one folder; other formats than ArrayRecord need TensorFlow."""
    folder = Path(files('sst2'))
    prepared(tmp_path, 'sst2', 'files')
    (tmp_path / 'data/pkm_glue').rename(folder / 'pkm_glue')
    said = []
    Glue(name='sst2', folder=str(folder)).read(said.append)
    where = folder / 'pkm_glue/sst2' / str(PkmGlue.VERSION)
    assert said == [f'data: sst2 as TFDS prepared it in {where}']
    info = where / 'dataset_info.json'
    info.write_text(info.read_text().replace('array_record', 'tfrecord'))
    with pytest.raises(Refusal, match="holds tfrecord files: prepare it again"):
        Glue(name='sst2', folder=str(folder)).read(print)


def test_each_task_is_a_configuration():
    assert list(PkmGlue.builder_configs) == [*TASKS, 'ax']

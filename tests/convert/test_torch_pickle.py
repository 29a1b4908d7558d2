"""PyTorch pickles are read without PyTorch, and nothing in them is ever run."""

import collections
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest

from pkm_jax.convert import huggingface, torch_pickle
from pkm_jax.convert.weights import open_state_dict
from pkm_jax.refusal import Refusal

GOLDENS = Path(__file__).parent / 'goldens'
ZIPPED = GOLDENS / 'masked_lm/pytorch_model.bin'
OLD = GOLDENS / 'pretraining/pytorch_model.bin'


class Evil:
    """Writes a file when it is unpickled by the ordinary unpickler."""

    def __init__(self, witness: Path):
        self.witness = witness

    def __reduce__(self):
        return os.mkdir, (str(self.witness),)


class EvilState:
    """Names a class of the standard library, and sets its state."""

    def __reduce__(self):
        return collections.Counter, (), {'danger': 1}


def zipped(path: Path, data: bytes) -> Path:
    with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr('archive/data.pkl', data)
    return path


def rezipped(path: Path, change) -> Path:
    """The golden archive with `change(name, bytes)` applied to every entry."""
    with zipfile.ZipFile(ZIPPED) as source, zipfile.ZipFile(path, 'w') as target:
        for name in source.namelist():
            target.writestr(name, change(name, source.read(name)))
    return path


@pytest.mark.parametrize('path', [ZIPPED, OLD], ids=['zip', 'before_zip'])
def test_reads_both_formats(path):
    tensors = torch_pickle.load(path)
    assert all(np.isfinite(tensor.read()).all() for tensor in tensors.values())
    words = next(tensors[name] for name in tensors if name.endswith('word_embeddings.weight'))
    assert words.shape == (40, 16) == words.read().shape and words.dtype == np.float32
    decoder = tensors['cls.predictions.decoder.weight']
    np.testing.assert_array_equal(decoder.read(), words.read())


@pytest.mark.parametrize('load', [torch_pickle.load, open_state_dict])
@pytest.mark.parametrize('format', ['zip', 'plain'])
def test_a_malicious_pickle_is_refused_and_not_run(tmp_path, load, format):
    witness = tmp_path / 'witness'
    data = pickle.dumps({'weight': Evil(witness)})
    if format == 'zip':
        path = zipped(tmp_path / 'evil.bin', data)
    else:
        path = tmp_path / 'evil.bin'
        path.write_bytes(data)
    with pytest.raises(torch_pickle.UnsafePickleError, match=f'{os.mkdir.__module__}.mkdir'):
        load(path)
    assert not witness.exists()
    pickle.loads(data)
    assert witness.exists(), 'the pickle is harmless: this test shows nothing'


def test_a_malicious_folder_leaves_nothing_behind(tmp_path):
    source = Path(shutil.copytree(GOLDENS / 'masked_lm', tmp_path / 'source'))
    zipped(source / 'pytorch_model.bin', pickle.dumps({'weight': Evil(tmp_path / 'witness')}))
    with pytest.raises(torch_pickle.UnsafePickleError):
        huggingface.load(source)
    assert [path.name for path in tmp_path.iterdir()] == ['source']


@pytest.mark.parametrize('thing, name', [
    (EvilState(), 'collections.Counter'), (np.float64, 'numpy.float64'), (eval, 'builtins.eval')])
def test_every_other_name_is_refused(tmp_path, thing, name):
    path = zipped(tmp_path / 'weights.bin', pickle.dumps({'weight': thing}))
    with pytest.raises(torch_pickle.UnsafePickleError, match=name):
        torch_pickle.load(path)


@pytest.mark.parametrize('path', [ZIPPED, OLD], ids=['zip', 'before_zip'])
@pytest.mark.parametrize('kept', [0, 10, 0.5, 0.999])
def test_a_truncated_file_is_refused(tmp_path, path, kept):
    whole = path.read_bytes()
    short = tmp_path / 'weights.bin'
    short.write_bytes(whole[:kept if kept > 1 else int(kept * len(whole))])
    with pytest.raises(Refusal, match='weights.bin cannot be read'):
        torch_pickle.load(short)


def test_a_damaged_number_is_noticed(tmp_path):
    raw = bytearray(ZIPPED.read_bytes())
    with zipfile.ZipFile(ZIPPED) as archive:
        entry = next(info for info in archive.infolist() if info.filename.endswith('/data/0'))
    raw[entry.header_offset + 200] ^= 1
    path = tmp_path / 'weights.bin'
    path.write_bytes(raw)
    with pytest.raises(Refusal, match='is damaged.*CRC'):
        for tensor in torch_pickle.load(path).values():
            tensor.read()


@pytest.mark.parametrize('change, words', [
    (lambda name, raw: b'big' if name.endswith('byteorder') else raw, 'big-endian'),
    (lambda name, raw: raw[:-4] if name.endswith('/data/0') else raw, 'data/0 does not hold'),
])
def test_storages_that_do_not_fit_are_refused(tmp_path, change, words):
    with pytest.raises(Refusal, match=words):
        torch_pickle.load(rezipped(tmp_path / 'weights.bin', change))


def test_a_tensor_cannot_reach_outside_its_storage():
    storage = torch_pickle._Storage(ZIPPED, np.dtype(np.float32), 6, lambda: bytes(24))
    assert torch_pickle._rebuild_tensor(storage, 0, (2, 3), (3, 1)).read().shape == (2, 3)
    for offset, shape, strides in [(1, (2, 3), (3, 1)), (0, (2, 3), (4, 1)), (0, (7,), (1,)),
                                   (-1, (2,), (1,)), (5, (2,), (-1,))]:
        with pytest.raises(ValueError, match='outside its storage'):
            torch_pickle._rebuild_tensor(storage, offset, shape, strides)


def test_a_state_dict_must_hold_tensors_only(tmp_path):
    path = zipped(tmp_path / 'weights.bin', pickle.dumps({'epoch': 3}))
    with pytest.raises(Refusal, match='not a state dict'):
        open_state_dict(path)


def tensor_pickle(count, shape, strides, memo=b''):
    """A pickle of one float32 tensor of the storage '0', which it says holds `count` numbers."""
    def numbers(values):
        return b'(' + b''.join(pickle.dumps(value, 2)[2:-1] for value in values) + b't'

    storage = (b'(' + pickle.dumps('storage', 2)[2:-1] + b'ctorch\nFloatStorage\n'
               + pickle.dumps('0', 2)[2:-1] + pickle.dumps('cpu', 2)[2:-1]
               + pickle.dumps(count, 2)[2:-1] + b'tQ')
    return (b'\x80\x02}' + pickle.dumps('weight', 2)[2:-1] + memo + b'ctorch._utils\n_rebuild_tensor_v2\n('
            + storage + b'K\x00' + numbers(shape) + numbers(strides) + b'\x89}tRs.')


def old_file(path, tensor, count):
    """A file of before PyTorch 1.6 with that tensor and a storage that holds `count` numbers."""
    parts = [pickle.dumps(value, 2) for value in (torch_pickle.LEGACY_MAGIC, 1001, {})]
    path.write_bytes(b''.join([*parts, tensor, pickle.dumps(['0'], 2)])
                     + count.to_bytes(8, 'little') + bytes(4 * count))
    return path


def test_a_tensor_of_one_storage_is_read(tmp_path):
    path = old_file(tmp_path / 'a.bin', tensor_pickle(6, (2, 3), (3, 1)), 6)
    assert torch_pickle.load(path)['weight'].read().shape == (2, 3)


@pytest.mark.parametrize('tensor, count, message', [
    (tensor_pickle(10 ** 6, (10 ** 6,), (1,)), 6, 'storage of 6 numbers is named as one of 1000000'),
    (tensor_pickle(6, (10 ** 6, 10 ** 6), (0, 0)), 6, 'has 6 numbers'),
    (tensor_pickle(6, (6,), (1,), b'r\xff\xff\xff\x7f'), 6, 'object as number 2,147,483,647')])
def test_nothing_is_read_beyond_a_file_nor_made_larger_than_it(tmp_path, tensor, count, message):
    """Numbers outside the file, a table of the same few numbers, and 34 GB for what it remembers."""
    with pytest.raises(Refusal, match=message):
        torch_pickle.load(old_file(tmp_path / 'a.bin', tensor, count))


def test_an_archive_that_would_grow_is_refused(tmp_path):
    path = tmp_path / 'a.bin'
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
        archive.writestr('archive/data.pkl', tensor_pickle(10 ** 6, (10 ** 6,), (1,)))
        archive.writestr('archive/data/0', bytes(4 * 10 ** 6))
    with pytest.raises(Refusal, match='entries are larger than the file'):
        torch_pickle.load(path)

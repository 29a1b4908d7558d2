"""Reads the tensors of a `torch.save` file without PyTorch and without running what it contains.

Such a file is a pickle that refers to raw storages: entries of a ZIP archive since PyTorch 1.6,
the tail of the same stream before. A pickle may name any function to be called while it loads.
Here it may name only the few that rebuild tensors; anything else is refused before it is run. It
may also ask for any amount of memory: here for no more than its file has bytes.
"""

import collections
import io
import math
import pickle
import pickletools
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from pkm_jax.convert.tensors import StoredTensor
from pkm_jax.data.files import refuse_pointer
from pkm_jax.refusal import Refusal

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
STORAGES = {
    'FloatStorage': np.float32, 'HalfStorage': np.float16, 'BFloat16Storage': ml_dtypes.bfloat16,
    'DoubleStorage': np.float64, 'LongStorage': np.int64, 'IntStorage': np.int32,
    'ShortStorage': np.int16, 'CharStorage': np.int8, 'ByteStorage': np.uint8,
    'BoolStorage': np.bool_,
}


class UnsafePickleError(Refusal):
    """A pickle names a function or class that no tensor needs."""


def load(path: Path) -> Any:
    """The object saved in `path`, with a `StoredTensor` in the place of every tensor.

    Raises:
      UnsafePickleError: the pickle names anything but tensors and plain containers.
      Refusal: the file is not of either format of `torch.save`, or is cut short; so does reading a
        tensor of a damaged one.
    """
    refuse_pointer(path)
    try:
        if zipfile.is_zipfile(path):
            return _load_archive(path)
        with open(path, 'rb') as file:
            return _load_stream(path, file)
    except UnsafePickleError:
        raise
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise Refusal(f'{path} cannot be read as a PyTorch checkpoint ({error!r}): it may be '
                      f'cut short or of another format. Copy it again.') from error


def _load_archive(path: Path) -> Any:
    with zipfile.ZipFile(path) as archive:
        names, size = set(archive.namelist()), path.stat().st_size
        if any(entry.file_size > size for entry in archive.infolist()):
            raise ValueError('its entries are larger than the file, in which they are as they are')
        pickled = next(name for name in names if name.endswith('/data.pkl'))
        root = pickled.removesuffix('data.pkl')
        if (order := root + 'byteorder') in names and archive.read(order) != b'little':
            raise ValueError('its storages are big-endian')

        def storage(dtype: np.dtype, key: str, count: int) -> '_Storage':
            entry = f'{root}data/{key}'
            if archive.getinfo(entry).file_size != count * dtype.itemsize:
                raise ValueError(f'{entry} does not hold {count} values of type {dtype}')
            return _Storage(path, dtype, count, lambda: _read_entry(path, entry))

        _bound_memo(io.BytesIO(archive.read(pickled)), size)
        return _TensorUnpickler(io.BytesIO(archive.read(pickled)), storage).load()


def _read_entry(path: Path, entry: str) -> bytes:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.read(entry)
    except Exception as error:  # zipfile raises nearly anything
        raise Refusal(f'{path} is damaged ({error!r}): copy it again.') from error


def _load_stream(path: Path, file: io.BufferedIOBase) -> Any:
    """The format before PyTorch 1.6: magic, version, machine, object, storage keys, storages."""
    offsets: dict[str, int] = {}
    size = path.stat().st_size

    def load(unpickler):
        start = file.tell()
        _bound_memo(file, size)
        file.seek(start)
        return unpickler.load()

    def storage(dtype: np.dtype, key: str, count: int) -> '_Storage':
        return _Storage(path, dtype, count,
                        lambda: _read_at(path, offsets[key], count * dtype.itemsize))

    if load(_TensorUnpickler(file, storage)) != LEGACY_MAGIC:
        raise ValueError('it does not start as one')
    for _ in ('version', 'machine'):
        load(_TensorUnpickler(file, storage))
    unpickler = _TensorUnpickler(file, storage)
    loaded = load(unpickler)
    for key in load(_TensorUnpickler(file, storage)):
        count, named = int.from_bytes(file.read(8), 'little'), unpickler.storages[key]
        if count != named.count:
            raise ValueError(f'a storage of {count} numbers is named as one of {named.count}')
        offsets[key] = file.tell()
        file.seek(count * named.dtype.itemsize, io.SEEK_CUR)
    if file.tell() > size:
        raise ValueError(f'it has {size} bytes and should have {file.tell()}')
    if absent := unpickler.storages.keys() - offsets.keys():
        raise ValueError(f'it lacks {len(absent)} of its storages')
    return loaded


def _bound_memo(file: io.BufferedIOBase, size: int) -> None:
    """Refuses a pickle that remembers an object under a number beyond its `size`, as Python makes
    as many places."""
    for opcode, argument, _ in pickletools.genops(file):    # type: ignore[arg-type]  # it is one
        if 'PUT' in opcode.name and argument > size:
            raise ValueError(f'it remembers an object as number {argument:,}')


def _read_at(path: Path, offset: int, size: int) -> bytes:
    with open(path, 'rb') as file:
        file.seek(offset)
        return file.read(size)


class _Storage:
    """A flat run of numbers in the file."""

    def __init__(self, path: Path, dtype: np.dtype, count: int, read: Callable[[], bytes]):
        self.path, self.dtype, self.count, self.read = path, dtype, count, read

    def view(self, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> np.ndarray:
        content = self.read()
        if len(content) != self.count * self.dtype.itemsize:
            raise Refusal(f'{self.path} is damaged, a storage has {len(content):,} bytes of '
                          f'{self.count * self.dtype.itemsize:,}: copy it again.')
        flat = np.frombuffer(content, self.dtype)
        return np.lib.stride_tricks.as_strided(
            flat[offset:], shape, [stride * self.dtype.itemsize for stride in strides])


class _TensorUnpickler(pickle.Unpickler):
    """Knows the functions that rebuild a tensor, the storages, and `OrderedDict`: nothing else."""

    def __init__(self, file: io.BufferedIOBase, storage: Callable[[np.dtype, str, int], _Storage]):
        super().__init__(file, encoding='utf-8')
        self.storage, self.storages = storage, {}

    def find_class(self, module: str, name: str) -> Any:
        if module == 'torch' and name in STORAGES:
            return np.dtype(STORAGES[name])
        known = {('collections', 'OrderedDict'): collections.OrderedDict,
                 ('torch._utils', '_rebuild_tensor_v2'): _rebuild_tensor,
                 ('torch._utils', '_rebuild_parameter'): _rebuild_parameter}
        if (module, name) not in known:
            raise UnsafePickleError(
                f'the checkpoint asks for {module}.{name}, which no tensor needs: it is refused '
                f'and nothing of it was run. Save a plain state dict, or use safetensors.')
        return known[module, name]

    def persistent_load(self, reference: tuple) -> _Storage:
        kind, dtype, key, _, count, *_ = reference
        if kind != 'storage':
            raise ValueError('a reference to something else than a storage')
        if key not in self.storages:
            self.storages[key] = self.storage(dtype, key, count)
        return self.storages[key]


def _rebuild_tensor(storage: _Storage, offset: int, shape: tuple, strides: tuple, *_: Any):
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if min((offset, *shape, *strides)) < 0 or math.prod(shape) and last >= storage.count:
        raise ValueError(f'a tensor of shape {shape} reaches outside its storage')
    if math.prod(shape) > storage.count:
        raise ValueError(f'a tensor of shape {shape} has {storage.count} numbers')
    return StoredTensor(tuple(shape), storage.dtype, lambda: storage.view(offset, shape, strides))


def _rebuild_parameter(tensor: StoredTensor, *_: Any) -> StoredTensor:
    return tensor

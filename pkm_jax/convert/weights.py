"""The weight files of a Hugging Face folder, read and written tensor by tensor, whole or in shards.

`model.safetensors` or `pytorch_model.bin`; split over several files, an index beside them says
which tensor is in which (`model.safetensors.index.json`). A folder without any of these may hold
one weight file of another name.
"""

import functools
import json
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import safetensors
from safetensors.numpy import save_file

from pkm_jax.convert import torch_pickle
from pkm_jax.convert.tensors import StoredTensor
from pkm_jax.data.files import read_json, refuse_pointer
from pkm_jax.refusal import Refusal

SAFETENSORS = 'model.safetensors'
PICKLE = 'pytorch_model.bin'
ENDINGS = ('.safetensors', '.bin', '.pt', '.pth', '.ckpt')
# What training leaves beside weights.
NO_WEIGHTS = {'training_args.bin', 'optimizer.pt', 'optimizer.bin', 'scheduler.pt', 'scheduler.bin',
              'scaler.pt', 'rng_state.pth'}
# Where programs that save more than a state dict keep it.
STATE_DICTS = ('state_dict', 'model_state_dict', 'model', 'module')
SHARD_BYTES = 5 * 10**9
DTYPES = {'F32': np.float32, 'F16': np.float16, 'BF16': ml_dtypes.bfloat16, 'F64': np.float64,
          'I64': np.int64, 'I32': np.int32, 'I16': np.int16, 'I8': np.int8, 'U8': np.uint8,
          'BOOL': np.bool_}


def find_weights(folder: Path) -> Path | None:
    """The weight file of `folder`, or the index of its shards; None where it has none.

    Raises:
      Refusal: it has several, and none of the usual names.
    """
    names = [name for file in (SAFETENSORS, PICKLE) for name in (file, f'{file}.index.json')]
    found = [folder / name for name in names if (folder / name).exists()]
    if not found and folder.is_dir():
        found = [path for path in sorted(folder.iterdir()) if path.is_file()
                 and path.suffix in ENDINGS and path.name not in NO_WEIGHTS]
        if len(found) > 1:
            raise Refusal(f'{folder} holds several weight files, {[path.name for path in found]}: '
                          f'leave one there, or call it {SAFETENSORS} or {PICKLE}.')
    return found[0] if found else None


def open_weights(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of `folder` by name, unread.

    Raises:
      Refusal: the folder has no weights, or lacks a shard that its index lists; a file is cut short
        or damaged, or a shard lacks a tensor that the index lists.
    """
    found = find_weights(folder)
    if found is None:
        others = sorted(path.name for path in folder.glob('*')
                        if path.suffix in ('.h5', '.msgpack', '.onnx', '.gguf'))
        raise Refusal(f'{folder} has no weights: neither {SAFETENSORS} nor {PICKLE}, nor the index '
                      f'of either.' + (f' {", ".join(others)} cannot be read: save it for PyTorch.'
                                       if others else ''))
    return _open_shards(found) if found.suffix == '.json' else open_state_dict(found)


def _open_shards(index: Path) -> dict[str, StoredTensor]:
    files = read_json(index).get('weight_map')
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise Refusal(f'{index} is damaged, it maps no names to files: copy it again.')
    tensors, beside = {}, {path.name for path in index.parent.iterdir()}
    for shard in sorted(set(files.values())):
        if shard not in beside:
            raise Refusal(f'{index} lists the shard {shard[:200]!r}, which is not beside it: '
                          f'copy it there.')
        tensors |= open_state_dict(index.parent / shard)
    if absent := sorted(set(files) - set(tensors)):
        raise Refusal(f'{index} lists tensors that its shards do not hold: {absent[:5]}.')
    return tensors


def open_state_dict(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of one weight file by name; of what more was saved, those of its state dict.

    Raises:
      Refusal: there is no such file, it is damaged, or it holds other things.
    """
    if not path.is_file():
        raise Refusal(f'There is no file {path}.')
    refuse_pointer(path)
    if path.suffix == '.safetensors':
        return dict(_open_safetensors(path))
    loaded = torch_pickle.load(path)
    if isinstance(loaded, dict):
        loaded = next((loaded[name] for name in STATE_DICTS
                       if isinstance(loaded.get(name), dict)), loaded)
    if not isinstance(loaded, dict) or not all(
            isinstance(name, str) and isinstance(tensor, StoredTensor)
            for name, tensor in loaded.items()):
        raise Refusal(f'{path} is not a state dict: it must map names to tensors only.')
    return dict(loaded)


def _open_safetensors(path: Path) -> Iterator[tuple[str, StoredTensor]]:
    try:
        with safetensors.safe_open(path, 'np') as file:
            for name in file.keys():    # noqa: SIM118 - no dict: it cannot be iterated
                tensor = file.get_slice(name)
                dtype = np.dtype(DTYPES[tensor.get_dtype()])
                yield name, StoredTensor(tuple(tensor.get_shape()), dtype,
                                         functools.partial(_read_safetensors, path, name))
    except KeyError as error:
        raise Refusal(f'{path} holds numbers of type {error}: not supported.') from error
    except safetensors.SafetensorError as error:
        raise Refusal(f'{path} is cut short or damaged ({error}): copy it again.') from error


def _read_safetensors(path: Path, name: str) -> np.ndarray:
    # Opened anew each time: an open file keeps every page it ever read in memory.
    with safetensors.safe_open(path, 'np') as file:
        return file.get_tensor(name)


def write_weights(folder: Path, tensors: dict[str, StoredTensor],
                  shard_bytes: int = SHARD_BYTES) -> None:
    """Writes safetensors files of at most `shard_bytes` each, unless one tensor alone is larger.

    Tensors are read as their shard is written: one shard is in memory at a time.
    """
    shards = _plan_shards(tensors, shard_bytes)
    files = {}
    for number, names in enumerate(shards, 1):
        file = (SAFETENSORS if len(shards) == 1
                else f'model-{number:05}-of-{len(shards):05}.safetensors')
        save_file({name: np.asarray(tensors[name].read(), order='C') for name in names},
                  folder / file, metadata={'format': 'pt'})
        (folder / file).chmod(0o644)  # the library leaves it readable by its owner only
        files |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {'metadata': {'total_size': sum(tensor.nbytes for tensor in tensors.values())},
                 'weight_map': files}
        (folder / f'{SAFETENSORS}.index.json').write_text(json.dumps(index, indent=2) + '\n')


def _plan_shards(tensors: dict[str, StoredTensor], shard_bytes: int) -> list[list[str]]:
    shards, filled = [[]], 0
    for name, tensor in tensors.items():
        if shards[-1] and filled + tensor.nbytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += tensor.nbytes
    return shards

"""What the readers hand out, how it becomes the parameters of a model, and the record of that."""

import dataclasses
import math
import re
import zlib
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
from flax import nnx

from pkm_jax.models.bert import BertConfig
from pkm_jax.models.interface import abstract_model, flatten, unflatten
from pkm_jax.refusal import Refusal

FLOATS = (np.float32, np.float16, ml_dtypes.bfloat16)
LAYER_TENSORS = 12  # of a layer at least: attention and two norms, as any layer has them
BLOCK = 2**14   # rows of which a checksum is taken at a time


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """Shape and type of a tensor that lies in a file, and a function that reads it."""
    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class Entry:
    """One parameter: its path here, its name elsewhere, and a CRC-32 of its bytes here."""
    path: str
    source: str
    shape: tuple[int, ...]
    dtype: str
    checksum: str

    @classmethod
    def of(cls, path: str, source: str, array: Any) -> 'Entry':
        """Reads `array`, anything with a shape, a dtype and slices, a block of rows at a time."""
        rows = array if array.shape else np.asarray(array)[None]
        checksum = 0
        for start in range(0, rows.shape[0], BLOCK):
            block = np.ascontiguousarray(rows[start:min(start + BLOCK, rows.shape[0])])
            checksum = zlib.crc32(block.view(np.uint8).data, checksum)
        return cls(path, source, array.shape, str(array.dtype), f'{checksum:08x}')


@dataclasses.dataclass
class ConversionLog:
    """What became of every tensor: taken from the source, new (not in it), or left there, why."""
    taken: list[Entry] = dataclasses.field(default_factory=list)
    new: list[Entry] = dataclasses.field(default_factory=list)
    left: dict[str, str] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f'{title:5}  {entry.checksum}  {entry.dtype:8}  {entry.shape!s:14}  {entry.path}'
                 + (f' <- {entry.source}' if entry.source else '')
                 for title, entries in (('taken', self.taken), ('new', self.new))
                 for entry in entries]
        lines += [f'left   {name}: {reason}' for name, reason in self.left.items()]
        lines.append(f'{len(self.taken)} taken, {len(self.new)} new, {len(self.left)} left')
        return '\n'.join(lines)


@dataclasses.dataclass(frozen=True)
class ForeignModel:
    """A model read from elsewhere: plain nested dicts of numpy arrays, as `nnx.to_pure_dict`."""
    config: BertConfig
    params: dict
    statistics: dict
    log: ConversionLog


def expected(config: BertConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """Shapes of the parameters and of the batch statistics of `Bert(config)`, by path."""
    model = abstract_model(config)
    params, statistics = nnx.state(model, nnx.Param), nnx.state(model, nnx.BatchStat)
    return flatten(nnx.to_pure_dict(params)), flatten(nnx.to_pure_dict(statistics))


def assemble(config: BertConfig, stored: dict[str, StoredTensor], name_of: Callable[[str], str],
             transposed: Callable[[str], bool], left: dict[str, str],
             allow_unused: bool) -> ForeignModel:
    """The parameters of `Bert(config)` taken from `stored`; `left` was set aside before, and why.

    Raises:
      Refusal: as `take` does and, unless `allow_unused`, for names that are not understood; and of
        a configuration with more layers than there are tensors, before they are made.
    """
    if config.layers * LAYER_TENSORS > len(stored):
        raise Refusal(f'The configuration asks for {config.layers:,} layers, but the weights hold '
                      f'{len(stored):,} tensors: one of the two files is damaged. Copy them again.')
    params, statistics = expected(config)
    unused = dict(stored)
    taken, entries = take(params | statistics, unused, name_of, transposed)
    if unused and not allow_unused:
        raise Refusal(f'{len(unused)} tensors have names that are not understood: '
                      f'{sorted(unused)[:10]}. To go on without them, convert with `python -m '
                      f'pkm_jax.convert_checkpoint --allow_unused`.')
    left = left | dict.fromkeys(unused, 'not understood')
    return ForeignModel(config, unflatten({path: taken[path] for path in params}),
                        unflatten({path: taken[path] for path in statistics}),
                        ConversionLog(entries, left=left))


def take(wanted: dict[str, Any], stored: dict[str, StoredTensor], name_of: Callable[[str], str],
         transposed: Callable[[str], bool]) -> tuple[dict[str, np.ndarray], list[Entry]]:
    """Reads what is `wanted` (anything with a shape, by path) out of `stored` and removes it there.

    A tensor called NAME may come in blocks of rows NAME.0, NAME.1, …. Half precision is widened to
    float32, except in value tables.
    Raises:
      Refusal: a tensor is missing, has another shape, or holds no floats or no finite ones.
    """
    taken, entries = {}, []
    for path, leaf in wanted.items():
        name = name_of(path)
        parts = [stored.pop(part) for part in _blocks(name, stored)]
        if not parts:
            raise Refusal(f'The checkpoint has no {name!r} (here {path}).')
        taken[path] = _read(path, name, parts, transposed(path), leaf.shape)
        entries.append(Entry.of(path, name, taken[path]))
    return taken, entries


def _blocks(name: str, stored: dict[str, StoredTensor]) -> list[str]:
    if name in stored:
        return [name]
    blocks = [other for other in stored if re.fullmatch(re.escape(name) + r'\.\d+', other)]
    return sorted(blocks, key=lambda block: int(block.rsplit('.', 1)[1]))


def _read(path: str, name: str, parts: list[StoredTensor], transpose: bool,
          shape: tuple[int, ...]) -> np.ndarray:
    rows = [part.shape[0] for part in parts] if len(parts) > 1 else []
    found = (sum(rows), *parts[0].shape[1:]) if rows else parts[0].shape
    wanted = shape[::-1] if transpose else shape
    if found != wanted or any(part.shape[1:] != wanted[1:] for part in parts):
        raise Refusal(f'{name!r} has shape {found}, but the configuration asks for {wanted}.')
    dtype = parts[0].dtype
    if dtype not in FLOATS:
        raise Refusal(f'{name!r} holds numbers of type {dtype}: only float32, float16 and '
                      f'bfloat16 are read.')
    array = np.empty(shape, dtype if path.endswith('/values') else np.float32)
    blocks = np.split(array, np.cumsum(rows)[:-1]) if rows else [array]
    for block, part in zip(blocks, parts, strict=True):
        block[...] = part.read().T if transpose else part.read()
    _refuse_non_finite(name, array)
    return array


def _refuse_non_finite(name: str, array: np.ndarray) -> None:
    rows = array if array.shape else array[None]
    bad = sum(int((~np.isfinite(rows[start:start + BLOCK])).sum())
              for start in range(0, len(rows), BLOCK))
    if bad:
        raise Refusal(f'{name!r} holds {bad:,} of {array.size:,} numbers that are infinite or NaN: '
                      f'the model diverged, or the file is damaged. Take an earlier checkpoint.')

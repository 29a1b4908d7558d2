"""Product-key memories trained elsewhere, put into a BERT of ours.

Two layouts of state dicts are known, each with any prefix in front of its names:

    XLM                     keys [H, 2, N, Q/2], values.weight [N², V], query_proj.query_mlps.0.*
                            and, with batch norm of queries, query_proj.query_mlps.1.*
    facebookresearch/memory keys [2·H·N, Q/2], values.weight [N², V], query_proj.*, or as above

In both, slot = i1·N + i2 and a query is laid out head by head, one half after the other: as here.
"""

import dataclasses
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pkm_jax.convert import names
from pkm_jax.convert.tensors import (
    ConversionLog,
    Entry,
    ForeignModel,
    StoredTensor,
    expected,
    flatten,
    take,
    unflatten,
)
from pkm_jax.convert.weights import open_state_dict
from pkm_jax.models.bert import BertConfig
from pkm_jax.refusal import Refusal

BATCH_NORM = {'scale': 'weight', 'bias': 'bias', 'mean': 'running_mean', 'var': 'running_var'}
STACKED = re.compile(r'.*/memory/(codebooks|query_norm/.*)')  # stored flat by some


def add_memories(backbone: ForeignModel, path: Path, placement: str, top_k: int,
                 layers: Sequence[int] = ()) -> ForeignModel:
    """`backbone` with the memories of the state dict in `path`, each on one layer.

    Layers are counted from 0, in the order of the memories in the file; by default each memory
    goes to the number in its prefix (`layers.4.feed_forward.`). What the file holds besides
    memories is left. A projection without bias gets one of zeros.
    Raises:
      Refusal: the file holds no memory, memories of several sizes, or of another width than the
        backbone; a prefix has no number or several; a tensor of a memory is not understood.
    """
    if backbone.config.memory_layers:
        raise Refusal(f'The model has memories already, in {backbone.config.memory_layers}.')
    stored = open_state_dict(path)
    prefixes = [name.removesuffix('keys') for name in stored
                if name.endswith('keys') and name.removesuffix('keys') + 'values.weight' in stored]
    if not prefixes:
        raise Refusal(f'{path} holds no memory: no PREFIX.keys beside a PREFIX.values.weight.')
    layers = tuple(layers) or tuple(_layer(prefix) for prefix in prefixes)
    if len(layers) != len(prefixes):
        raise Refusal(f'{path} holds {len(prefixes)} memories, {prefixes}, for the layers '
                      f'{layers}: give as many.')
    origins, sizes = {}, []
    for prefix, layer in zip(prefixes, layers, strict=True):
        known, size = _understand(prefix, stored)
        origins |= {f'layers/{layer}/memory/{ours}': theirs for ours, theirs in known.items()}
        sizes.append(size)
    if any(size != sizes[0] for size in sizes):
        raise Refusal(f'The memories in {path} differ in size: {sizes}.')
    try:
        memory = dataclasses.replace(BertConfig.memory, top_k=top_k, **sizes[0])
        config = dataclasses.replace(backbone.config, memory=memory, placement=placement,
                                     memory_layers=layers)
    except ValueError as error:
        raise Refusal(f'The memories in {path} do not fit the model: {error}') from error
    return _join(config, backbone, stored, origins)


def _layer(prefix: str) -> int:
    numbers = re.findall(r'\d+', prefix)
    if len(numbers) != 1:
        raise Refusal(f'The layer of the memory {prefix!r} is not clear from its name: give the '
                      f'layers with --memory_layers.')
    return int(numbers[0])


def _understand(prefix: str, stored: dict[str, StoredTensor],
                ) -> tuple[dict[str, str], dict[str, Any]]:
    """{path in a memory here: name there} of the memory under `prefix`, and its sizes."""
    keys, values = (stored[prefix + name].shape for name in ('keys', 'values.weight'))
    half = keys[-1] if keys else 0
    sub_keys = math.isqrt(values[0]) if len(values) == 2 else 0
    heads = math.prod(keys[:-1]) // (2 * sub_keys) if sub_keys else 0
    if not heads or sub_keys ** 2 != values[0] or keys not in (
            (heads, 2, sub_keys, half), (2 * heads * sub_keys, half)):
        raise Refusal(f'{prefix}keys {keys} and {prefix}values.weight {values} fit neither '
                      f'layout of a memory with a square number of slots.')
    mlp, norm = prefix + 'query_proj.query_mlps.0.', prefix + 'query_proj.query_mlps.1.'
    query = mlp if mlp + 'weight' in stored else prefix + 'query_proj.'
    known = {'codebooks': prefix + 'keys', 'values': prefix + 'values.weight',
             'query/kernel': query + 'weight', 'query/bias': query + 'bias'}
    batch = norm + 'running_mean' in stored
    if batch:
        stored.pop(norm + 'num_batches_tracked', None)
        known |= {f'query_norm/{ours}': norm + theirs for ours, theirs in BATCH_NORM.items()}
    inside = {name for name in stored if name.startswith(prefix)}
    if strange := sorted(inside - set(known.values())):
        raise Refusal(f'The memory {prefix!r} holds {strange}, which no memory here has: it '
                      f'would compute something else.')
    return known, {'sub_keys': sub_keys, 'heads': heads, 'query_width': 2 * half,
                   'query_norm': 'batch' if batch else 'none'}


def _join(config: BertConfig, backbone: ForeignModel, stored: dict[str, StoredTensor],
          origins: dict[str, str]) -> ForeignModel:
    params, statistics = expected(config)
    memory = {path: leaf for path, leaf in (params | statistics).items() if '/memory/' in path}
    made = {path: np.zeros(leaf.shape, np.float32) for path, leaf in memory.items()
            if path.endswith('/query/bias') and origins[path] not in stored}
    for path in filter(STACKED.fullmatch, memory):
        if origins[path] in stored:
            stored[origins[path]] = _reshaped(stored[origins[path]], memory[path].shape)
    wanted = {path: leaf for path, leaf in memory.items() if path not in made}
    taken, entries = take(wanted, stored, lambda path: origins.get(path, path), names.is_kernel)
    taken |= made | flatten(backbone.params)
    replaced = [path for path in taken if path not in params and path not in statistics]
    log = ConversionLog(backbone.log.taken + entries,
                        [Entry.of(path, '', array) for path, array in made.items()],
                        backbone.log.left | dict.fromkeys(stored, 'not of a memory')
                        | dict.fromkeys(replaced, 'a memory is in its place'))
    log.taken = [entry for entry in log.taken if entry.path not in replaced]
    return ForeignModel(config, unflatten({path: taken[path] for path in params}),
                        unflatten({path: taken[path] for path in statistics}), log)


def _reshaped(tensor: StoredTensor, shape: tuple[int, ...]) -> StoredTensor:
    if math.prod(tensor.shape) != math.prod(shape):
        return tensor  # refused with its own shape
    return StoredTensor(shape, tensor.dtype, lambda: tensor.read().reshape(shape))

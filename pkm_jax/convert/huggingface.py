"""Hugging Face BERT folders to our parameters, and back.

A folder holds `config.json`, weights (`weights.py`) and `vocab.txt` or `tokenizer.json`. Kernels
are transposed between PyTorch and here; nothing else is changed.
"""

import dataclasses
import functools
import itertools
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from pkm_jax.convert import configuration, labels, names
from pkm_jax.convert.folders import appearing
from pkm_jax.convert.model_card import model_card
from pkm_jax.convert.tensors import (
    ConversionLog,
    Entry,
    ForeignModel,
    StoredTensor,
    assemble,
    expected,
    flatten,
)
from pkm_jax.convert.weights import SHARD_BYTES, open_weights, write_weights
from pkm_jax.data.vocabulary import Vocabulary
from pkm_jax.models.bert import HEADS, BertConfig
from pkm_jax.refusal import Refusal

# Buffers of PyTorch modules that hold nothing learnt.
BUFFERS = re.compile(r'.*\.(position_ids|token_type_ids|num_batches_tracked)')
# A word embedding, and what stands before its name.
WORDS = re.compile(r'(.*?)(?:bert\.)?embeddings\.word_embeddings\.weight')
# What torch.compile, FSDP and activation checkpointing put anywhere within names.
WRAPPERS = re.compile(r'_orig_mod\.|_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.')
LAYER = re.compile(r'bert\.encoder\.layer\.(\d+)\.')
DECODER = 'cls.predictions.decoder.'
MODELING = Path(__file__).with_name('modeling_pkm_bert.py')


def load(folder: str | Path, allow_unused: bool = False) -> ForeignModel:
    """The model in a Hugging Face BERT folder, with those heads whose weights it holds.

    Reads old names (`gamma`, `beta`) and names with or without their `bert.` prefix, and those that
    wrappers put before them (`module.`, `_orig_mod.`, `model.`). Of an architecture with another
    head, the encoder is taken.
    Raises:
      Refusal: the folder, its config.json, its weights or one of their shards is absent or damaged;
        the model is not BERT; a tensor is missing, has another shape, holds numbers that are not
        finite, or has a name that is not understood (these are left with `allow_unused`).
    """
    folder = Path(folder)
    config = configuration.read(folder / 'config.json')
    stored, left = _canonical(_unwrapped(open_weights(folder)))
    _leave_unknown_head(configuration.unknown_head(folder / 'config.json'), stored, left)
    _check_layers(config.layers, stored, folder)
    config = configuration.with_heads(config, stored, names.huggingface)
    if 'mlm' in config.output_heads:
        tied = _settle_decoder(stored, left, config.tied)
        config = dataclasses.replace(config, tied=tied)
    return assemble(config, stored, names.huggingface, names.is_kernel, left, allow_unused)


def _unwrapped(found: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The tensors without what wrappers put before their names: all that the word embedding has.

    Raises Refusal where there are several word embeddings: which model is meant is not known.
    """
    found = {WRAPPERS.sub('', name): tensor for name, tensor in found.items()}
    prefixes = [match[1] for match in map(WORDS.fullmatch, found) if match]
    if len(prefixes) > 1:
        raise Refusal(f'the weights hold {len(prefixes)} models, {prefixes}: leave the tensors of '
                      f'one.')
    prefix = prefixes[0] if prefixes else ''
    return {name.removeprefix(prefix): tensor for name, tensor in found.items()}


def _check_layers(layers: int, stored: dict[str, StoredTensor], folder: Path) -> None:
    """Refuses another number of layers than there are, before a model of that many is planned."""
    numbers = [int(match[1]) for match in map(LAYER.match, stored) if match]
    if layers > (found := max(numbers, default=-1) + 1):
        raise Refusal(f'{folder / "config.json"} has num_hidden_layers = {layers}, but the weights '
                      f'are of {found}: one of them is of another model.')


def _leave_unknown_head(architecture: str, stored: dict[str, StoredTensor],
                        left: dict[str, str]) -> None:
    """Sets aside the weights of a head that is not known here."""
    if architecture:
        for name in [name for name in stored if not name.startswith(('bert.', 'cls.'))]:
            left[name] = f'of the head of {architecture}'
            del stored[name]
        logging.warning('%s: its head is not known here, and left; the encoder is taken.',
                        architecture)


def _canonical(found: dict[str, StoredTensor]) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tensors under today's names with the `bert.` prefix, and the buffers, which are left."""
    stored, left = {}, {}
    for name, tensor in found.items():
        today = re.sub(r'LayerNorm\.gamma$', 'LayerNorm.weight', name)
        today = re.sub(r'LayerNorm\.beta$', 'LayerNorm.bias', today)
        if today.startswith(('embeddings.', 'encoder.', 'pooler.')):
            today = f'bert.{today}'
        if BUFFERS.fullmatch(today):
            left[name] = 'a buffer, nothing learnt'
        elif today in stored:
            raise Refusal(f'{name!r} and another tensor are both {today!r} by today\'s names.')
        else:
            stored[today] = tensor
    return stored, left


def _settle_decoder(stored: dict[str, StoredTensor], left: dict[str, str], tied: bool) -> bool:
    """Drops what the MLM head holds twice; whether it predicts with the word embedding.

    As in transformers, a decoder that differs from the word embedding is untied whatever the
    configuration says, and where the decoder has a bias, that is the one in use.
    """
    weight, bias = DECODER + 'weight', DECODER + 'bias'
    if bias in stored:
        stored['cls.predictions.bias'] = stored.pop(bias)
        left['cls.predictions.bias'] = f'{bias} is the one in use'
    embedding = stored.get('bert.embeddings.word_embeddings.weight')
    if not tied or weight not in stored or embedding is None:
        return tied
    if np.array_equal(stored[weight].read(), embedding.read()):
        del stored[weight]
        left[weight] = 'the word embedding once more'
        return True
    logging.warning('%s differs from the word embedding: untied, though the configuration says '
                    'tied.', weight)
    return False


def save(folder: str | Path, config: BertConfig, params: dict, statistics: dict, *,
         vocabulary: Vocabulary | None = None, run: dict[str, Any] | None = None,
         evaluation: dict[str, Any] | None = None,
         shard_bytes: int = SHARD_BYTES) -> ConversionLog:
    """Writes a folder that transformers loads: with memory, its modelling file travels along.

    `run` is the config.json of the run that trained it, for label names and the model card;
    `evaluation` what these weights reached, for the card. The folder appears whole or not at all.
    Heads in `params` that `config` does not name are left. Files have at most `shard_bytes`; a
    larger value table is split into blocks of rows. `params` may hold tables that are not in memory
    (`np.memmap`): they are read a block at a time.

    Raises:
      Refusal: there is such a folder, the parameters are not those of `config`, or no architecture
        has its heads.
    """
    folder = Path(folder)
    leaves, log = _leaves(config, params, statistics)
    stored, table_rows = {}, []
    for path, leaf in leaves.items():
        if path.endswith('/memory/values'):
            table_rows = _row_blocks(leaf, shard_bytes)
            stored |= _split(names.huggingface(path), leaf, table_rows)
        else:
            stored[names.huggingface(path)] = _outward(path, leaf)
    if not config.tied and 'mlm' in config.output_heads:
        stored[DECODER + 'bias'] = stored['cls.predictions.bias']
    content = configuration.write(config, table_rows, labels.described(config, run or {}))
    if not config.output_heads:
        logging.warning('The model has no pooler: transformers will say that it makes a new one.')
    if configuration.architecture_of(config) == 'BertModel':
        stored = {name.removeprefix('bert.'): tensor for name, tensor in stored.items()}
    with appearing(folder) as partial:
        _write_json(partial / 'config.json', content)
        if config.memory_layers:
            shutil.copy(MODELING, partial)
        if vocabulary:
            vocabulary.save(partial, config.max_length)
        (partial / 'README.md').write_text(model_card(content, run or {}, evaluation),
                                           encoding='utf-8')
        write_weights(partial, stored, shard_bytes)
        log.taken += [Entry.of(path, names.huggingface(path), leaf)
                      for path, leaf in leaves.items()]
    return log


def _leaves(config: BertConfig, params: dict, statistics: dict,
            ) -> tuple[dict[str, Any], ConversionLog]:
    """Parameters and statistics of `config` by path, checked; the others are heads, and left."""
    found = flatten(params) | flatten(statistics)
    shapes = {path: leaf.shape for tree in expected(config) for path, leaf in tree.items()}
    for path, shape in shapes.items():
        if path not in found:
            raise Refusal(f'The parameters lack {path}, which the configuration asks for.')
        if found[path].shape != shape:
            raise Refusal(f'{path} has shape {found[path].shape}, but the configuration asks '
                          f'for {shape}.')
    others = [path for path in found if path not in shapes]
    if strange := [path for path in others if path.split('/')[0] not in HEADS]:
        raise Refusal(f'The configuration knows no parameters {strange[:5]}.')
    log = ConversionLog(left=dict.fromkeys(others, 'of a head that was not asked for'))
    return {path: found[path] for path in shapes}, log


def _outward(path: str, leaf: Any) -> StoredTensor:
    flip = names.is_kernel(path)
    return StoredTensor(leaf.shape[::-1] if flip else leaf.shape, np.dtype(leaf.dtype),
                        lambda: np.asarray(leaf).T if flip else np.asarray(leaf))


def _row_blocks(table: Any, shard_bytes: int) -> list[int]:
    """Rows of each block of a value table, so that no block exceeds `shard_bytes`."""
    rows, width = table.shape
    most = max(1, shard_bytes // (width * np.dtype(table.dtype).itemsize))
    return [min(most, rows - start) for start in range(0, rows, most)]


def _split(name: str, table: Any, rows: list[int]) -> dict[str, StoredTensor]:
    stops = itertools.accumulate(rows)

    def read(stop: int, count: int) -> np.ndarray:
        return np.asarray(table[stop - count:stop])

    return {f'{name}.{i}': StoredTensor((count, table.shape[1]), np.dtype(table.dtype),
                                        functools.partial(read, stop, count))
            for i, (stop, count) in enumerate(zip(stops, rows, strict=True))}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + '\n', encoding='utf-8')

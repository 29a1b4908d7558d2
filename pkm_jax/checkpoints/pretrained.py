"""Weights pretrained elsewhere, loaded into a model that has memories they do not know."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from pkm_jax.checkpoints import store
from pkm_jax.checkpoints.arrays import StoredArray
from pkm_jax.checkpoints.store import State
from pkm_jax.configuration.folder import read_description
from pkm_jax.configuration.resolve import model_of
from pkm_jax.convert import foreign, labels
from pkm_jax.data import tokenizer
from pkm_jax.data.files import expand
from pkm_jax.models.bert import HEADS, BertConfig
from pkm_jax.models.interface import ModelConfig, flatten, path_of
from pkm_jax.refusal import Refusal


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """Weights to start from: {'params/…' or 'statistics/…': array}, and the model that had them.

    Those of a checkpoint are read when they are asked for, so that a table need fit on no host.
    """
    name: str
    weights: Mapping[str, np.ndarray | StoredArray]
    model: ModelConfig
    vocabulary: Path | None     # the folder of it, beside the weights
    described: dict[str, Any]   # the sections of a run's config.json: also of a Hugging Face folder
                                # whose head says what its task was


def vocabulary_of(source: str) -> str:
    """The vocabulary beside the weights of `source`; '' without a source.

    Raises:
      Refusal: the source is no folder, or has no vocabulary.
    """
    if not source:
        return ''
    folder = Path(expand(source))
    if not folder.is_dir():
        raise Refusal(f'init_from = {source!r} is no folder: give a run, one of its checkpoints or '
                      f'a Hugging Face BERT folder.')
    path = _vocabulary_beside(folder)
    if path is None:
        raise Refusal(f'init_from = {source!r} has no tokenizer.json or vocab.txt: put it there, '
                      f'or name it by --config.data.vocab. Words must keep their indices.')
    return str(path)


def open_pretrained(source: str) -> Pretrained:
    """The weights of one of our runs or checkpoints, or of a Hugging Face folder.

    Raises:
      Refusal: there are none, or they are damaged or of another architecture.
    """
    folder = Path(expand(source))
    described = _beside(folder, 'config.json')
    if described is None:
        raise Refusal(f'init_from = {source!r} has no config.json: it is neither a run nor a '
                      f'Hugging Face folder.')
    config, vocabulary = read_description(described.parent), _vocabulary_beside(folder)
    if 'model' not in config:       # not one of ours
        found = foreign.load(folder)
        weights = flatten({'params': found.params, 'statistics': found.statistics})
        return Pretrained(source, weights, found.config, vocabulary,
                          labels.of_run(folder, found.config))
    checkpoint = store.whole(store.of_run(folder))
    weights = store.read_weights(checkpoint)
    return Pretrained(str(checkpoint), weights, model_of(config), vocabulary, config)


def model_of_weights(model: Any, weights: Mapping[str, Any]) -> Any:
    """A model's description with what its weights alone tell: words, and of a BERT heads and
    classes."""
    words = weights['/'.join(['params', *map(str, model.word_embedding)])].shape[0]
    told: dict[str, Any] = {'vocab_size': words}
    if isinstance(model, BertConfig):
        heads = {name.split('/')[1] for name in weights if name.startswith('params/')}
        told |= {'output_heads': tuple(head for head in HEADS if head in heads),
                 'tied': 'params/mlm/decoder' not in weights}
        for head in {'classifier', 'token_classifier'} & heads:
            told['classes'] = weights[f'params/{head}/kernel'].shape[1]
    return dataclasses.replace(model, **told)


def check_fits(
    pretrained: Pretrained, state: State, config: ModelConfig, vocab_path: str,
) -> None:
    """Refuses weights that do not fit the abstract `state` of a model, or its vocabulary.

    Raises:
      Refusal: nothing has a name in common, or sizes or words differ; every mismatch is named.
    """
    own, weights = _named(state), pretrained.weights
    words = '/'.join(['params', *map(str, config.word_embedding)])
    rows = weights[words].shape[0] if words in weights else config.vocab_size
    if config.vocab_size != rows:
        raise Refusal(f'The vocabulary has {config.vocab_size:,} words, but init_from = '
                      f'{pretrained.name} has embeddings of {rows:,}: set --config.data.vocab to '
                      f'the vocabulary that it was trained with, or, where that has fewer words '
                      f'than embeddings, --config.model.vocab_size={rows}.')
    if pretrained.vocabulary and vocab_path and (
            tokenizer.load(pretrained.vocabulary) != tokenizer.load(vocab_path)):
        raise Refusal(f'{vocab_path} and {pretrained.vocabulary} hold other words, or in another '
                      f'order: the embeddings of init_from would go to the wrong ones.')
    taken = sorted(own.keys() & weights.keys())
    problems = [f'{name}: {weights[name].shape} there, {own[name].shape} here'
                for name in taken if weights[name].shape != own[name].shape]
    there, here = pretrained.model.unseen(), config.unseen()
    problems += [f'model.{name}: {there.get(name)} there, {here[name]} here'
                 for name in here if there.get(name) != here[name]]
    if problems or not taken:
        raise Refusal(f'init_from = {pretrained.name} does not fit the configured model: '
                      f'{"; ".join(problems) or "no parameter has a name in common"}. Set '
                      f'--config.model to its sizes.')


def load_pretrained(
    pretrained: Pretrained, state: State, say: Callable[[str], None] = print,
) -> State:
    """`state` with every parameter and statistic that checked weights have; says which."""
    own, weights = _named(state), pretrained.weights
    say(f'init_from {pretrained.name}')
    for title, names, arrays in (('taken', own.keys() & weights.keys(), own),
                                 ('new', own.keys() - weights.keys(), own),
                                 ('left', weights.keys() - own.keys(), weights)):
        shapes = {name.partition('/')[2]: arrays[name].shape for name in sorted(names)}
        say(f'{title}:\n{parameter_table(shapes)}' if names else f'{title}: nothing')

    def place(path, leaf):
        name = path_of(path)
        if name not in weights:
            return leaf
        array = weights[name]
        return jax.make_array_from_callback(     # the part of each device alone
            leaf.shape, leaf.sharding, lambda part: np.asarray(array[part]).astype(leaf.dtype))

    placed = jax.tree_util.tree_map_with_path(place, _stored(state))
    return state._replace(**{field: placed[stored] for stored, field in store.MODEL.items()})


def parameter_table(shapes: dict[str, tuple[int, ...]]) -> str:
    """A line per parameter, the layers that share its shape together, and the total."""
    merged: dict[tuple, list] = {}
    for path, shape in shapes.items():
        parts = path.split('/')
        layer = parts[1] if parts[0] == 'layers' else None
        name = path if layer is None else '/'.join(['layers', '*', *parts[2:]])
        merged.setdefault((name, shape), []).append(layer)
    lines, total = [], 0
    for (name, shape), layers in merged.items():
        size = len(layers) * int(np.prod(shape, dtype=np.int64))
        total += size
        note = '' if layers == [None] else f'  layers {",".join(layers)}'
        lines.append(f'{name:44} {shape!s:>18} {size:>14,}{note}')
    return '\n'.join([*lines, f'{"parameters":44} {"":>18} {total:>14,}'])


def _stored(state: State) -> dict[str, Any]:
    return {stored: getattr(state, field) for stored, field in store.MODEL.items()}


def _named(state: State) -> dict[str, Any]:
    return flatten(_stored(state))


def _vocabulary_beside(folder: Path) -> Path | None:
    return next((place for place in _places(folder) if tokenizer.find(place)), None)


def _beside(folder: Path, name: str) -> Path | None:
    """The file of that name in a folder, or in the run that the folder is a checkpoint of."""
    return next((place / name for place in _places(folder) if (place / name).exists()), None)


def run_of(folder: Path) -> Path:
    """The run that a folder is a checkpoint or all checkpoints of, or the folder itself."""
    folder = folder.absolute()
    if folder.name in store.FOLDERS:
        return folder.parent
    return folder.parents[1] if folder.parent.name in store.FOLDERS else folder


def _places(folder: Path) -> list[Path]:
    """A folder, and the run that it is a checkpoint of."""
    return list(dict.fromkeys([folder.absolute(), run_of(folder)]))

"""A BERT's `config.json` (or `bert_config.json`) to our `BertConfig`, and back."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pkm_jax.convert.tensors import StoredTensor
from pkm_jax.data.files import read_json
from pkm_jax.models.bert import HEADS, BertConfig
from pkm_jax.refusal import Refusal

FIELDS = {
    'vocab_size': 'vocab_size', 'layers': 'num_hidden_layers', 'width': 'hidden_size',
    'attention_heads': 'num_attention_heads', 'feed_forward_width': 'intermediate_size',
    'max_length': 'max_position_embeddings', 'segments': 'type_vocab_size',
    'dropout': 'hidden_dropout_prob', 'attention_dropout': 'attention_probs_dropout_prob',
    'norm_epsilon': 'layer_norm_eps', 'tied': 'tie_word_embeddings',
}
# What transformers calls the models with these heads of ours.
ARCHITECTURES = {
    'BertModel': ('pooler',),
    'BertForMaskedLM': ('mlm',),
    'BertForPreTraining': ('mlm', 'pooler', 'nsp'),
    'BertForSequenceClassification': ('pooler', 'classifier'),
    'BertForQuestionAnswering': ('span',),
    'BertForTokenClassification': ('token_classifier',),
}
# A weight that is there if, and only if, the head is.
HEAD_WEIGHTS = {'mlm': 'mlm/transform/kernel', 'pooler': 'pooler/kernel', 'nsp': 'nsp/kernel',
                'classifier': 'classifier/kernel', 'span': 'span/kernel',
                'token_classifier': 'token_classifier/kernel'}
# Settings that change what a BERT computes, and the only value of each that ours computes.
FIXED = {'hidden_act': 'gelu', 'position_embedding_type': 'absolute', 'is_decoder': False,
         'add_cross_attention': False}


def read(path: Path) -> BertConfig:
    """The sizes in `path`; what it leaves out has the value of BERT-base, as in transformers.

    Its heads are those that its architecture cannot be without; of an architecture with a head that
    is not known here, none.
    Raises:
      Refusal: there is no such file, it is damaged, of another model, or asks for what ours cannot
        do.
    """
    if not path.is_file():
        raise Refusal(f'{path.parent} has no {path.name}: without it the sizes of the '
                      f'model are not known. Copy it there.')
    found = read_json(path)
    _refuse_others(path, found)
    found = {'vocab_size': 30_522, **found}
    fields = {ours: found[theirs] for ours, theirs in FIELDS.items() if theirs in found}
    for name, value in fields.items():
        _check(path, FIELDS[name], value, type(getattr(BertConfig, name)))
    heads = ARCHITECTURES.get(_architecture(path, found), ())
    heads = () if heads == ARCHITECTURES['BertModel'] else heads    # its pooler may be left out
    try:
        return BertConfig(**fields, **_memory(found.get('memory')), output_heads=heads)
    except (ValueError, TypeError, KeyError) as error:
        raise Refusal(f'{path} describes no model that can be: {error}') from error


def _memory(found: dict[str, Any] | None) -> dict[str, Any]:
    """The fields of a BertConfig that an exported "memory" gives; none without one."""
    if not found:
        return {}
    if not isinstance(found, dict):
        raise TypeError('its "memory" is no object')
    sizes = {name: found[name] for name in dataclasses.asdict(BertConfig.memory) if name in found}
    return {'memory': dataclasses.replace(BertConfig.memory, **sizes),
            'memory_layers': tuple(found['layers']),
            **{name: found[name] for name in ('placement', 'zero_start', 'shared_values')}}


def unknown_head(path: Path) -> str:
    """The architecture in `path` if it has a head that is not known here, such as that of a choice
    among several texts; else ''.
    """
    name = _architecture(path, read_json(path))
    return '' if name in ARCHITECTURES or name.endswith('Model') else name


def _architecture(path: Path, found: dict[str, Any]) -> str:
    names = found.get('architectures') or ['BertModel']
    if not isinstance(names, list) or not isinstance(names[0], str):
        raise Refusal(f'{path} has architectures = {names!r}: a list with a name is expected.')
    return names[0].removeprefix('Pkm')


def _check(path: Path, name: str, value: Any, kind: type) -> None:
    is_kind = isinstance(value, (int, float) if kind is float else kind)
    fits = is_kind and isinstance(value, bool) == (kind is bool) and math.isfinite(value)
    if not fits or value < (kind is int):
        raise Refusal(f'{path} has {name} = {value!r}, which is no {kind.__name__} that a BERT '
                      f'can have.')


def _refuse_others(path: Path, found: dict[str, Any]) -> None:
    kind = found.get('model_type', 'bert')
    if kind not in ('bert', 'pkm_bert'):
        raise Refusal(f'{path} describes model_type {kind!r}, architectures '
                      f'{found.get("architectures")}: only BERT is read.')
    for name, value in FIXED.items():
        if found.get(name, value) != value:
            raise Refusal(f'{path} has {name} = {found[name]!r}: only {value!r} is supported.')


def with_heads(config: BertConfig, stored: dict[str, StoredTensor],
               name_of: Callable[[str], str]) -> BertConfig:
    """`config` with those heads too whose weights are in `stored`, and their number of classes.

    A classifier without pooler is one of tokens.
    """
    found = {head: stored[name_of(weight)] for head, weight in HEAD_WEIGHTS.items()
             if name_of(weight) in stored}
    of_tokens = 'token_classifier' in config.output_heads or 'pooler' not in found
    found.pop('classifier' if of_tokens else 'token_classifier', None)
    heads = tuple(head for head in HEADS if head in found or head in config.output_heads)
    classifiers = [found[head] for head in ('classifier', 'token_classifier') if head in found]
    classes = classifiers[0].shape[0] if classifiers else config.classes
    return dataclasses.replace(config, output_heads=heads, classes=classes)


def write(config: BertConfig, table_rows: list[int], labels: dict[str, Any]) -> dict[str, Any]:
    """The content of a `config.json` for transformers; `table_rows`: rows of each block of values;
    `labels`: what outputs are called, see `labels.described`.

    Raises:
      Refusal: no architecture of transformers has just the heads of `config`.
    """
    architecture = architecture_of(config)
    content = {theirs: getattr(config, ours) for ours, theirs in FIELDS.items()} | FIXED
    content |= {'architectures': [architecture], 'model_type': 'bert', 'dtype': 'float32',
                'pad_token_id': 0}
    content |= labels
    if config.memory_layers:
        file = 'modeling_pkm_bert.Pkm'
        content |= {
            'architectures': ['Pkm' + architecture], 'model_type': 'pkm_bert',
            'auto_map': {'AutoConfig': f'{file}BertConfig', 'AutoModel': f'{file}BertModel'},
            'memory': dataclasses.asdict(config.memory) | {
                'layers': list(config.memory_layers), 'placement': config.placement,
                'zero_start': config.zero_start, 'shared_values': config.shared_values,
                'table_rows': table_rows},
        }
        content['auto_map'] |= {
            name.replace('Bert', 'AutoModel'): file + name
            for name in ARCHITECTURES if name.startswith('BertFor')}
    return content


def architecture_of(config: BertConfig) -> str:
    """The class of transformers with the heads of `config`; without any, BertModel."""
    for name, heads in ARCHITECTURES.items():
        if set(config.output_heads) in ({*heads}, set()):
            return name
    raise Refusal(f'No BERT of transformers has just the heads {config.output_heads}; there are '
                  f'{ARCHITECTURES}. Choose among the heads with --heads.')

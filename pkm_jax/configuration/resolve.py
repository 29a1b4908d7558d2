"""A configuration file with the command line's changes, to a `Run` and back: in one place, once."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import ml_collections
from ml_collections import config_dict

from pkm_jax.configuration.ablation import Ablation
from pkm_jax.configuration.run import Distributed, Log, Parts, Run, Tables, Train
from pkm_jax.data.files import expand
from pkm_jax.memory.layer import MemoryConfig
from pkm_jax.models.bert import BertConfig
from pkm_jax.models.causal import CausalConfig
from pkm_jax.refusal import Refusal
from pkm_jax.tasks.causal_lm import CausalLM
from pkm_jax.tasks.classification import Classification
from pkm_jax.tasks.glue import Glue
from pkm_jax.tasks.masked_lm import MaskedLM
from pkm_jax.tasks.question_answering import QuestionAnswering
from pkm_jax.tasks.token_classification import TokenClassification

MODELS = {'bert': BertConfig, 'causal': CausalConfig}
TASKS = {'masked_lm': MaskedLM, 'causal_lm': CausalLM, 'classification': Classification,
         'glue': Glue, 'question_answering': QuestionAnswering,
         'token_classification': TokenClassification}
# Fields of a model that the section `memory` holds, by what they are called there.
PLACEMENT = {'layers': 'memory_layers', 'placement': 'placement', 'zero_start': 'zero_start',
             'shared_values': 'shared_values'}
# Fields of a model that its task or its weights decide, not a configuration.
DECIDED = ('memory', *PLACEMENT.values(), 'output_heads', 'classes')
TOP = ('workdir', 'init_from', 'seed', 'compilation_cache')
PATHS = ('workdir', 'init_from', 'compilation_cache')


def defaults(model: str = 'bert', task: str = 'masked_lm') -> ml_collections.ConfigDict:
    """A configuration with every field at its default: what configurations start from."""
    family = MODELS[model]
    tree = {name: _default(Run, name) for name in TOP}
    tree |= {'task': task, 'runs': {}, 'ablation': _defaults(Ablation)}
    tree |= {'model': {'family': model, **_defaults(family, DECIDED)}}
    tree |= {'memory': {**_defaults(MemoryConfig), **{
        name: _default(family, field) for name, field in PLACEMENT.items()}, **_defaults(Tables)}}
    tree['memory']['shards'] = _defaults(Parts)
    tree |= {'data': _defaults(TASKS[task]), 'train': _defaults(Train),
             'distributed': _defaults(Distributed), 'log': _defaults(Log)}
    return _config(tree)


def runs_of(config: ml_collections.ConfigDict) -> list[Run]:
    """The runs that a configuration asks for, in order: itself, or one for each of `runs`.

    The changes of a run may name an earlier one in `init_from`.

    Raises:
      Refusal: a field cannot work; the message names it, its value and the remedy.
    """
    if 'finetune' in config:
        raise Refusal('This configuration is one of fine-tuning: python -m pkm_jax.finetune takes '
                      'it.')
    if is_ablation(config):
        raise Refusal('This configuration has a section ablation: python -m pkm_jax.ablate takes '
                      'it.')
    if not config.runs:
        return [resolve(config.to_dict())]
    runs = []
    for name, changes in config.runs.items():
        one = config.copy_and_resolve_references()
        one.runs = ml_collections.ConfigDict()
        one.update(changes)
        one.workdir = str(Path(config.workdir) / name)
        if one.init_from in config.runs:
            one.init_from = str(Path(config.workdir) / one.init_from)
        runs.append(resolve(one.to_dict(), name))
    return runs


def is_ablation(config: ml_collections.ConfigDict) -> bool:
    """Whether its section `ablation` asks for anything: see `cells.cells_of`.

    Raises:
      Refusal: a field of the section cannot work.
    """
    return section_of(Ablation, config.ablation.to_dict(), 'ablation') != Ablation()


def resolve(config: dict[str, Any], name: str = '', model: Any = None, task: Any = None) -> Run:
    """The run of a configuration, or of a run's config.json; fields left out have their defaults.

    `model` and `task`: where they are made already, and not described.

    Raises:
      Refusal: a field is unknown or cannot work; the message names it, its value and the remedy.
    """
    top: dict[str, Any] = {field: config[field] for field in TOP if field in config}
    top |= {field: expand(top[field]) for field in PATHS if isinstance(top.get(field), str)}
    return Run(
        model=model or model_of(config), name=name or Path(str(top.get('workdir', ''))).name,
        task=task or task_of(config),
        tables=_tables(config['memory']), train=section_of(Train, config.get('train'), 'train'),
        distributed=section_of(Distributed, config.get('distributed', {}), 'distributed'),
        log=section_of(Log, config.get('log'), 'log'),
        **top)


def task_of(config: dict[str, Any]) -> Any:
    """The task that a configuration names, with its section `data`.

    Raises:
      Refusal: see `resolve`.
    """
    kind = _chosen(TASKS, 'task', config.get('task', 'masked_lm'))
    return section_of(kind, config.get('data'), 'data')


def model_of(config: dict[str, Any]) -> Any:
    """The model in the sections `model` and `memory` of a configuration.

    Raises:
      Refusal: see `resolve`.
    """
    model, memory = dict(config['model']), config['memory']
    family = _chosen(MODELS, 'model.family', model.pop('family', 'bert'))
    return section_of(family, {**model, **memory_of(memory)}, 'model')


def memory_of(section: dict[str, Any]) -> dict[str, Any]:
    """The fields of a model that the section `memory` holds.

    Raises:
      Refusal: a size is impossible.
    """
    sizes = {field.name: section[field.name] for field in dataclasses.fields(MemoryConfig)
             if field.name in section}
    placed = {field: section[name] for name, field in PLACEMENT.items() if name in section}
    return {name: tuple(value) if isinstance(value, list) else value
            for name, value in placed.items()} | {'memory': MemoryConfig(**sizes)}


def described(run: Run) -> dict[str, Any]:
    """A run as plain values in the sections of a configuration: its config.json."""
    tree = dataclasses.asdict(run)
    del tree['name']
    tables, data = tree.pop('tables'), tree.pop('task')
    del tree['model']
    sections = described_model(run.model)
    sections['memory'] |= tables
    return json.loads(json.dumps(
        tree | {'task': _name_of(TASKS, run.task), **sections, 'data': data}))


def described_model(model: Any) -> dict[str, dict[str, Any]]:
    """The sections `model` and `memory` that describe a model."""
    sizes = dataclasses.asdict(model)
    memory = sizes.pop('memory', {})
    memory |= {name: sizes.pop(field) for name, field in PLACEMENT.items() if field in sizes}
    return {'model': {'family': _name_of(MODELS, model), **sizes}, 'memory': memory}


def _name_of(named, value):
    return next((name for name, kind in named.items() if type(value) is kind), type(value).__name__)


def _chosen(named, field, value):
    if not isinstance(value, str) or value not in named:
        raise Refusal(f'{field} = {value!r} is none of {tuple(named)}.')
    return named[value]


def _tables(memory):
    found = {name: memory[name] for name in ('updates', 'dead_after', 'drift_tokens')
             if name in memory}
    return Tables(**found, shards=section_of(Parts, memory.get('shards', {}), 'memory.shards'))


def section_of(kind: type, values: Any, name: str) -> Any:
    """A dataclass of a section's values, lists as tuples.

    Raises:
      Refusal: it is no section, has no such field, or a value cannot work.
    """
    if not isinstance(values, dict):
        raise Refusal(f'{name} = {values!r} is no section of fields.')
    known = {field.name for field in dataclasses.fields(kind)}
    if unknown := sorted(values.keys() - known):
        raise Refusal(f'{name}.{unknown[0]} is no field of {kind.__name__}: it has '
                      f'{", ".join(sorted(known))}.')
    return kind(**{key: tuple(value) if isinstance(value, list) else value
                   for key, value in values.items()})


def _defaults(kind, without=()):
    return {field.name: _plain(field.default) for field in dataclasses.fields(kind)
            if field.name not in without}


def _default(kind, name):
    return next(field.default for field in dataclasses.fields(kind) if field.name == name)


def _plain(value):
    return dataclasses.asdict(value) if isinstance(value, MemoryConfig | Parts) else value


def _config(tree):
    config = ml_collections.ConfigDict(sort_keys=False)
    for name, value in tree.items():
        config[name] = (_config(value) if isinstance(value, dict) else
                        config_dict.placeholder(bool) if value is None else value)
    return config

"""A configuration of `pkm_jax.finetune`, and the runs that it asks for once data are read."""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_collections

from pkm_jax.configuration.resolve import defaults, memory_of, resolve, section_of
from pkm_jax.configuration.run import Run
from pkm_jax.data.files import expand
from pkm_jax.data.labelled import Labelled
from pkm_jax.fields import check_settings, setting
from pkm_jax.models.bert import BertConfig
from pkm_jax.models.interface import ModelConfig
from pkm_jax.refusal import Refusal
from pkm_jax.tasks.finetuning import FinetuningTask

# Fields of a model that its weights leave open.
MODEL = ('dropout', 'attention_dropout', 'dtype', 'remat')
# Fields of a run that follow from the data and the schedule.
FOUND = {'train': ('steps', 'warmup'),
         'log': ('eval_every', 'eval_at_start', 'eval_batches', 'checkpoint_every')}


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How long, how often and over which grid a model is fine-tuned."""
    epochs: float = setting(3., 'passes over the training data', above=0)
    warmup: float = setting(0.1, 'share of the steps in which the learning rate rises', least=0,
                            below=1)
    evaluations: int = setting(1, 'of each epoch; the best weights are kept', least=1)
    seeds: tuple[int, ...] = setting((0,), 'one run for each: of the head, dropout and the order')
    learning_rates: tuple[float, ...] = setting(
        (), 'one run for each, of all seeds; (): train.learning_rate')

    def __post_init__(self) -> None:
        check_settings(self, 'finetune')
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise Refusal(f'finetune.seeds = {self.seeds}: give one or more, each once.')


def finetuning_defaults(task: str) -> ml_collections.ConfigDict:
    """A configuration with every field at its default: what configurations start from.

    Batches, learning rate, epochs, warmup and decay are those that run_glue is known by.
    """
    config = defaults('bert', task)
    del config.seed, config.ablation
    config.model = ml_collections.ConfigDict({name: config.model[name] for name in MODEL})
    for section, names in FOUND.items():
        for name in names:
            del config[section][name]
    config.finetune = ml_collections.ConfigDict(
        {field.name: field.default for field in dataclasses.fields(Schedule)})
    config.train.update(batch=32, learning_rate=2e-5, values_learning_rate=2e-4, weight_decay=0.,
                        epsilon=1e-8)
    config.log.update(every=50, keep=1, norms_every=0)      # there is a program for each bucket
    return config


def each(config: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """A configuration by name for each of its `runs`, in folders of these names; itself without
    any.

    Raises:
      Refusal: it is one of pretraining.
    """
    if 'finetune' not in config:
        raise Refusal('This configuration is one of pretraining: python -m pkm_jax.pretrain takes '
                      'it.')
    if not config['runs']:
        yield '', config
    for name, changes in config['runs'].items():
        one = config | {'runs': {}, 'workdir': str(Path(config['workdir']) / name)}
        for section, values in changes.items():
            one[section] = {**config[section], **values} if isinstance(values, dict) else values
        yield name, one


def schedule_of(config: dict[str, Any]) -> Schedule:
    """Epochs, seeds and learning rates of a configuration.

    Raises:
      Refusal: a value is out of its range.
    """
    return section_of(Schedule, config['finetune'], 'finetune')


def runs_of(config: dict[str, Any], task: FinetuningTask, data: Labelled,
            source: ModelConfig) -> list[Run]:
    """A run for each learning rate and seed; several in folders of their own below the workdir.

    `task` knows its data, `source` is the model of the weights to start from.

    Raises:
      Refusal: settings cannot work; the message names them.
    """
    schedule = schedule_of(config)
    rates = schedule.learning_rates or (config['train']['learning_rate'],)
    grid = [(rate, seed) for rate in rates for seed in schedule.seeds]
    model = task.head(model_of(config, source)).with_vocabulary(data.vocab_size)
    per_epoch = -(-data.num_records('train') // config['train']['batch'])
    steps = max(1, math.ceil(per_epoch * schedule.epochs))
    found = {name: dict(value) if isinstance(value, dict) else value
             for name, value in config.items() if name not in ('finetune', 'model', 'runs')}
    found['train'] |= dict(steps=steps, warmup=min(int(steps * schedule.warmup), steps - 1),
                           best=config['train']['best'] or task.metric)
    every = max(1, per_epoch // schedule.evaluations)
    found['log'] |= dict(
        eval_every=every, checkpoint_every=every, eval_at_start=bool(model.memories),
        eval_batches=-(-data.num_records('validation') // config['train']['batch']))
    runs = []
    for rate, seed in grid:
        name = '-'.join([f'lr{rate:g}'] * (len(rates) > 1) + [f'seed{seed}'] * (
            len(schedule.seeds) > 1))
        folder = str(Path(expand(config['workdir'])) / name)
        one = found | {'seed': seed, 'workdir': folder,
                       'train': found['train'] | {'learning_rate': rate}}
        runs.append(dataclasses.replace(resolve(one, model=model, task=task), name=name or Path(
            folder).name))
    return runs


def model_of(config: dict[str, Any], source: ModelConfig) -> BertConfig:
    """The model of the weights, with what the configuration sets of it: a memory too, if it places
    one where the weights have none.

    Raises:
      Refusal: settings cannot work, or place another memory than the weights have.
    """
    if not isinstance(source, BertConfig):
        raise Refusal(f'Only a BERT can be fine-tuned, and the weights are those of {source}.')
    placed = memory_of(config['memory'])
    own = {name: config['model'][name] for name in MODEL}
    if placed['placement'] == 'none':
        return dataclasses.replace(source, **own)
    if source.memory_layers and any(getattr(source, name) != value
                                    for name, value in placed.items()):
        raise Refusal(f'The weights have a memory in layers {source.memory_layers}, '
                      f'{source.placement!r}, of another kind than the section memory places: '
                      f"leave memory.placement = 'none' to fine-tune the one they have.")
    return dataclasses.replace(source, **own, **placed)

"""From a configuration to the model it describes, refusing what cannot run before anything starts."""

import dataclasses
import json
import math
import traceback
from pathlib import Path

import ml_collections

from pkm_jax.data.masking import predictions_per_record
from pkm_jax.memory.layer import MemoryConfig
from pkm_jax.models.bert import BertConfig
from pkm_jax.training.plan import make_plan

# What may differ between the runs that share a folder: where things are, not what they are.
FREE = ('log', 'workdir', 'distributed', 'memory.shards', 'train.split_backbone', 'model.remat',
        'data.corpus', 'data.cache', 'data.workers')    # the data's content is compared on its own


def is_refusal(error: Exception) -> bool:
    """Whether this package raised an error, to be shown without its traceback."""
    place = traceback.extract_tb(error.__traceback__)[-1].filename
    return Path(__file__).parents[1] in Path(place).parents


def model_config(config: ml_collections.ConfigDict, vocab_size: int) -> BertConfig:
    """The BERT of a configuration (configs/bert_base_pkm.py) over a vocabulary of `vocab_size`.

    Raises:
      ValueError: a size is impossible; see BertConfig and MemoryConfig.
    """
    memory = config.memory.to_dict()
    sizes = {field.name: memory[field.name] for field in dataclasses.fields(MemoryConfig)}
    model = config.model.to_dict()
    rows = model.pop('vocab_size') or vocab_size
    if rows < vocab_size:
        raise ValueError(f'model.vocab_size = {rows:,} rows of the word embedding, but the '
                         f'vocabulary has {vocab_size:,} words: set it to 0 or to more.')
    return BertConfig(
        vocab_size=rows, memory=MemoryConfig(**sizes), memory_layers=tuple(memory['layers']),
        placement=memory['placement'], zero_start=memory['zero_start'],
        shared_values=memory['shared_values'], **model)


def check(config: ml_collections.ConfigDict, devices: int, processes: int = 1) -> None:
    """Refuses, by name and with the numbers, what would fail or mislead later.

    Raises:
      ValueError: the first field that cannot work.
    """
    model = model_config(config, vocab_size=config.model.vocab_size or config.data.vocab_size)
    data, train, log = config.data, config.train, config.log
    _check_ranges(config)
    part = train.batch // train.accumulate
    if train.batch % train.accumulate:
        raise ValueError(f'train.batch = {train.batch} does not divide into '
                         f'train.accumulate = {train.accumulate} parts.')
    if part % devices:
        raise ValueError(f'A batch of {part} sequences (train.batch = {train.batch} / '
                         f'train.accumulate = {train.accumulate}) does not divide over {devices} '
                         f'devices: choose a multiple of {devices * train.accumulate}.')
    if train.batch % processes:
        raise ValueError(f'train.batch = {train.batch} does not divide over {processes} processes.')
    shards = make_plan(config, model, devices).shards
    if train.split_backbone:
        for name in ('width', 'feed_forward_width'):
            if config.model[name] % shards.data:
                raise ValueError(f'train.split_backbone: model.{name} = {config.model[name]} does '
                                 f'not divide over the {shards.data} replicas of the value tables.')
    if data.length > config.model.max_length:
        raise ValueError(f'data.length = {data.length} exceeds model.max_length = '
                         f'{config.model.max_length}: shorten one or enlarge the other.')
    if train.warmup >= train.steps:
        raise ValueError(f'train.warmup = {train.warmup} must be less than train.steps = '
                         f'{train.steps}.')
    needed = predictions_per_record(data.length, data.mask_rate)
    if data.max_predictions < needed:
        raise ValueError(f'data.max_predictions = {data.max_predictions}, but data.mask_rate = '
                         f'{data.mask_rate} masks up to {needed} of {data.length} tokens: set it to '
                         f'{needed} or more.')
    first, last = log.profile
    if (first, last) != (0, 0) and not 1 <= first <= last <= train.steps:
        raise ValueError(f'log.profile = {(first, last)} must be (0, 0), or a first and a last step '
                         f'within 1..{train.steps}.')
    if not corpora(config):
        raise ValueError("data.corpus is empty: give globs of text files, a prepared folder, "
                         "'tfds:NAME' or 'installed-docs'.")
    if '://' in config.workdir:
        raise ValueError(f'workdir = {config.workdir!r}: runs are written to folders; mount the '
                         f'bucket and give its path.')


def _check_ranges(config):
    """Refuses the first number that is out of its range, by name."""
    above_zero, shares, others = math.nextafter(0, 1), math.nextafter(1, 0), math.inf
    for name, least, most in (
            ('train.steps', 1, others), ('train.batch', 1, others), ('train.accumulate', 1, others),
            ('train.warmup', 0, others), ('train.learning_rate', 0, others),
            ('train.values_learning_rate', 0, others), ('train.weight_decay', 0, others),
            ('train.clip', 0, others), ('train.beta1', 0, shares), ('train.beta2', 0, shares),
            ('train.epsilon', above_zero, others), ('data.length', 8, others),
            ('data.max_predictions', 1, others), ('data.mask_rate', above_zero, shares),
            ('data.validation_fraction', above_zero, shares), ('data.workers', 0, others),
            ('log.every', 1, others), ('log.eval_every', 1, others),
            ('log.eval_batches', 1, others), ('log.checkpoint_every', 1, others),
            ('log.keep', 1, others), ('memory.dead_after', 0, others), ('seed', 0, 2 ** 32 - 1)):
        *section, field = name.split('.')
        value = (config[section[0]] if section else config)[field]
        if not least <= value <= most:
            bounds = {0: '0 or more', 1: '1 or more', 8: '8 or more',
                      above_zero: 'above 0'}[least]
            if most < others:
                bounds += ' and below 1' if most < 1 else f' and at most {most}'
            raise ValueError(f'{name} = {value} must be {bounds}.')


def corpora(config: ml_collections.ConfigDict) -> str | list[str]:
    """data.corpus, or its globs where it holds several, separated by commas."""
    globs = [glob.strip() for glob in config.data.corpus.split(',') if glob.strip()]
    return globs[0] if len(globs) == 1 else globs


def runs_of(config: ml_collections.ConfigDict) -> list[tuple[str, ml_collections.ConfigDict]]:
    """The runs that a configuration asks for, in order: itself, or one for each of `runs`.

    The changes of a run may name an earlier one in `init_from`.
    """
    if not config.runs:
        return [('', config)]
    runs = []
    for name, changes in config.runs.items():
        run = config.copy_and_resolve_references()
        run.runs = ml_collections.ConfigDict()
        run.update(changes)
        run.workdir = str(Path(config.workdir) / name)
        if run.init_from in config.runs:
            run.init_from = str(Path(config.workdir) / run.init_from)
        runs.append((name, run))
    return runs


def run_folder(config: ml_collections.ConfigDict) -> Path:
    """The folder of a run, whether it is there yet or not.

    Raises:
      ValueError: it holds the run of another configuration (FREE may differ).
    """
    folder = Path(config.workdir)
    path = folder / 'config.json'
    if path.exists():
        found = _flat(json.loads(path.read_text()))
        differences = [f'{name}: {found.get(name)!r} there, {value!r} here'
                       for name, value in _flat(json.loads(config.to_json())).items()
                       if found.get(name) != value]
        if differences:
            raise ValueError(f'{folder} holds the run of another configuration: '
                             f'{"; ".join(differences)}. Choose another --config.workdir, or remove '
                             f'that folder.')
    return folder


def describe_run(config: ml_collections.ConfigDict, folder: Path) -> None:
    """Makes a run's folder and writes its config.json, whole."""
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / 'config.json.part'
    unfinished.write_text(json.dumps(json.loads(config.to_json()), indent=1) + '\n')
    unfinished.replace(folder / 'config.json')


def _flat(config: dict, prefix: str = '') -> dict[str, object]:
    """{'train.batch': 32, …} of everything that a resumed run must share."""
    flat = {}
    for name, value in config.items():
        if prefix + name in FREE:
            continue
        if isinstance(value, dict):
            flat.update(_flat(value, f'{prefix}{name}.'))
        else:
            flat[prefix + name] = value
    return flat

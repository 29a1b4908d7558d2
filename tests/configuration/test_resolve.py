"""Every shipped configuration is possible, and impossible ones are refused by name."""

import dataclasses
import json

import pytest

from configs import (
    ablation,
    bert_base_pkm,
    bert_base_pkm_pod,
    bert_large,
    causal_pkm,
    quickstart,
)
from pkm_jax.configuration import command_line
from pkm_jax.configuration.ablation import Ablation
from pkm_jax.configuration.resolve import MODELS, TASKS, described, resolve, runs_of
from pkm_jax.configuration.run import Distributed, Log, Parts, Run, Tables, Train
from pkm_jax.memory.layer import MemoryConfig
from pkm_jax.refusal import Refusal
from pkm_jax.training.layout import lay_out

ABLATIONS = [f'init={init},placement={placement},scale={scale}' for scale in ('base', 'small')
             for init in ('scratch', 'pretrained') for placement in ('none', 'replace', 'add')]


@pytest.mark.parametrize('config', [
    bert_base_pkm.get_config(), bert_base_pkm_pod.get_config(), bert_large.get_config(),
    quickstart.get_config(), causal_pkm.get_config(), causal_pkm.get_config('placement=replace'),
    *map(ablation.get_config, ABLATIONS)])
def test_shipped_configurations_pass(config):
    for run in runs_of(config):
        lay_out(run, devices=8)


def test_every_file_in_configs_is_tested_here():
    assert set(command_line.shipped()) == {
        'ablation', 'bert_base_pkm', 'bert_base_pkm_pod', 'bert_large', 'causal_pkm', 'quickstart',
        'ablation_grid',                        # in test_cells.py
        'text', 'glue', 'squad', 'conll'}       # in test_finetuning.py


def test_the_paper_in_numbers():
    config = runs_of(bert_base_pkm.get_config())[0].model
    assert (config.layers, config.width, config.memory.slots) == (12, 768, 262_144)
    assert (config.memory.heads, config.memory.top_k, config.placement) == (4, 32, 'add')


def test_ablation_arguments():
    config = ablation.get_config('init=pretrained,placement=replace,layers=3+7')
    assert config.memory.layers == (3, 7) and config.memory.placement == 'replace'
    assert config.init_from == 'runs/ablation/scratch-none'
    assert config.workdir == 'runs/ablation/pretrained-replace-3+7'
    assert ablation.get_config('init=scratch,placement=none').memory.layers == ()
    assert ablation.get_config('init=scratch,placement=none').workdir == 'runs/ablation/scratch-none'
    for wrong in ('init=none', 'width=3', 'placement=beside', 'layers=x'):
        with pytest.raises(ValueError, match=wrong.replace('layers=x', "layers='x'")):
            ablation.get_config(wrong)


def test_runs_of_the_quickstart(config):
    runs = {run.name: run for run in runs_of(quickstart.get_config())}
    first = runs.pop('pretrain')
    assert first.model.placement == 'none' and not first.model.memories
    crossed = {(run.model.placement, run.init_from) for run in runs.values()}
    assert len(runs) == 4 and crossed == {
        (placement, start) for placement in ('replace', 'add') for start in ('', first.workdir)}
    assert len({run.train.steps for run in runs.values()}) == 1
    assert {tuple(run.model.memories) for run in runs.values()} == {(1,)}
    assert [run.name for run in runs_of(config)] == ['run']


def test_a_run_described_resolves_to_itself(config):
    for one in (config, bert_base_pkm_pod.get_config()):
        run, = runs_of(one)
        assert resolve(described(run)) == run


def test_every_field_says_what_it_is_for():
    kinds = [Run, Ablation, Tables, Parts, Train, Distributed, Log, MemoryConfig, *MODELS.values(),
             *TASKS.values()]
    without = [f'{kind.__name__}.{field.name}' for kind in kinds
               for field in dataclasses.fields(kind)
               if 'help' not in field.metadata and not dataclasses.is_dataclass(field.default)
               and field.name not in ('model', 'task')]
    assert without == []


@pytest.mark.parametrize('section, changes, message', [
    ('train', {'batch': 30}, r'batch of 30 .* over 8 devices: choose a multiple of 8'),
    ('train', {'batch': 32, 'gradient_accumulation_steps': 8}, r'batch of 4 .* over 8 devices: .* multiple of 64'),
    ('train', {'gradient_accumulation_steps': 3}, r'train.batch = 16 .* micro-batches'),
    ('train', {'steps': 0}, r'train.steps = 0'),
    ('train', {'warmup': 6}, r'train.warmup = 6 must be less than train.steps = 6'),
    ('memory', {'top_k': 7}, r'memory.top_k = 7 .* memory.sub_keys is 6'),
    ('memory', {'query_width': 7}, r'memory.query_width = 7'),
    ('memory', {'layers': (2,)}, r'memory.layers = \(2,\).*model.layers = 2'),
    ('memory', {'placement': 'beside'}, r"'beside'"),
    ('model', {'width': 15}, r'model.width = 15'),
    ('data', {'length': 17}, r'data.length = 17 exceeds model.max_length = 16'),
    ('data', {'mask_rate': 0.}, r'data.mask_rate = 0.0 must be above 0 and below 1'),
    ('data', {'validation_fraction': 0.}, r'data.validation_fraction = 0'),
    ('data', {'max_predictions': 2}, r'data.max_predictions = 2, .* up to 3 of 16'),
    ('train', {'beta1': 1.}, r'train.beta1 = 1.0'),
    ('train', {'learning_rate': -1.}, r'train.learning_rate = -1.0'),
    ('model', {'attention_heads': 0}, r'model.attention_heads = 0'),
    ('model', {'dtype': 'bf16'}, r"model.dtype = 'bf16'"),
    ('log', {'profile': (3, 2)}, r'log.profile = \(3, 2\)'),
    ('memory', {'heads': 0}, r'memory.heads = 0 must be 1 or more'),
    ('train', {'optimizer': 'lion'}, r"train.optimizer = 'lion' is none of"),
    ('model', {'dropout': .999999}, r'model.dropout'),
    ('memory', {'value_dropout': .999999}, r'memory.value_dropout'),
    ('log', {'every': 0}, r'log.every = 0'),
])
def test_impossible_settings_are_refused(config, section, changes, message):
    config[section].update(changes)
    with pytest.raises(Refusal, match=message):
        lay_out(runs_of(config)[0], devices=8)


def test_a_batch_must_divide_over_processes(config):
    with pytest.raises(Refusal, match='train.batch = 16 .* 3 processes'):
        lay_out(runs_of(config)[0], devices=8, processes=3)


@pytest.mark.parametrize('place, value, message', [
    (('task',), [], r'task = \[\] is none of'), (('log',), 3, 'log = 3 is no section of fields'),
    (('memory', 'shards'), [], r'memory.shards = \[\] is no section of fields'),
])
def test_sections_of_another_type_are_refused(config, place, value, message):
    """A config.json is a file like others: not what the command line has checked."""
    found = json.loads(json.dumps(config.to_dict()))
    resolve(found)
    section = found
    for name in place[:-1]:
        section = section[name]
    section[place[-1]] = value
    with pytest.raises(Refusal, match=message):
        resolve(found)

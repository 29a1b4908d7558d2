"""Every shipped configuration is possible, and impossible ones are refused by name."""

import sys
from pathlib import Path

import pytest
from absl import flags
from ml_collections import config_flags

from configs import ablation, bert_base_pkm, bert_base_pkm_pod, bert_large, quickstart
from pkm_jax.training import settings

ABLATIONS = [f'init={init},placement={placement},scale={scale}' for scale in ('base', 'small')
             for init in ('scratch', 'pretrained') for placement in ('none', 'replace', 'add')]


@pytest.mark.parametrize('config', [
    bert_base_pkm.get_config(), bert_base_pkm_pod.get_config(), bert_large.get_config(),
    quickstart.get_config(),
    *map(ablation.get_config, ABLATIONS)])
def test_shipped_configurations_pass(config):
    config.data.corpus = config.data.corpus or 'corpus/*.txt'
    for _, run in settings.runs_of(config):
        settings.check(run, devices=8)


def test_every_file_in_configs_is_tested_here():
    assert {path.stem for path in Path('configs').glob('*.py')} == {
        'ablation', 'bert_base_pkm', 'bert_base_pkm_pod', 'bert_large', 'quickstart'}


def test_the_paper_in_numbers():
    config = settings.model_config(bert_base_pkm.get_config(), vocab_size=30522)
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
    runs = dict(settings.runs_of(quickstart.get_config()))
    assert list(runs) == ['pretrain', 'add', 'replace']
    assert runs['pretrain'].memory.placement == 'none' and runs['pretrain'].memory.layers == ()
    assert runs['add'].init_from == runs['pretrain'].workdir == 'runs/quickstart/pretrain'
    assert runs['replace'].init_from == '' and runs['replace'].memory.placement == 'replace'
    assert runs['add'].memory.layers == runs['replace'].memory.layers != ()
    assert settings.runs_of(config) == [('', config)]


@pytest.mark.parametrize('section, changes, message', [
    ('train', {'batch': 30}, r'batch of 30 .* over 8 devices: choose a multiple of 8'),
    ('train', {'batch': 32, 'accumulate': 8}, r'batch of 4 .* over 8 devices: .* multiple of 64'),
    ('train', {'accumulate': 3}, r'train.batch = 16 does not divide into train.accumulate = 3'),
    ('train', {'steps': 0}, r'train.steps = 0'),
    ('train', {'warmup': 6}, r'train.warmup = 6 must be less than train.steps = 6'),
    ('memory', {'top_k': 7}, r'memory.top_k = 7 .* sub_keys is 6'),
    ('memory', {'query_width': 7}, r'memory.query_width = 7'),
    ('memory', {'layers': (2,)}, r'memory_layers = \(2,\).*model.layers = 2'),
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
    ('data', {'corpus': ''}, r'data.corpus is empty'),
    ('log', {'every': 0}, r'log.every = 0'),
])
def test_impossible_settings_are_refused(config, section, changes, message):
    config[section].update(changes)
    with pytest.raises(ValueError, match=message):
        settings.check(config, devices=8)


def test_a_batch_must_divide_over_processes(config):
    with pytest.raises(ValueError, match='train.batch = 16 .* 3 processes'):
        settings.check(config, devices=8, processes=3)


def parse(monkeypatch, *arguments):
    """What an entry point makes of its command line."""
    values = flags.FlagValues()
    monkeypatch.setattr('sys.argv', ['test', *arguments])
    config_flags.DEFINE_config_file('config', flag_values=values)
    values(sys.argv)
    return values.config


def test_the_command_line_overrides_a_configuration(monkeypatch):
    config = parse(monkeypatch, '--config=configs/ablation.py:placement=replace,scale=small',
                   '--config.memory.layers=(0,2)', '--config.train.steps=7')
    assert config.memory.placement == 'replace'
    assert config.memory.layers == (0, 2) and config.train.steps == 7
    assert settings.runs_of(config)[0][1].train.steps == 7


def test_an_unknown_field_is_refused(monkeypatch):
    with pytest.raises(AttributeError, match='learning_ratio'):
        parse(monkeypatch, '--config=configs/quickstart.py', '--config.train.learning_ratio=1')

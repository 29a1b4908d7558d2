"""The flag --config: shipped names, files, and fields set beside them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags
from ml_collections import config_flags

from configs import quickstart
from pkm_jax.configuration import command_line
from pkm_jax.configuration.resolve import runs_of
from pkm_jax.refusal import Refusal

ROOT = Path(__file__).parents[2]


def parse(monkeypatch, *arguments):
    """What an entry point makes of its command line."""
    values = flags.FlagValues()
    monkeypatch.setattr('sys.argv', ['test', *arguments])
    config_flags.DEFINE_config_file('config', flag_values=values)
    values(sys.argv)
    return values.config


def test_the_command_line_overrides_a_configuration(monkeypatch):
    config = parse(monkeypatch, f'--config={ROOT}/configs/ablation.py:placement=replace,scale=small',
                   '--config.memory.layers=(0,1)', '--config.train.steps=70',
                   '--config.data.lowercase=False')
    run, = runs_of(config)
    assert run.model.placement == 'replace' and run.model.memory_layers == (0, 1)
    assert run.train.steps == 70 and run.task.lowercase is False


def test_shipped_names_and_paths():
    assert command_line.locate('ablation:init=scratch') == (
        f'{command_line.SHIPPED}/ablation.py:init=scratch')
    assert command_line.locate(f'{ROOT}/configs/quickstart.py') == f'{ROOT}/configs/quickstart.py'
    with pytest.raises(Refusal, match='there is no .*quicksart.py.* one of ablation, ablation_grid, bert_base'):
        command_line.locate('quicksart')
    with pytest.raises(Refusal, match='there is no mine/other.py'):
        command_line.locate('mine/other.py')


@pytest.mark.parametrize('argument, nearest', [
    ('--config.train.learning_ratio=1', 'train.learning_rate'),
    ('--config.model.heads=2', 'model.attention_heads'),
    ('--config.train.accumulate=2', 'train'), ('--noconfig.model.remaat', 'model.remat')])
def test_unknown_fields_are_refused_with_those_nearest(argument, nearest):
    with pytest.raises(Refusal, match=f'no such field: did you mean .*{nearest}'):
        command_line.check_fields([argument], quickstart.get_config())


def test_known_fields_pass():
    command_line.check_fields(
        ['--config=quickstart', '--config.train.steps=3', '--noconfig.model.remat',
         '--config.runs.pretrained_add.init_from=x', '--config.runs.scratch_replace.memory.placement=add',
         '--config.memory.shards.rows=2'],
        quickstart.get_config())


@pytest.mark.parametrize('argument, said', [
    ('--config.runs.scratch_add.train.steps=3',
     "of the run 'scratch_add' only what .*: init_from, memory, memory.placement. --config"),
    ('--config.runs.ad.train.steps=3', "no run 'ad'; those of this configuration: pretrain, scratch_rep")])
def test_of_a_run_what_it_sets_can_be_changed(argument, said):
    with pytest.raises(Refusal, match=said):
        command_line.check_fields([argument], quickstart.get_config())


@pytest.mark.parametrize('arguments, said', [
    (['--config=quickstart', '--config.train.steps=0'],
     'Not trained: train.steps = 0 must be 1 or more.'),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in [
        (['--config=nothing'], 'Not started: --config=nothing: there is no'),
        (['--config=quickstart', '--nonsense=1'],
         "Not started: Unknown command line flag 'nonsense'"),
        ([], 'Not started: give --config, a path or one of ablation'),
        (['--config=quickstart', '--config.train.stepz=1'],
         'Not started: --config.train.stepz: there is no such field: did you mean train.steps'),
        (['--config=ablation:init=none'], "Not started: configs/ablation.py: 'init=none' is none of"),
        (['--config=quickstart', '--config.train.steps=abc'],
         "Not started: --config.train.steps=abc: 'abc' is no int."),
        (['--config=quickstart', '--config.memory.layers=abc'],
         "Not trained: memory.layers = ('abc',): each must be an int."),
        (['--config=quickstart', '--config.log.profile=3'],
         'Not trained: log.profile = (3,) must be of the type tuple[int, int].'),
        (['--config=quickstart', 'train.steps=3'],
         'Not started: train.steps=3: no option takes this')])])
def test_a_wrong_command_line_is_one_line(arguments, said, tmp_path):
    """From any folder; no traceback."""
    ran = subprocess.run([sys.executable, '-m', 'pkm_jax.pretrain', *arguments], cwd=tmp_path,
                         env={**os.environ, 'PYTHONPATH': str(ROOT)}, capture_output=True,
                         text=True, check=False)
    assert ran.returncode == 2 and ran.stderr.strip().startswith(said), ran.stderr
    assert len(ran.stderr.strip().splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize('module, options', [
    ('convert_checkpoint', ['--from=a', '--to=b']), ('finetune', ['--config=text']),
    ('replay', ['--config=quickstart']),
    ('compile_check', ['--config=quickstart', '--topology=h200:8'])])
def test_no_program_ignores_what_is_no_option(module, options, tmp_path):
    ran = subprocess.run([sys.executable, '-m', f'pkm_jax.{module}', *options, 'stray'],
                         cwd=tmp_path, env={**os.environ, 'PYTHONPATH': str(ROOT)},
                         capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr.strip()) == (
        2, 'Not started: stray: no option takes this; options begin with "--".')


def test_arguments_for_a_configuration_that_takes_none():
    with pytest.raises(Refusal, match='bert_base_pkm.py:layers=2: this configuration takes no arg'):
        command_line._configuration(f'{ROOT}/configs/bert_base_pkm.py:layers=2')


@pytest.mark.parametrize('arguments', [['--help'], ['--config=quickstart', '--helpshort']])
def test_help_is_no_failure(arguments, capsys):
    with pytest.raises(SystemExit) as ending:
        command_line.parse(['program', *arguments])
    assert ending.value.code == 0 and capsys.readouterr().out

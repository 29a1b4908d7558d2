"""launch/sky.sh and sky.yaml: what is planned, launched, and run on the node."""

import itertools
import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from pkm_jax.refusal import ExitStatus

ROOT = Path(__file__).parents[2]
WORDS = ('--config=bert_base_pkm', "--config.data.corpus=/bucket/a b/*.txt,it's")
TASK = yaml.safe_load((ROOT / 'launch' / 'sky.yaml').read_text())
GIVEN = ('--name=one', '--accelerators=tpu-v6e-8', '--bucket=gs://mine')


@pytest.fixture
def sky(launch):
    return lambda *words, **rest: launch('sky.sh', *words, **rest)


def envs(call):
    return dict(word.split('=', 1) for option, word in itertools.pairwise(call) if option == '--env')


def test_a_run_is_planned_then_launched(sky, plan, read):
    dry, wet = sky('--dry-run', *GIVEN, '--retry-until-up', *WORDS), sky(*GIVEN, '--retry-until-up', *WORDS)
    assert (dry.status, dry.called, wet.called) == (0, [], read(dry.printed))
    planned, launched = wet.called
    assert planned == plan('tpu-v6e-8', *WORDS)
    assert launched[:7] == ['sky', 'jobs', 'launch', '--yes', '--name=one', '--gpus=tpu-v6e-8', '--use-spot']
    assert launched[-2:] == ['--retry-until-up', str(ROOT / 'launch' / 'sky.yaml')]
    assert envs(launched).keys() == TASK['envs'].keys()


@pytest.mark.parametrize('what, topology, accelerator', [
    ('tpu-v5litepod-8', 'tpu-v5litepod-8', 'tpu'), ('H100:8', 'h100:8', 'cuda'), ('H200', 'h200:1', 'cuda'),
    ('A100-80GB:4', 'a100:4', 'cuda')])
def test_accelerators_are_planned_by_their_names(sky, plan, what, topology, accelerator):
    planned, launched = sky('--name=one', f'--accelerators={what}', '--on-demand', '--price=2', *WORDS,
                            BUCKET='ours').called
    assert planned == plan(topology, '--price=2', *WORDS)
    assert '--no-use-spot' in launched and envs(launched)['ACCELERATOR'] == accelerator
    assert envs(launched)['BUCKET'] == 'gs://ours'


def test_the_node_gets_every_word(sky, tmp_path):
    """What SkyPilot would run there, run here."""
    python = tmp_path / '.venv' / 'bin' / 'python'
    python.parent.mkdir(parents=True)
    python.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@"; exit 143\n')
    python.chmod(0o755)
    done = subprocess.run(['bash', '-c', TASK['run']], cwd=tmp_path, text=True, capture_output=True,
                          env=os.environ | envs(sky(*GIVEN, *WORDS).called[1]))
    assert done.stdout.splitlines() == ['-m', 'pkm_jax.pretrain', *WORDS, '--config.log.hang_exit=True', '--config.workdir=/bucket/runs/one',
                                        '--config.data.cache=/bucket/data',
                                        '--config.compilation_cache=/bucket/compiled']
    assert done.returncode == 143       # SkyPilot goes by it
    subprocess.run(['bash', '-n', '-c', TASK['setup']], check=True)


def test_what_ends_for_good_is_not_recovered():
    recovery = TASK['resources']['job_recovery']
    again = recovery['recover_on_exit_codes']
    assert recovery['max_restarts_on_errors'] == 0 and {143, ExitStatus.HUNG} <= set(again)
    assert not {ExitStatus.REFUSED, ExitStatus.DIVERGED, ExitStatus.OUT_OF_MEMORY} & set(again)


@pytest.mark.parametrize('words, rest, status, said', [
    ((*GIVEN, *WORDS), {'answers': {'planner': 'exit 5'}}, 2, 'does not fit'),
    ((*GIVEN, *WORDS), {'answers': {'sky': 'echo "No resource satisfying" >&2; exit 1'}}, 1, 'No resource'),
    ((*GIVEN, *WORDS), {'lacking': ['sky']}, 2, 'no sky on PATH: pip install'),
    (GIVEN, {}, 2, 'Give --config='), (GIVEN[1:] + WORDS, {}, 2, 'Give --name=NAME'),
    (('--name=one', *WORDS), {}, 2, 'Give --accelerators='), (GIVEN[:2] + WORDS, {}, 2, 'or set BUCKET'),
    ((*GIVEN, 'more', *WORDS), {}, 2, 'as --name=value'),
    ((*GIVEN, '--secret=TOKEN=geheim', *WORDS), {}, 2, 'a secret is named')])
def test_what_hinders_a_launch_is_said(sky, words, rest, status, said):
    ended = sky(*words, **rest)
    assert ended.status == status and said in ended.errors and 'geheim' not in ended.errors
    assert not ended.called or ended.called[-1][0] != 'sky' or status == 1


def test_help_names_every_option(sky):
    script = (ROOT / 'launch' / 'sky.sh').read_text()
    options = re.findall(r'^        (--[a-z-]+)=?\*?\)', script, re.M)
    assert len(options) == 9
    for name in set(options) - {'--config'}:
        assert re.search(rf'^  {name}\b', sky('--help').printed, re.M), name

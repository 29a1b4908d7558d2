"""Which runs may go on in a folder."""

import dataclasses
import json

import pytest

from pkm_jax.configuration import folder
from pkm_jax.configuration.resolve import described, runs_of
from pkm_jax.refusal import Refusal


@pytest.fixture
def run(config):
    one, = runs_of(config)
    folder.describe(one)
    return one


def changed(run, **train):
    return dataclasses.replace(run, train=dataclasses.replace(run.train, **train))


def test_the_same_run_goes_on(run):
    assert folder.check_same_run(run) == ''
    assert folder.read_description(run.folder) == described(run)


def test_more_steps_are_allowed_on_purpose_and_fewer_are_not(run):
    said = folder.check_same_run(changed(run, steps=12))
    assert 'raised from 6 to 12' in said
    with pytest.raises(Refusal, match='train.steps: 6 there, 4 here'):
        folder.check_same_run(changed(run, steps=4))


def test_another_run_is_refused_by_name(run):
    with pytest.raises(Refusal, match=r'train.batch: 16 there, 32 here; train.clip: 1.0 there, 2'):
        folder.check_same_run(changed(run, batch=32, clip=2.))


def test_runs_of_before_go_on(run):
    """Names of fields have changed, and some have come since."""
    before = described(run)
    before['train']['accumulate'] = before['train'].pop('gradient_accumulation_steps')
    before['train']['split_backbone'] = before['train'].pop('fsdp')
    for section, name in (('train', 'optimizer'), ('model', 'family'), ('data', 'encoding')):
        del before[section][name]
    del before['task'], before['compilation_cache']
    before['runs'] = {}
    path = run.folder / 'config.json'
    path.write_text(json.dumps(before))
    assert folder.check_same_run(run) == ''
    before['train']['accumulate'] = 4
    path.write_text(json.dumps(before))
    with pytest.raises(Refusal, match='train.gradient_accumulation_steps: 4 there, 1 here'):
        folder.check_same_run(run)


@pytest.mark.parametrize('content', ['{"model": {', '[1, 2]', '\x00\x01'])
def test_a_damaged_description_is_named(run, content):
    (run.folder / 'config.json').write_text(content)
    with pytest.raises(Refusal, match='config.json is damaged'):
        folder.check_same_run(run)

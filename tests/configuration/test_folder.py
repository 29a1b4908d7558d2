"""Which runs may go on in a folder."""

import dataclasses
import errno
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
    assert ('train.gradient_accumulation_steps is changed from 4 to 1'
            in folder.check_same_run(run))


def test_a_run_from_before_values_had_an_epsilon_goes_on_with_the_one_it_had(run):
    before = described(run)
    del before['train']['values_epsilon']
    (run.folder / 'config.json').write_text(json.dumps(before))
    with pytest.raises(Refusal, match=r'train.values_epsilon: 0.0 there, 1e-10 here. Set what it'):
        folder.check_same_run(run)
    assert folder.check_same_run(changed(run, values_epsilon=0.)) == ''


@pytest.mark.parametrize('content', ['{"model": {', '[1, 2]', '\x00\x01', '{"model": {}, "memory": 3}'])
def test_a_damaged_description_is_named(run, content):
    (run.folder / 'config.json').write_text(content)
    with pytest.raises(Refusal, match=r'run/config.json is damaged .*: restore it .* or remove it'):
        folder.check_same_run(run)


def test_a_lost_description_is_said_where_there_are_checkpoints(run):
    (run.folder / 'config.json').unlink()
    assert folder.check_same_run(run) == ''
    (run.folder / 'checkpoints' / '3').mkdir(parents=True)
    assert 'has checkpoints and no config.json' in folder.check_same_run(run)


@pytest.mark.parametrize('error, said', [
    (OSError(errno.ENOSPC, '', '/run/metrics.jsonl'), '/run/metrics.jsonl: No space left'),
    (ValueError("Failed to write 3 bytes: [os_error_code='122']"), 'Disk quota exceeded'),
    (ValueError('[OS error 30: EROFS]'), 'Read-only file system'),
    (ValueError('shapes differ'), '')])
def test_what_the_storage_says_is_found_in_any_librarys_error(error, said):
    outer = RuntimeError('a thread failed')
    outer.__cause__ = error
    assert folder.storage_fault(outer).startswith(said)
    assert said or folder.storage_fault(outer) == ''


def test_faults_of_the_storage_are_refused_in_one_line_and_others_are_not(tmp_path):
    for error in (OSError(errno.ENOSPC, ''), OSError(errno.EACCES, '', str(tmp_path / 'a')),
                  OSError(errno.EACCES, '', str(tmp_path.parent))):
        with pytest.raises(Refusal, match='finished checkpoints are whole'):
            with folder.written_or_named(tmp_path):
                raise error
    with pytest.raises(PermissionError):
        with folder.written_or_named(tmp_path):
            raise OSError(errno.EACCES, '', '/elsewhere')

"""Runs read back from their folders."""

import json

import numpy as np
import pytest

from pkm_jax.refusal import Refusal
from pkm_jax.report.runs import read_run, read_runs, smoothed, thousands
from tests.report.synthetic_runs import make_run


@pytest.mark.parametrize(
    'init_from', ['pretrain/checkpoints/60', '/elsewhere/pretrain/checkpoints/60']
)
def test_run_continued_from_an_earlier_checkpoint_starts_there(small, init_from):
    path = small / init_from  # an absolute path replaces `small`: the work folder was moved
    config = json.loads((small / 'add' / 'config.json').read_text()) | {'init_from': str(path)}
    (small / 'add' / 'config.json').write_text(json.dumps(config))
    added = read_runs(small)[1]
    assert (added.parent, added.start_step, added.start_tokens) == ('pretrain', 60, 60 * 2048)


def test_steps_written_again_after_a_resume_count_once(tmp_path):
    run = make_run(tmp_path / 'run')
    again = {'kind': 'train', 'step': 61, 'tokens': 61 * 2048, 'loss': 1.5}
    with (run / 'metrics.jsonl').open('a') as file:
        file.write(json.dumps(again) + '\n')
    train = read_run(run).train
    assert [record['step'] for record in train] == list(range(1, 62))
    assert train[-1]['loss'] == 1.5


@pytest.mark.parametrize('changes', [
    {'kind': ['train']}, {'step': '61'}, {'loss': None}, {'time': {}}, {'memory': []}])
def test_lines_with_values_of_another_type_are_refused(tmp_path, changes):
    run = make_run(tmp_path / 'run')
    line = {'kind': 'train', 'step': 61, 'tokens': 61 * 2048, 'loss': 1.5, **changes}
    with (run / 'metrics.jsonl').open('a') as file:
        file.write(json.dumps(line) + '\n')
    with pytest.raises(Refusal, match=f': {next(iter(changes))} is .*: not a metrics line'):
        read_run(run)


def test_smoothed_is_an_unbiased_running_mean():
    np.testing.assert_allclose(smoothed(np.full(200, 3.0)), 3.0)
    np.testing.assert_allclose(
        smoothed(np.array([1.0, 4.0]), share=1.0), [1.0, (0.5 * 1 + 4) / 1.5]
    )


@pytest.mark.parametrize(
    ('number', 'text'),
    [
        (950, '950'),
        (999.7, '1k'),
        (65_536, '65.5k'),
        (2_100_000, '2.1M'),
        (1.4e9, '1.4B'),
        (0, '0'),
    ],
)
def test_thousands(number, text):
    assert thousands(number) == text

"""metrics.jsonl after kills and damage, and TensorBoard's file beside it."""

import json
import re

import numpy as np
import pytest

from pkm_jax.training.metrics_file import MetricsFile
from pkm_jax.training.run_log import RunLog
from tests.training.events import scalars


def line(kind, step):
    return {'kind': kind, 'step': step, 'tokens': step * 10, 'time': 1e9 + step,
            'loss': 1 / (step + 1), 'norms': {'values': step / 2}}


def write(path, steps):
    """Lines as training writes them, each second step; returns what a checkpoint then knows."""
    file = MetricsFile(path, 0, 2)
    file.append(line('start', 0))
    for step in range(2, steps + 1, 2):
        file.append(line('train', step))
    file.append(line('eval', steps))
    file.close()
    return file.state


def steps(path, kind='train'):
    return [found['step'] for found in map(json.loads, path.read_text().splitlines())
            if found['kind'] == kind]


def reopen(path, step, known, every=2):
    """What is found wrong where a run goes on."""
    first = MetricsFile(path, step, every, known)
    first.close()
    again = MetricsFile(path, step, every, first.state)
    again.close()
    assert again.state == first.state and not again.notes
    return ' '.join(first.notes)


def test_what_came_after_the_checkpoint_is_cut_and_half_a_line_too(tmp_path):
    path = tmp_path / 'metrics.jsonl'
    known = write(path, 6)
    before = path.read_bytes()
    path.write_bytes(before + json.dumps(line('train', 8)).encode() + b'\n{"kind": "train", "st')
    assert reopen(path, 6, known) == ''
    assert path.read_bytes() == before


@pytest.mark.parametrize('damage, kept, said', [
    (lambda lines: [], [], '0 of its 7 lines can be read and are kept; lines are missing of steps '
                           '1 to 10'),
    (lambda lines: lines[:3], [2, 4], '3 of its 7 .* missing of steps 5 to 10'),
    (lambda lines: lines[:3] + lines[4:], [2, 4, 8, 10], 'missing between steps 4 and 8'),
    (lambda lines: [*lines[:2], '{"kind": "tr', *lines[3:]], [2, 6, 8, 10],
     'missing between steps 2 and 6'),
    (lambda lines: [text.replace('"loss": 0.2', '"loss": 0.3') for text in lines],
     [2, 4, 6, 8, 10], 'some were changed'),
    (lambda lines: ['{"kind": [], "step": 2}', '{"kind": "train", "step": "2"}', *lines],
     [2, 4, 6, 8, 10], '7 of its 7 .* some were changed'),
    (lambda lines: lines + lines, [2, 4, 6, 8, 10], ''),
], ids=['deleted', 'halved', 'a line lost', 'a line damaged', 'a number changed', 'of another type', 'twice'])
def test_damage_is_said_and_the_rest_is_kept(tmp_path, damage, kept, said):
    path = tmp_path / 'metrics.jsonl'
    known = write(path, 10)
    path.write_text(''.join(text + '\n' for text in damage(path.read_text().splitlines())))
    notes = reopen(path, 10, known)
    assert steps(path) == kept
    assert re.search(said, notes) if said else notes == ''


def test_a_checkpoint_of_before_knows_the_last_step_alone(tmp_path):
    path = tmp_path / 'metrics.jsonl'
    write(path, 10)
    assert reopen(path, 10, None, every=1) == ''
    path.write_text(''.join(path.read_text().splitlines(keepends=True)[:-2]))
    assert 'missing of steps 9 to 10' in reopen(path, 10, None)


def test_kills_before_the_first_checkpoint_leave_one_beginning(tmp_path, capsys):
    for _ in range(3):
        log = RunLog(tmp_path, 'run', 0, 10)
        log.begin(parameters=123)
        log.write('train', 1, 10, loss=1.)
        log.close()
    assert steps(tmp_path / 'metrics.jsonl', 'start') == [0]
    assert steps(tmp_path / 'metrics.jsonl') == [1]
    assert 'there is no checkpoint, though metrics.jsonl reaches step 1' in capsys.readouterr().out
    assert scalars(tmp_path / 'tensorboard') == [('start/parameters', 0, 123), ('train/loss', 1, 1)]


def test_tensorboard_says_what_the_lines_say_whatever_was_lost(tmp_path):
    """Killed without a word after each few steps, and its own file cut short."""
    random, log, known = np.random.default_rng(0), RunLog(tmp_path, 'run', 0, 40), None
    log.begin(parameters=123)
    step = saved = 0
    while step < 40:
        step += 1
        log.write('train', step, step * 10, loss=1 / step, norms={'values': step}, used=None)
        if step % 5 == 0:
            log.write('eval', step, step * 10, loss=2 / step)
            saved, known = step, log.state
        if random.random() < .2:        # killed, and started again
            log.close()
            event_file, = (tmp_path / 'tensorboard').iterdir()
            event_file.write_bytes(event_file.read_bytes()[:random.integers(1, 99)])
            log, step = RunLog(tmp_path, 'run', saved, 40, 1, known), saved
            log.begin(parameters=123)
    log.close()
    wanted = [('start/parameters', 0, 123.)]
    for step in range(1, 41):
        wanted += [('train/loss', step, np.float32(1 / step)), ('train/norms/values', step, step)]
        wanted += [('eval/loss', step, np.float32(2 / step))] * (step % 5 == 0)
    assert scalars(tmp_path / 'tensorboard') == wanted
    assert steps(tmp_path / 'metrics.jsonl') == list(range(1, 41))

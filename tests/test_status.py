"""python -m pkm_jax.status says of each run what its files say, whoever mounts them."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pkm_jax import status
from pkm_jax.checkpoints import checksums
from pkm_jax.processes import lock
from pkm_jax.refusal import ExitStatus, Refusal
from pkm_jax.training import divergence
from pkm_jax.training.run_log import RunLog


@pytest.fixture
def now():
    return time.time()


@pytest.fixture
def a_run(tmp_path, now):
    """Makes a folder as a run leaves it: lines at these seconds ago, every 10 steps of 50."""
    def make(name, lines=(), **running):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / 'config.json').write_text('{"train": {"steps": 50}}')
        log = RunLog(folder, name, 0, 50, 10)
        for number in range(1, len(lines) + 1):
            log.write('train', 10 * number, 1000 * number, loss=4 / number, tokens_per_second=5e4)
        log.close()
        path = folder / 'metrics.jsonl'
        records = [json.loads(line) | {'time': now - ago}
                   for line, ago in zip(path.read_text().splitlines(), lines)]
        path.write_text(''.join(f'{json.dumps(record)}\n' for record in records))
        if running:
            held = folder / 'running.json'
            held.write_text(json.dumps({'host': 'pod-3', 'process': 7, 'since': now - running['began']}))
            os.utime(held, (now - running['beat'],) * 2)
        return folder
    return make


@pytest.mark.parametrize('state, lines, running', [
    ('running', (60, 30), {'began': 100, 'beat': 10}),
    ('starting', (), {'began': 5000, 'beat': 10}),
    ('starting', (900, 800), {'began': 100, 'beat': 10}),       # it goes on, and has not yet
    ('running', (900, 599), {'began': 5000, 'beat': 10}),
    ('stalled', (700, 601), {'began': 5000, 'beat': 10}),
    ('running', (4000, 2000, 1990), {'began': 9000, 'beat': 10}),       # lines are usually rarer
    ('dead', (60, 30), {'began': 100, 'beat': lock.SILENT + 1}),
    ('stopped', (60, 30), {}), ('stopped', (), {}),
    ('finished', (50, 40, 30, 20, 10), {})])
def test_the_state_of_a_run(a_run, state, lines, running, now):
    found = status.status_of(a_run('one', lines, **running), now)
    assert (found.state, found.step, found.steps) == (state, 10 * len(lines), 50)
    assert found.host == ('pod-3' if running else '')


def test_a_run_that_says_where_it_hangs_is_stalled(a_run, now):
    folder = a_run('one', (60, 30), began=100, beat=10)
    (folder / 'stacks-2.txt').write_text('…')
    assert status.status_of(folder, now).state == 'stalled'
    os.utime(folder / 'stacks-2.txt', (now - 40,) * 2)      # it has taken steps since
    assert status.status_of(folder, now).state == 'running'


def test_a_run_that_gave_up_is_diverged(a_run, now):
    assert status.DIVERGED == divergence.FOLDER
    folder = a_run('one', (60, 30))
    (folder / 'diverged').mkdir()
    assert status.status_of(folder, now).state == 'diverged'
    os.utime(folder / 'diverged', (now - 40,) * 2)          # it has gone on since
    assert status.status_of(folder, now).state == 'stopped'


def test_a_living_run_is_seen_and_left_as_it_is(a_run):
    folder = a_run('one', (60, 30))
    with lock.only_run_in(folder):
        before = sorted(folder.rglob('*'))
        found = status.status_of(folder, time.time() + 10 * lock.SILENT)    # of this machine: asked for
        assert (found.state, found.host) == ('starting', os.uname().nodename)
        assert sorted(folder.rglob('*')) == before


def test_the_newest_finished_checkpoint_is_named(a_run, now):
    folder = a_run('one', (60, 30))
    for step in (10, 20, 30):
        (folder / 'checkpoints' / str(step)).mkdir(parents=True)
        for name in (*checksums.MARKERS, checksums.CHECKSUMS)[:None if step < 30 else 1]:
            (folder / 'checkpoints' / str(step) / name).write_text('{}')
    assert status.status_of(folder, now).checkpoint[0] == 20


def test_a_line_that_is_being_written_does_no_harm(a_run, monkeypatch, now):
    folder = a_run('one', (60, 30))
    with (folder / 'metrics.jsonl').open('a') as file:
        file.write('{"kind": "train", "st')
    assert status.status_of(folder, now).step == 20
    monkeypatch.setattr(status, 'TAIL', (folder / 'metrics.jsonl').stat().st_size - 5)
    assert status.status_of(folder, now).step == 20     # nor does one that is cut


def test_a_table_of_all_runs_below(a_run, tmp_path, capsys):
    a_run('sweep/a', (60, 30), began=100, beat=10)
    a_run('sweep/b', (500, 400))
    status.main([str(tmp_path)])
    headings, first, second = capsys.readouterr().out.splitlines()
    assert headings.split()[:4] == ['run', 'state', 'step', 'loss']
    assert first.split()[:6] == [str(tmp_path / 'sweep/a'), 'running', '20/50', '2.0000', '50,000', '-']
    assert second.split()[1] == 'stopped' and second.endswith('7 min ago')


def test_weights_that_were_converted_are_no_run(a_run, tmp_path, capsys):
    """They may lie beside runs; a damaged configuration is not taken for theirs."""
    runs = str(a_run('one')), str(tmp_path / 'bert_base')
    (tmp_path / 'bert_base').mkdir()
    other = tmp_path / 'bert_base/config.json'
    other.write_text('{"model": {"layers": 2}}')
    for folders in [str(tmp_path)], runs:
        status.main(folders)
        assert 'one ' in (said := capsys.readouterr().out) and 'bert_base' not in said
    for told in '{"model": {"layers": 2}}', '{"model": {"lay':
        other.write_text(told)
        with pytest.raises(SystemExit):
            status.main([runs[1]] if told.endswith('}') else runs)
        assert 'bert_base is not the folder of a run: config.json' in capsys.readouterr().err


def test_each_configuration_is_read_once(a_run, tmp_path, monkeypatch):
    """A bucket is asked for it each time, and it may change in between."""
    read_text, read = Path.read_text, []
    monkeypatch.setattr(Path, 'read_text', lambda path: read.append(path) or read_text(path))
    runs = [a_run(name) for name in ('one', 'two')]
    status.main([str(tmp_path)])
    assert [path for path in read if path.name == 'config.json'] == [
        run / 'config.json' for run in runs]


def test_the_exit_status_says_whether_all_is_well(a_run, tmp_path):
    a_run('dead', (60, 30), began=100, beat=999)
    ran = subprocess.run([sys.executable, '-m', 'pkm_jax.status', tmp_path], text=True,
                         capture_output=True)
    assert ran.returncode == ExitStatus.HUNG and ' dead ' in ran.stdout
    ran = subprocess.run([sys.executable, '-m', 'pkm_jax.status', tmp_path / 'dead/tensorboard'],
                         text=True, capture_output=True)
    assert ran.returncode == ExitStatus.REFUSED and 'holds no run' in ran.stderr


def test_a_folder_that_is_no_run_is_named(tmp_path, now):
    (tmp_path / 'config.json').write_text('{"train": 1}')
    with pytest.raises(Refusal, match=r'config.json: TypeError'):
        status.status_of(tmp_path, now)
    with pytest.raises(Refusal, match='mount its bucket'):
        status.runs_in(tmp_path / 'gs:/bucket')

"""A folder holds one run at a time."""

import json
import os
import socket
import subprocess
import sys
import time

import pytest

from pkm_jax.processes import lock
from pkm_jax.processes.lock import only_run_in
from pkm_jax.refusal import Refusal


def write(folder, **found):
    folder.mkdir(exist_ok=True)
    path = folder / 'running.json'
    path.write_text(json.dumps({'time': 'then', **found}))
    return path


def test_the_second_run_is_refused_and_the_third_is_not(tmp_path):
    with only_run_in(tmp_path):
        with pytest.raises(Refusal, match=f'in use by another run .process {os.getpid()} on'):
            with only_run_in(tmp_path):
                pass
    with only_run_in(tmp_path):
        assert (tmp_path / 'running.json').exists()
    assert not (tmp_path / 'running.json').exists()


def test_a_file_in_the_place_of_the_folder_is_named(tmp_path):
    (tmp_path / 'file').write_text('')
    for folder in ('file', 'file/below'):
        with pytest.raises(Refusal, match='workdir = .*file.* is no folder'):
            with only_run_in(tmp_path / folder):
                pass


def test_a_dead_process_is_taken_over_with_a_word(tmp_path):
    ended = subprocess.Popen([sys.executable, '-c', ''])
    ended.wait()
    write(tmp_path, host=socket.gethostname(), process=ended.pid, started='1')
    said = []
    with only_run_in(tmp_path, said.append):
        assert json.loads((tmp_path / 'running.json').read_text())['process'] == os.getpid()
    assert f'process {ended.pid}' in said[0] and 'taken' in said[0]


def test_a_number_that_another_process_has_now_is_dead(tmp_path):
    write(tmp_path, host=socket.gethostname(), process=os.getpid(), started='1')
    with only_run_in(tmp_path, lambda text: None):
        pass


def test_another_machine_lives_while_it_shows(tmp_path):
    path = write(tmp_path, host='elsewhere', process=1, started='1')
    with pytest.raises(Refusal, match='process 1 on elsewhere, since then'):
        with only_run_in(tmp_path):
            pass
    silent = time.time() - lock.SILENT - 1
    os.utime(path, (silent, silent))
    with only_run_in(tmp_path, lambda text: None):
        pass


def test_a_run_shows_that_it_lives(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, 'BEAT', .05)
    with only_run_in(tmp_path):
        os.utime(tmp_path / 'running.json', (0, 0))
        deadline = time.monotonic() + 10
        while (tmp_path / 'running.json').stat().st_mtime < 1:
            assert time.monotonic() < deadline
            time.sleep(.02)

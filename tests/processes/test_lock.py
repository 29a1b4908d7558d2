"""A folder holds one run at a time."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

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


def test_a_folder_in_which_nothing_was_left_is_removed(tmp_path):
    with pytest.raises(Refusal, match='no corpus'):
        with only_run_in(tmp_path / 'run'):
            raise Refusal('no corpus')
    assert not (tmp_path / 'run').exists()
    with only_run_in(tmp_path / 'run'):
        (tmp_path / 'run' / 'config.json').touch()
    with only_run_in(tmp_path):
        assert (tmp_path / 'run' / 'config.json').exists()
    assert tmp_path.exists()


def test_a_file_in_the_place_of_the_folder_is_named(tmp_path):
    (tmp_path / 'file').write_text('')
    for folder in ('file', 'file/below'):
        with pytest.raises(Refusal, match='workdir = .*file.* is no folder'):
            with only_run_in(tmp_path / folder):
                pass


def test_a_dead_process_is_taken_over_with_a_word(tmp_path):
    ended = subprocess.Popen([sys.executable, '-c', ''])
    ended.wait()
    write(tmp_path, host=socket.gethostname(), within=lock._within(), process=ended.pid, started='1')
    said = []
    with only_run_in(tmp_path, said.append):
        assert json.loads((tmp_path / 'running.json').read_text())['process'] == os.getpid()
    assert f'process {ended.pid}' in said[0] and 'taken' in said[0]


def test_a_dead_process_that_nobody_waited_for_is_taken_over(tmp_path):
    """As where the shell of a container started the run, and does not wait for its children."""
    script = ('import sys, time, pathlib; from pkm_jax.processes.lock import only_run_in\n'
              'with only_run_in(pathlib.Path(sys.argv[1])): print("mine", flush=True); '
              'time.sleep(60)')
    owner = subprocess.Popen([sys.executable, '-c', script, str(tmp_path)], stdout=subprocess.PIPE)
    try:
        assert owner.stdout.read(4) == b'mine'
        with pytest.raises(Refusal, match=f'in use by another run .process {owner.pid} on'):
            with only_run_in(tmp_path):
                pass
        owner.kill()
        os.waitid(os.P_PID, owner.pid, os.WEXITED | os.WNOWAIT)
        assert Path(f'/proc/{owner.pid}/stat').read_text().rpartition(')')[2].split()[0] == 'Z'
        said = []
        with only_run_in(tmp_path, said.append):
            assert f'process {owner.pid}' in said[0] and 'taken' in said[0]
    finally:
        owner.kill()
        owner.communicate()


def test_a_number_that_another_process_has_now_is_dead(tmp_path):
    write(tmp_path, host=socket.gethostname(), within=lock._within(), process=os.getpid(), started='1')
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


def test_another_container_with_the_same_name_is_not_asked_for_by_number(tmp_path):
    """Its numbers of processes are its own: it lives while it shows."""
    write(tmp_path, host=socket.gethostname(), within='another boot', process=os.getpid(),
          started='1')
    with pytest.raises(Refusal, match=r'can be taken in 1[12]\d s'):
        with only_run_in(tmp_path):
            pass


def test_the_clock_of_this_machine_does_not_count(tmp_path, monkeypatch):
    write(tmp_path, host='elsewhere', process=1)
    monkeypatch.setattr(time, 'time', lambda: 1e12)
    with pytest.raises(Refusal, match='process 1 on elsewhere'):
        with only_run_in(tmp_path):
            pass


def test_who_was_taken_for_dead_notices_and_leaves_the_other_alone(tmp_path):
    with only_run_in(tmp_path) as still_ours:
        still_ours()
        write(tmp_path, host='elsewhere', process=7)
        with pytest.raises(Refusal, match='taken over by another run .process 7 on elsewhere'):
            still_ours()
    assert json.loads((tmp_path / 'running.json').read_text())['host'] == 'elsewhere'


def test_one_process_at_a_time_removes_a_dead_one(tmp_path):
    """And leaves what has come in its place since; a claim of one that died ages."""
    path = write(tmp_path, host='elsewhere', process=1)
    dead, claim = json.loads(path.read_text()), tmp_path / 'running.json.claim'
    claim.touch()
    lock._remove_dead(path, dead, print)
    assert path.exists() and claim.exists()
    os.utime(claim, (0, 0))
    lock._remove_dead(path, dead, print)
    assert path.exists() and not claim.exists()
    lock._remove_dead(path, dead | {'process': 2}, print)
    assert path.exists() and not claim.exists()
    lock._remove_dead(path, dead, print)
    assert not list(tmp_path.iterdir())


def test_of_many_that_find_a_dead_one_a_single_one_takes_its_place(tmp_path):
    """Processes of their own, at once."""
    path = write(tmp_path, host='elsewhere', process=1)
    os.utime(path, (0, 0))
    script = ('import sys, pathlib; from pkm_jax.processes.lock import only_run_in\n'
              'print("ready", flush=True); sys.stdin.readline()\n'
              'with only_run_in(pathlib.Path(sys.argv[1])): print("mine", flush=True); sys.stdin.read()')
    command, pipe = [sys.executable, '-c', script, str(tmp_path)], subprocess.PIPE
    started = [subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
               for _ in range(6)]
    assert [process.stdout.readline() for process in started] == ['ready\n'] * 6
    for process in started:
        process.stdin.write('go\n')
        process.stdin.flush()
    deadline = time.monotonic() + 60
    while sum(process.poll() is None for process in started) > 1 and time.monotonic() < deadline:
        time.sleep(.05)
    printed = [process.communicate() for process in started]    # which lets the one that has it end
    assert sum('mine' in out for out, _ in printed) == 1, printed
    assert sum('in use by another run' in error for _, error in printed) == 5

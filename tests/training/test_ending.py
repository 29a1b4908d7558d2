"""Programs that train end with a status for each cause, and a line that says it."""

import signal
import subprocess
import sys

import pytest

from pkm_jax.processes import hosts
from pkm_jax.processes.preemption import Stopped
from pkm_jax.refusal import ExitStatus, OutOfMemory, Refusal
from pkm_jax.training import ending
from pkm_jax.training.divergence import Diverged


@pytest.mark.parametrize('cause, status, said', [
    (Refusal('train.steps = 0'), 2, 'Not trained: train.steps = 0\n'),
    (Diverged('no loss'), 3, 'Stopped: no loss\n'),
    (OutOfMemory('16 GB too much'), 5, 'Not trained: 16 GB too much\n'),
    (Stopped(signal.SIGTERM, 7), 143, 'stopped after step 7 by SIGTERM'),
    (Stopped(signal.SIGINT, 7), 130, 'stopped after step 7 by SIGINT')])
def test_each_cause_has_its_status(cause, status, said, capsys, monkeypatch):
    given = []      # what the process would end with, were the others to keep it waiting
    monkeypatch.setattr(hosts, 'end_soon', given.append)
    with pytest.raises(SystemExit) as ended, ending.said():
        raise cause
    assert ended.value.code == status and said in ''.join(capsys.readouterr())
    assert given == ([] if status > 128 else [status])


def test_a_fault_of_the_program_keeps_its_traceback(monkeypatch):
    given = []
    monkeypatch.setattr(hosts, 'end_soon', given.append)
    with pytest.raises(KeyError), ending.said():
        raise KeyError('ours')
    assert given == [ExitStatus.FAILED] == [1]      # Python's own, of any traceback


@pytest.mark.parametrize('cause, status', [
    pytest.param('Refusal', 2, marks=pytest.mark.slow), ('OutOfMemory', 5), ('KeyError', 1)])
def test_a_process_really_ends_so(cause, status):
    program = ('from pkm_jax.refusal import *; from pkm_jax.training import ending\n'
               f'with ending.said(): raise {cause}("that")')
    done = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True)
    said = done.stderr.count('that') - done.stderr.count(f'{cause}("that")')   # 3.13 shows the line
    assert done.returncode == status and said == 1
    assert ('Traceback' in done.stderr) == (status == 1)


def test_statuses_are_told_apart():
    assert len(set(ExitStatus)) == len(ExitStatus.__members__) and max(ExitStatus) < 128

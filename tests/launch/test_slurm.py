"""launch/slurm.sbatch, and what jax.distributed makes of the processes it starts."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from jax._src.clusters.cluster import ClusterEnv
from jax._src.clusters.slurm_cluster import SlurmCluster

ROOT = Path(__file__).parents[2]
ARGUMENTS = ('--config=configs/bert_base_pkm.py', "--config.data.corpus=/a b/*.txt,it's")
SRUN = ['srun', '--cpus-per-task=8', '--gpu-bind=none', '--kill-on-bad-exit=0', 'bash', '-m',
        'pkm_jax.pretrain', *ARGUMENTS, '--config.distributed.enabled=True']
SHOW, REQUEUE = ['scontrol', 'show', 'job', '77'], ['scontrol', 'requeue', '77']
RUNNING = {'scontrol show': 'echo "JobId=77 JobState=RUNNING Reason=None"'}


@pytest.fixture
def batch(launch):
    """The script as Slurm runs it; `bash` stands for a python that is there."""
    def run(*words, **rest):
        return launch('slurm.sbatch', *words, **{'SLURM_JOB_ID': '77', 'PYTHON': 'bash', **rest})
    return run


def test_help_names_every_option(batch):
    help_ = batch('--help')
    assert help_.status == 0 and help_.called == []
    for name in ('--dry-run', '--help', 'PYTHON'):
        assert re.search(rf'^  {name}  ', help_.printed, re.M)


def test_a_dry_run_prints_what_a_job_runs(batch, read):
    dry = batch('--dry-run', *ARGUMENTS, SLURM_JOB_ID='')
    assert (dry.status, dry.called) == (0, [])
    first, second = dry.printed.splitlines()
    assert read(first) == [SRUN] and second == 'scontrol requeue JOB    # after status 143, 138 or 129'
    wet = batch(*ARGUMENTS)
    assert (wet.status, wet.called) == (0, [SRUN])


@pytest.mark.parametrize('status, state, called', [
    (143, 'RUNNING', [SHOW, REQUEUE]), (138, 'RUNNING', [SHOW, REQUEUE]),
    (129, 'RUNNING', [SHOW, REQUEUE]), (143, 'CANCELLED', [SHOW]), (1, 'RUNNING', []),
    (130, 'RUNNING', [])])
def test_only_a_run_that_was_stopped_is_requeued(batch, status, state, called):
    job = batch(*ARGUMENTS, answers={
        'srun': f'exit {status}', 'scontrol show': f'echo "JobId=77 JobState={state} Reason=None"'})
    assert (job.status, job.called) == (status, [SRUN, *called])


@pytest.mark.parametrize('name, status', [('TERM', 143), ('USR1', 138), ('HUP', 129)])
def test_the_script_outlives_the_signal_that_stops_the_run(batch, name, status):
    """Slurm may signal the script too; srun passes the signal on, and needs its time."""
    job = batch(*ARGUMENTS, answers={'srun': f'kill -{name} $PPID; sleep 1; exit {status}', **RUNNING})
    assert job.called == [SRUN, SHOW, REQUEUE]


@pytest.mark.parametrize('words, change, remedy', [
    ((), {}, 'Give --config='), (ARGUMENTS, {'SLURM_JOB_ID': ''}, 'submit it'),
    (ARGUMENTS, {'cwd': '/'}, 'submit from there'),
    (ARGUMENTS, {'PYTHON': 'no/python'}, "pip install -e '.[train,cuda]'")])
def test_what_is_missing_is_said(batch, words, change, remedy):
    refused = batch(*words, **change)
    assert refused.status == 2 and remedy in refused.errors and refused.called == []


def directives():
    text = (ROOT / 'launch' / 'slurm.sbatch').read_text()
    return dict(re.findall(r'^#SBATCH --([a-z-]+)=?(\S*)$', text, re.M))


def test_directives_come_before_any_command():
    """Slurm reads none after the first command."""
    lines = (ROOT / 'launch' / 'slurm.sbatch').read_text().splitlines()
    first = next(index for index, line in enumerate(lines) if line and not line.startswith('#'))
    assert sum(line.startswith('#SBATCH') for line in lines[:first]) == len(directives()) == 10
    assert directives()['signal'] == 'TERM@120' and 'requeue' in directives()
    assert directives()['ntasks-per-node'] == directives()['gpus-per-node']


def test_jax_finds_the_processes_and_gives_each_a_gpu(monkeypatch):
    """The variables that srun gives the second process of the second node."""
    nodes, processes = int(directives()['nodes']), int(directives()['ntasks-per-node'])
    for name, value in {'JOB_ID': 77, 'STEP_NODELIST': 'gpu[07-08]', 'STEP_NUM_NODES': nodes,
                        'NTASKS': nodes * processes, 'PROCID': processes + 1,
                        'LOCALID': 1}.items():
        monkeypatch.setenv(f'SLURM_{name}', str(value))
    assert SlurmCluster.is_env_present()
    address, count, index, devices = ClusterEnv.auto_detect_unset_distributed_params(
        None, None, None, None, None, 300)
    assert re.fullmatch(r'gpu07:6\d{4}', address)
    assert (count, index, devices) == (16, 9, [1])


@pytest.mark.parametrize('script', ['slurm.sbatch', 'tpu_pod.sh'])
def test_the_scripts_are_sound(script):
    subprocess.run(['bash', '-n', script], cwd=ROOT / 'launch', check=True)
    places = f'{Path(sys.executable).parent}:{os.environ["PATH"]}'
    checker = shutil.which('shellcheck', path=places)
    if checker is None:
        pytest.skip("no shellcheck: pip install -e '.[dev]'")
    done = subprocess.run([checker, script], cwd=ROOT / 'launch', text=True, capture_output=True)
    assert done.returncode == 0, done.stdout

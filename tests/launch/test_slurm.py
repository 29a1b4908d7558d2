"""launch/slurm.sbatch, and what jax.distributed makes of the processes it starts."""

import re
from pathlib import Path

import pytest
from jax._src import distributed
from jax._src.clusters.cluster import ClusterEnv
from jax._src.clusters.slurm_cluster import SlurmCluster

ROOT = Path(__file__).parents[2]
ARGUMENTS = ('--config=configs/bert_base_pkm.py', "--config.data.corpus=/a b/*.txt,it's")
SRUN = ['srun', '--cpus-per-task=8', '--gpu-bind=none', '--kill-on-bad-exit=0', 'bash', '-m',
        'pkm_jax.pretrain', *ARGUMENTS, '--config.log.hang_exit=True', '--config.distributed.enabled=True']
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
    assert read(first) == [SRUN] and second == (
        'scontrol requeue JOB    # after status 143, 138 or 129, and thrice after 4, 134 or 137')
    wet = batch(*ARGUMENTS)
    assert (wet.status, wet.called) == (0, [SRUN])


@pytest.mark.parametrize('status, state, called', [
    (143, 'RUNNING', [SHOW, REQUEUE]), (138, 'RUNNING', [SHOW, REQUEUE]),
    (129, 'RUNNING', [SHOW, REQUEUE]), (143, 'CANCELLED', [SHOW]), (1, 'RUNNING', []),
    (130, 'RUNNING', []), (2, 'RUNNING', []), (3, 'RUNNING', []), (5, 'RUNNING', []),
    (4, 'RUNNING', [SHOW, REQUEUE]), (134, 'RUNNING', [SHOW, REQUEUE])])
def test_only_a_run_that_was_stopped_is_requeued(batch, status, state, called):
    job = batch(*ARGUMENTS, answers={
        'srun': f'exit {status}', 'scontrol show': f'echo "JobId=77 JobState={state} Reason=None"'})
    assert (job.status, job.called) == (status, [SRUN, *called])


def test_a_run_that_hangs_again_and_again_is_given_up(batch):
    for restarts, called in ((2, [SHOW, REQUEUE]), (3, [])):
        job = batch(*ARGUMENTS, answers={'srun': 'exit 4', **RUNNING}, SLURM_RESTART_COUNT=str(restarts))
        assert (job.status, job.called) == (4, [SRUN, *called])


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


def test_one_process_of_a_node_gets_all_its_gpus(batch, monkeypatch):
    """As jax.distributed.initialize reads what the job tells it."""
    given = batch(*ARGUMENTS, answers={'srun': 'echo "ids: ${JAX_LOCAL_DEVICE_IDS-none}"'},
                  SLURM_GPUS_ON_NODE='4', SLURM_NTASKS_PER_NODE='1')
    assert given.status == 0 and given.printed == 'ids: 0,1,2,3\n'
    seen = {}
    monkeypatch.setattr(ClusterEnv, 'auto_detect_unset_distributed_params',
                        lambda *words: seen.update(ids=words[3]) or ('here:1', 1, 0, words[3]))
    monkeypatch.setattr(distributed._jax, 'get_distributed_runtime_service', _stop)
    monkeypatch.setenv('JAX_LOCAL_DEVICE_IDS', given.printed.split()[1])
    with pytest.raises(Stop):
        distributed.State().initialize()
    assert seen['ids'] == [0, 1, 2, 3]
    own = batch(*ARGUMENTS, answers={'srun': 'echo "ids: ${JAX_LOCAL_DEVICE_IDS-none}"'},
                SLURM_GPUS_ON_NODE='4', SLURM_NTASKS_PER_NODE='4')
    assert own.printed == 'ids: none\n'        # by its number in the node
    odd = batch(*ARGUMENTS, SLURM_GPUS_ON_NODE='4', SLURM_NTASKS_PER_NODE='2')
    assert odd.status == 2 and 'to 1 or 4' in odd.errors and odd.called == []


class Stop(Exception):
    pass


def _stop(*_, **__):
    raise Stop


SUBMIT = ('--gpu=h100', '--nodes=4', '--gpus-per-node=8', '--partition=gpu')


@pytest.fixture
def submit(launch):
    return lambda *words, **rest: launch('slurm.sh', *words, **rest)


def test_a_run_is_planned_then_submitted(submit, plan, read):
    calls = [plan('h100:32', *ARGUMENTS),
             ['sbatch', '--nodes=4', '--gpus-per-node=8', '--ntasks-per-node=8', '--cpus-per-task=8',
              '--partition=gpu', 'launch/slurm.sbatch', *ARGUMENTS]]
    dry, wet = submit('--dry-run', *SUBMIT, *ARGUMENTS), submit(*SUBMIT, *ARGUMENTS)
    assert (dry.status, dry.called, read(dry.printed)) == (0, [], calls)
    assert (wet.status, wet.called) == (0, calls)
    by_node = submit(*SUBMIT, '--processes=node', '--price=2', *ARGUMENTS).called
    assert '--price=2' in by_node[0] and by_node[1][3:5] == ['--ntasks-per-node=1', '--cpus-per-task=64']


@pytest.mark.parametrize('words, rest, status, said', [
    ((*SUBMIT, *ARGUMENTS), {'answers': {'planner': 'exit 5'}}, 2, 'does not fit'),
    ((*SUBMIT, *ARGUMENTS), {'answers': {'sbatch': 'echo "sbatch: QOSMaxGRESPerUser" >&2; exit 1'}}, 1, 'QOSMax'),
    ((*SUBMIT, *ARGUMENTS), {'lacking': ['sbatch']}, 2, 'no sbatch on PATH: submit from a login node'),
    (SUBMIT, {}, 2, 'Give --config='), (ARGUMENTS, {}, 2, 'Give --gpu=h100'),
    (('--gpu=h100', '--nodes', '4', *ARGUMENTS), {}, 2, 'as --name=value'),
    (('--gpu=h100', '--processes=some', *ARGUMENTS), {}, 2, 'must be gpu or node'),
    (('--gpu=h100', '--ntasks-per-node=3', *ARGUMENTS), {}, 2, 'give --processes=gpu')])
def test_what_hinders_a_submission_is_said(submit, words, rest, status, said):
    ended = submit(*words, **rest)
    assert ended.status == status and said in ended.errors
    assert len(ended.called) <= (2 if status == 1 else 1)


def test_its_help_names_every_option(submit):
    script = (ROOT / 'launch' / 'slurm.sh').read_text()
    for name in re.findall(r'^        (--[a-z-]+)=?\*?\)', script, re.M)[:6]:
        assert re.search(rf'^  {name}\b', submit('--help').printed, re.M), name

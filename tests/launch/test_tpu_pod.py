"""launch/tpu_pod.sh: what it prints is what it runs, in order, up to the first failure."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WHERE = ('--name=pod', '--zone=us-west4-a')
TYPE = ('--type=v5litepod-16', '--version=v2-alpha-tpuv5-lite')
ZONE = '--zone=us-west4-a'
TPU = ['gcloud', 'compute', 'tpus', 'tpu-vm']
DESCRIBE = [*TPU, 'describe', 'pod', '--format=value(state)']
QUEUED = ['gcloud', 'compute', 'tpus', 'queued-resources']
RUN = ('--config=configs/bert_base_pkm.py', "--config.data.corpus=/a b/*.txt,it's")


@pytest.fixture
def pod(launch):
    return lambda *words, **rest: launch('tpu_pod.sh', *words, **rest)


def test_help_names_every_option_and_command(pod):
    help_ = pod('--help')
    script = (ROOT / 'launch' / 'tpu_pod.sh').read_text()
    names = (re.findall(r'^ +(--[a-z-]+)=?\*?\)', script, re.M)
             + re.findall(r'^    ([a-z]+)\)\s', script, re.M))
    assert len(names) == 11 + 6 and help_.status == 0 and help_.called == []
    for name in names:
        assert re.search(rf'^  {name}\b', help_.printed, re.M), name


@pytest.mark.parametrize('words, expected', [
    ((*TYPE, 'create'),
     [[*DESCRIBE, ZONE], [*TPU, 'create', 'pod', '--accelerator-type=v5litepod-16',
                          '--version=v2-alpha-tpuv5-lite', ZONE]]),
    ((*TYPE, '--spot', '--project=my-own', 'create'),
     [[*DESCRIBE, ZONE, '--project=my-own'],
      [*TPU, 'create', 'pod', '--accelerator-type=v5litepod-16', '--version=v2-alpha-tpuv5-lite',
       '--spot', ZONE, '--project=my-own']]),
    ((*TYPE, '--spot', '--queued', 'create'),
     [[*DESCRIBE, ZONE],
      [*QUEUED, 'create', 'pod', '--node-id=pod', ZONE, '--accelerator-type=v5litepod-16',
       '--runtime-version=v2-alpha-tpuv5-lite', '--spot']]),
    (('logs',),
     [[*TPU, 'ssh', 'pod', '--worker=0', '--command=tail -n 100 -F pretrain.log', ZONE]]),
    (('--worker=3', 'logs'),
     [[*TPU, 'ssh', 'pod', '--worker=3', '--command=tail -n 100 -F pretrain.log', ZONE]]),
    (('stop',),
     [[*TPU, 'ssh', 'pod', '--worker=all', '--command=kill -TERM "$(cat pretrain.pid)"', ZONE]]),
    (('delete',), [[*TPU, 'delete', 'pod', '--quiet', ZONE]]),
    (('--queued', 'delete'), [[*QUEUED, 'delete', 'pod', '--force', '--quiet', ZONE]]),
])
def test_a_dry_run_prints_what_a_run_runs(pod, read, words, expected):
    dry = pod('--dry-run', *WHERE, *words)
    assert (dry.status, dry.called, read(dry.printed)) == (0, [], expected)
    wet = pod(*WHERE, *words)
    assert (wet.status, wet.called, wet.errors) == (0, expected, '')


def test_install_copies_this_commit_to_all_workers(pod, read):
    dry, wet = pod('--dry-run', *WHERE, 'install'), pod(*WHERE, 'install')
    assert dry.called == [] and wet.called == read(dry.printed)
    archive, copy, install = wet.called
    assert archive == ['git', 'archive', '--format=tar.gz', '--output=/tmp/pkm_jax.tar.gz', 'HEAD']
    assert copy == [*TPU, 'scp', '/tmp/pkm_jax.tar.gz', 'pod:pkm_jax.tar.gz', '--worker=all', ZONE]
    assert install[:6] == [*TPU, 'ssh', 'pod'] and install[6] == '--worker=all'
    assert "--editable '.[train,tpu]'" in install[7]
    subprocess.run(['bash', '-n', '-c', install[7].removeprefix('--command=')], check=True)


@pytest.mark.parametrize('workdir, folder, mounts', [
    ('gs://bucket/runs/one', '/mnt/gcs/bucket/runs/one', True),
    ('/nfs/runs/one', '/nfs/runs/one', False)])
def test_run_starts_the_same_command_on_all_workers(pod, tmp_path, workdir, folder, mounts):
    """What the workers' shells get runs here, among stand-ins, and passes every word on."""
    called = pod(*WHERE, f'--workdir={workdir}', 'run', *RUN).called
    assert called[0][:7] == [*TPU, 'ssh', 'pod', '--worker=all'] and called[0][8] == ZONE
    python = tmp_path / 'pkm_jax' / '.venv' / 'bin' / 'python'
    python.parent.mkdir(parents=True)
    bin_ = tmp_path / 'bin'
    for path, code in {python: 'printf "%s\\n" "$@"', bin_ / 'mountpoint': 'false',
                       bin_ / 'sudo': ':',
                       bin_ / 'gcsfuse': f'echo "$@" > {tmp_path}/mounted'}.items():
        path.write_text(f'#!/usr/bin/env bash\n{code}\n')
        path.chmod(0o755)
    command = called[0][7].removeprefix('--command=')
    environment = {'PATH': f'{tmp_path}/bin:/usr/bin:/bin', 'USER': 'me'}
    subprocess.run(['bash', '-c', command + '; wait'], cwd=tmp_path, env=environment, check=True)
    assert (tmp_path / 'pretrain.log').read_text().splitlines() == [
        '-m', 'pkm_jax.pretrain', *RUN, '--config.distributed.enabled=True',
        f'--config.workdir={folder}', f'--config.data.cache={folder[:-4]}/data']
    assert (tmp_path / 'pretrain.pid').read_text().strip().isdigit()
    assert (tmp_path / 'mounted').exists() == mounts
    if mounts:
        assert (tmp_path / 'mounted').read_text().split()[-2:] == ['bucket', '/mnt/gcs/bucket']


def test_a_run_under_way_is_not_started_again(pod, tmp_path):
    called = pod(*WHERE, '--workdir=/nfs/run', 'run', *RUN).called
    command = called[0][7].removeprefix('--command=')
    with subprocess.Popen(['sleep', '30']) as other:
        (tmp_path / 'pretrain.pid').write_text(str(other.pid))
        again = subprocess.run(['bash', '-c', command], cwd=tmp_path, text=True,
                               capture_output=True)
        other.kill()
    assert again.returncode == 1 and 'stop it first' in again.stderr


def test_a_slice_that_is_there_is_used(pod):
    made = pod(*WHERE, *TYPE, 'create', answers={'*describe': 'echo READY'})
    assert made.status == 0 and 'used as it is' in made.printed and len(made.called) == 1
    gone = pod(*WHERE, *TYPE, 'create', answers={'*describe': 'echo PREEMPTED'})
    assert gone.status == 2 and 'PREEMPTED: delete it' in gone.errors and len(gone.called) == 1


def test_a_failure_stops_what_follows(pod):
    failed = pod(*WHERE, 'install', answers={'*scp': 'exit 3'})
    assert failed.status == 3 and len(failed.called) == 2


@pytest.mark.parametrize('words, remedy', [
    ((), 'no command: create, install'),
    (('create',), 'Give --name=NAME'),
    (('--name=pod', 'create'), 'Give --zone=ZONE'),
    ((*WHERE, 'create'), 'Give --type=TYPE'),
    ((*WHERE, '--type=v5litepod-16', 'create'), 'Give --version=VERSION'),
    ((*WHERE, 'run'), 'Give --config='),
    ((*WHERE, 'run', *RUN), 'must be gs://BUCKET/FOLDER'),
    ((*WHERE, '--workdir=gs://bucket', 'run', *RUN), 'must be gs://BUCKET/FOLDER'),
    ((*WHERE, '--workdir=runs', 'run', *RUN), 'must be gs://BUCKET/FOLDER'),
    ((*WHERE, '--sport', 'create'), 'unknown option --sport'),
    ((*WHERE, 'remove'), 'unknown command remove'),
    ((*WHERE, 'logs', '--worker=1'), 'logs takes no arguments, but got: --worker=1'),
])
def test_what_is_missing_or_wrong_is_said(pod, words, remedy):
    refused = pod(*words)
    assert refused.status == 2 and remedy in refused.errors and refused.called == []

"""launch/tpu_pod.sh: what it prints is what it runs, in order, up to the first failure."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WHERE = ('--name=pod', '--zone=us-west4-a')
TYPE = ('--type=v5litepod-16', '--version=v2-alpha-tpuv5-lite')
ZONE = '--zone=us-west4-a'
TPU = ['gcloud', 'compute', 'tpus', 'queued-resources']
VM = ['gcloud', 'compute', 'tpus', 'tpu-vm']
ALL = ['--worker=all', '--node=all']
DESCRIBE = [*TPU, 'describe', 'pod', '--format=value(state.state)', ZONE]
CREATE = [*TPU, 'create', 'pod', '--node-id=pod', '--accelerator-type=v5litepod-16',
          '--runtime-version=v2-alpha-tpuv5-lite']
DELETE = [*TPU, 'delete', 'pod', '--force', '--quiet', ZONE]
RUN = ('--config=configs/bert_base_pkm.py', "--config.data.corpus=/a b/*.txt,it's")
ABSENT = 'echo "ERROR: (gcloud.x) NOT_FOUND: Resource pod was not found" >&2; exit 1'


@pytest.fixture
def pod(launch):
    return lambda *words, **rest: launch('tpu_pod.sh', *words, **rest)


def test_help_names_every_option_and_command(pod):
    help_ = pod('--help')
    script = (ROOT / 'launch' / 'tpu_pod.sh').read_text()
    options = re.findall(r'^        (--[a-z-]+)=?\*?\)', script, re.M)
    commands = re.findall(r'^    ([a-z]+)\)\s', script.split('need gcloud')[1], re.M)
    assert len(options) == 18 and len(commands) == 9 and help_.status == 0 and help_.called == []
    for name in options + commands:
        assert re.search(rf'^  {name}\b', help_.printed, re.M), name


@pytest.mark.parametrize('words, expected', [
    ((*TYPE, 'create'), [DESCRIBE, [*CREATE, ZONE]]),
    ((*TYPE, '--spot', '--project=my-own', '--wait=6h', 'create'),
     [[*DESCRIBE, '--project=my-own'],
      [*CREATE, '--spot', '--valid-until-duration=6h', ZONE, '--project=my-own']]),
    ((*TYPE, '--slices=3', 'create'),
     [DESCRIBE, [*CREATE[:6], '--node-count=3', '--node-prefix=pod', *CREATE[7:], ZONE]]),
    ((*TYPE, '--direct', '--spot', 'create'),
     [[*VM, 'describe', 'pod', '--format=value(state)', ZONE],
      [*VM, 'create', 'pod', '--accelerator-type=v5litepod-16', '--version=v2-alpha-tpuv5-lite',
       '--spot', ZONE]]),
    (('logs',), [[*TPU, 'ssh', 'pod', '--worker=0', '--node=0',
                  '--command=tail -n 100 -F pretrain.log', ZONE]]),
    (('--worker=3', '--direct', 'logs'),
     [[*VM, 'ssh', 'pod', '--worker=3', '--command=tail -n 100 -F pretrain.log', ZONE]]),
    (('stop',), [[*TPU, 'ssh', 'pod', *ALL,
                  '--command=touch pretrain.stop; kill -TERM "$(cat pretrain.pid)"', ZONE]]),
    (('delete',), [DELETE]),
    (('--direct', 'delete'), [[*VM, 'delete', 'pod', '--quiet', ZONE]]),
])
def test_a_dry_run_prints_what_a_run_runs(pod, read, words, expected):
    dry = pod('--dry-run', *WHERE, *words)
    assert (dry.status, dry.called, read(dry.printed)) == (0, [], expected)
    wet = pod(*WHERE, *words, answers={'*describe': ABSENT})
    assert (wet.status, wet.called, wet.errors) == (0, expected, '')


def test_a_plan_comes_before_the_slices(pod, plan):
    planned = plan('v5litepod-16', '--price=1.2', *RUN, slices=2)
    made = pod(*WHERE, *TYPE, '--slices=2', '--price=1.2', 'create', *RUN, answers={'*describe': ABSENT})
    assert made.called[0] == planned and made.called[-1][4] == 'create'
    assert pod('--type=v5litepod-16', *WHERE, '--slices=2', '--price=1.2', 'plan', *RUN).called == [planned]
    for status, said in ((5, 'does not fit'), (2, 'could not be planned (status 2)')):
        stopped = pod(*WHERE, *TYPE, 'create', *RUN, answers={'planner': f'exit {status}'})
        assert stopped.status == 2 and said in stopped.errors and len(stopped.called) == 1
    made = pod(*WHERE, *TYPE, '--no-plan', 'create', *RUN, answers={'*describe': ABSENT})
    assert [call[0] for call in made.called] == ['gcloud'] * 2


def test_zone_and_bucket_may_come_from_the_environment(pod):
    made = pod('--name=pod', 'run', *RUN, CLOUDSDK_COMPUTE_ZONE='us-west4-a', BUCKET='ours')
    assert made.called[0][-1] == ZONE and '/mnt/gcs/ours/runs/pod' in made.called[0][8]


def test_install_copies_this_commit_to_all_workers(pod, read):
    dry, wet = pod('--dry-run', *WHERE, 'install'), pod(*WHERE, 'install')
    assert dry.called == [] and wet.called == read(dry.printed)
    archive, copy, install = wet.called
    assert archive == ['git', 'archive', '--format=tar.gz', '--output=/tmp/pkm_jax.tar.gz', 'HEAD']
    assert copy == [*TPU, 'scp', '/tmp/pkm_jax.tar.gz', 'pod:pkm_jax.tar.gz', *ALL, ZONE]
    assert install[:8] == [*TPU, 'ssh', 'pod', *ALL][:8]
    command = next(word for word in install if word.startswith('--command='))
    assert "--editable '.[train,tpu]'" in command
    subprocess.run(['bash', '-n', '-c', command.removeprefix('--command=')], check=True)
    for lock in re.findall(r'--constraint (\S+)', command):
        assert (ROOT / lock).exists()


def started(pod, *words, **rest):
    """The command that `run` gives to the workers."""
    call = pod(*WHERE, *words, 'run', *RUN, **rest).called[-1]
    assert call[:8] == [*TPU, 'ssh', 'pod', *ALL][:8] and call[-1] == ZONE
    return call[8].removeprefix('--command=')


@pytest.fixture
def worker(tmp_path):
    """A folder with what is on a worker; returns a function that runs a command there."""
    home = tmp_path / 'worker'
    python = home / 'pkm_jax' / '.venv' / 'bin' / 'python'
    python.parent.mkdir(parents=True)
    bin_ = tmp_path / 'tools'
    bin_.mkdir()
    for path, code in {python: 'printf "%s\\n" "$@"; echo "$TOKEN"; exit ${STATUS-0}',
                       bin_ / 'mountpoint': 'false', bin_ / 'sudo': ':',
                       bin_ / 'gcsfuse': f'echo "$@" > {home}/mounted'}.items():
        path.write_text(f'#!/usr/bin/env bash\n{code}\n')
        path.chmod(0o755)

    def do(command, **environment):
        return subprocess.run(
            ['bash', '-c', command + '\nwait'], cwd=home, text=True, capture_output=True,
            env={'PATH': f'{bin_}:/usr/bin:/bin', 'USER': 'me', **environment})
    do.home = home
    return do


@pytest.mark.parametrize('workdir, folder, mounts', [
    ('gs://bucket/runs/one', '/mnt/gcs/bucket/runs/one', True),
    ('/nfs/runs/one', '/nfs/runs/one', False)])
def test_run_starts_the_same_command_on_all_workers(pod, worker, workdir, folder, mounts):
    """What the workers' shells get runs here, among stand-ins, and passes every word on."""
    done = worker(started(pod, f'--workdir={workdir}'), STATUS='3')
    assert done.returncode == 0, done.stderr
    assert (worker.home / 'pretrain.log').read_text().split('\n')[:-2] == [
        '-m', 'pkm_jax.pretrain', *RUN, '--config.log.hang_exit=True', '--config.distributed.enabled=True',
        f'--config.workdir={folder}', f'--config.data.cache={folder[:-4]}/data',
        f'--config.compilation_cache={folder[:-4]}/compiled']
    assert (worker.home / 'pretrain.pid').read_text().strip().isdigit()
    assert (worker.home / 'pretrain.status').read_text() == '3\n'
    assert (worker.home / 'mounted').exists() == mounts
    if mounts:
        assert (worker.home / 'mounted').read_text().split()[-2:] == ['bucket', '/mnt/gcs/bucket']


def test_a_run_under_way_is_not_started_again(pod, worker):
    with subprocess.Popen(['sleep', '30']) as other:
        (worker.home / 'pretrain.pid').write_text(str(other.pid))
        again = worker(started(pod, '--workdir=/nfs/run'))
        other.kill()
    assert again.returncode == 1 and 'stop it first' in again.stderr


def test_secrets_are_on_no_command_line(pod, worker, tmp_path):
    secrets = tmp_path / 'keys.env'
    secrets.write_text('TOKEN=geheim\n')
    ran = pod(*WHERE, '--workdir=/nfs/run', f'--secrets={secrets}', 'run', *RUN)
    assert 'geheim' not in str(ran) and len(ran.called) == 3
    prepare, copy, _ = ran.called
    assert copy[4:7] == ['scp', str(secrets), 'pod:secrets.env']
    worker(prepare[8].removeprefix('--command='))
    placed = worker.home / 'secrets.env'
    assert placed.stat().st_mode & 0o777 == 0o600
    placed.write_text(secrets.read_text())
    worker(started(pod, '--workdir=/nfs/run'))
    assert (worker.home / 'pretrain.log').read_text().endswith('geheim\n')


def test_each_worker_says_how_its_run_is(pod, worker):
    asked = pod(*WHERE, 'status').called[1][8].removeprefix('--command=')

    def said():
        return worker(asked).stdout.splitlines()[0]

    assert said() == 'run: ready'
    worker(started(pod, '--workdir=/nfs/run'), STATUS='143')
    assert said() == 'run: 143' and worker(asked).stdout.count('\n') == 2      # and its last line
    (worker.home / 'pretrain.stop').touch()
    assert said() == 'run: stopped'
    with subprocess.Popen(['sleep', '30']) as other:
        (worker.home / 'pretrain.pid').write_text(str(other.pid))
        assert said() == 'run: running'
        other.kill()
    (worker.home / 'pretrain.status').unlink()
    (worker.home / 'pkm_jax' / '.venv' / 'bin' / 'python').unlink()
    assert said() == 'run: bare'


def test_slices_that_are_there_are_used(pod):
    for state, said in (('ACTIVE', 'used as it is'), ('WAITING_FOR_RESOURCES', 'already')):
        made = pod(*WHERE, *TYPE, 'create', answers={'*describe': f'echo {state}'})
        assert made.status == 0 and said in made.printed and len(made.called) == 1
    gone = pod(*WHERE, *TYPE, 'create', answers={'*describe': 'echo SUSPENDED'})
    assert gone.status == 2 and 'SUSPENDED: delete it' in gone.errors and len(gone.called) == 1


def test_a_failure_stops_what_follows(pod):
    failed = pod(*WHERE, 'install', answers={'*scp': 'exit 3'})
    assert failed.status == 3 and len(failed.called) == 2


@pytest.mark.parametrize('words, remedy', [
    ((), 'no command: watch, plan'),
    (('create',), 'Give --name=NAME'),
    (('--name=pod', 'create'), 'Give --zone=ZONE'),
    ((*WHERE, 'create'), 'Give --type=TYPE'),
    ((*WHERE, '--type=v5litepod-16', 'create'), 'Give --version=VERSION'),
    ((*WHERE, 'run'), 'Give --config='), ((*WHERE, *TYPE, 'watch'), 'Give --config='),
    ((*WHERE, 'run', *RUN), 'must be gs://BUCKET/FOLDER'),
    ((*WHERE, '--workdir=gs://bucket', 'run', *RUN), 'must be gs://BUCKET/FOLDER'),
    ((*WHERE, '--workdir=runs', 'run', *RUN), 'must be gs://BUCKET/FOLDER'),
    ((*WHERE, '--workdir=/nfs/run', '--secrets=none', 'run', *RUN), '--secrets=none cannot be read'),
    ((*WHERE, '--slices=0', 'create'), '--slices=0 must be 1 or more'),
    ((*WHERE, '--slices=2', '--direct', 'create'), 'leave out --slices'),
    ((*WHERE, '--sport', 'create'), 'unknown option --sport'),
    ((*WHERE, 'remove'), 'unknown command remove'),
    ((*WHERE, 'logs', '--worker=1'), 'logs takes no arguments, but got: --worker=1'),
])
def test_what_is_missing_or_wrong_is_said(pod, words, remedy):
    refused = pod(*words)
    assert refused.status == 2 and remedy in refused.errors and refused.called == []


def test_missing_tools_are_named(pod):
    assert 'no gcloud on PATH: see cloud.google' in pod(*WHERE, 'install', lacking=['gcloud']).errors
    refused = pod(*WHERE, *TYPE, 'create', *RUN, lacking=['planner'])
    assert refused.status == 2 and 'no planner on PATH' in refused.errors and not refused.called


def watched(pod, states, said=(), **answers):
    """Watches while the slices are in these states, and the workers say this, look by look.

    The last of both stays. Returns the result, with the calls by their verbs.
    """
    def one_after_the_other(outputs):
        cases = ' '.join(f'{number}) {output} ;;' for number, output in enumerate(outputs[:-1]))
        return f'case $count in {cases} *) {outputs[-1]} ;; esac'

    runs = [f'printf "run: %s\\n" {words}' if 'exit' not in words else words for words in said]
    done = pod(*WHERE, *TYPE, '--spot', '--workdir=gs://bucket/runs/one', '--every=0', '--no-plan',
               'watch', *RUN, answers={
                   '*describe': one_after_the_other([
                       ABSENT if state == 'none' else f'echo {state}' for state in states]),
                   '*--command=if pgrep': one_after_the_other(runs or [':']), **answers})
    verbs = [call[4] + (' run' if '-m pkm_jax.pretrain' in call[-2] else ' asks' if 'if pgrep -F pretrain.pid >'
                        in call[-2] else '') for call in done.called if call[0] == 'gcloud']
    return done, [verb for verb in verbs if verb not in ('describe', 'ssh asks')]


MADE = ['create', 'scp', 'ssh', 'ssh run']


def test_watch_creates_installs_runs_and_ends_when_all_is_done(pod):
    done, verbs = watched(
        pod, ['none', 'WAITING_FOR_RESOURCES', 'PROVISIONING', 'ACTIVE'],
        ['bare bare', 'running running', 'running 0', '0 0'])
    assert done.status == 0 and verbs == MADE
    assert 'WAITING_FOR_RESOURCES' in done.printed and 'done; pod costs until' in done.printed


def test_a_preempted_slice_is_made_anew_and_its_run_goes_on(pod):
    done, verbs = watched(
        pod, ['none', 'ACTIVE', 'ACTIVE', 'SUSPENDING', 'SUSPENDED', 'none', 'ACTIVE'],
        ['bare', 'running', 'bare', 'running', '0'])
    assert done.status == 0 and verbs == [*MADE, 'delete', *MADE]
    assert 'preempted: made anew' in done.printed


def test_workers_that_go_away_are_waited_for(pod):
    """A slice that is being preempted says ACTIVE for a while."""
    done, verbs = watched(pod, ['ACTIVE'], ['running', 'exit 255', 'exit 255', 'running', '0'])
    assert done.status == 0 and verbs == [] and done.printed.count('cannot be reached') == 2
    lost, _ = watched(pod, ['ACTIVE'], ['exit 255'])
    assert lost.status == 2 and 'cannot be reached' in lost.errors


@pytest.mark.parametrize('status', [2, 3, 5])
def test_what_would_end_so_again_is_not_started_again(pod, status):
    ended, verbs = watched(pod, ['ACTIVE'], ['ready', f'{status} 134'])
    assert ended.status == status and verbs == ['ssh run']
    assert 'which another start would not change' in ended.printed


def test_a_crash_is_started_again_a_few_times(pod):
    ended, verbs = watched(pod, ['ACTIVE'], ['ready', '1 134'])
    assert ended.status == 1 and verbs == ['ssh run'] * 4       # --restarts=3
    ended, verbs = watched(pod, ['ACTIVE'], ['143 143'] * 6 + ['0'])
    assert ended.status == 0 and verbs == ['ssh run'] * 6       # stopped: as often as it takes


def test_a_run_that_was_stopped_by_hand_is_left(pod):
    ended, verbs = watched(pod, ['ACTIVE'], ['stopped'])
    assert ended.status == 0 and verbs == [] and 'stopped by hand' in ended.printed


def test_a_full_queue_is_waited_for_and_given_up_in_time(pod):
    given_up, verbs = watched(pod, ['none', *['WAITING_FOR_RESOURCES'] * 5, 'FAILED'])
    assert given_up.status == 2 and verbs == ['create'] and 'pod is FAILED' in given_up.errors
    assert given_up.called[-1] == [*TPU, 'describe', 'pod', ZONE]       # which says why


def test_a_quota_error_is_shown_and_ends_it(pod):
    said = "Quota limit 'TPUV5sLitepodPerProjectPerZoneForTPUAPI' has been exceeded."
    ended, verbs = watched(pod, ['none'], **{'*create': f'echo {said!r} >&2; exit 1'})
    assert ended.status == 1 and verbs == ['create'] and 'TPUAPI' in ended.errors


def test_a_wrong_zone_is_no_missing_slice(pod):
    said = "PERMISSION_DENIED: Permission denied on 'locations/us-west9-z' (or it may not exist)"
    ended = pod(*WHERE, *TYPE, '--workdir=/nfs/run', '--no-plan', 'watch', *RUN,
                answers={'*describe': f'echo "{said}" >&2; exit 1'})
    assert ended.status == 2 and said in ended.errors and len(ended.called) == 1


def test_a_dry_watch_prints_its_steps(pod, read, plan):
    dry = pod(*WHERE, *TYPE, '--workdir=/nfs/run', '--dry-run', 'watch', *RUN)
    calls = read(dry.printed)
    assert dry.called == [] and calls[0] == plan('v5litepod-16', *RUN) and calls[1] == DESCRIBE
    assert [call[4] for call in calls if call[0] == 'gcloud'] == [
        'describe', 'create', 'scp', 'ssh', 'ssh', 'ssh', 'delete']

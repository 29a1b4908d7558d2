"""launch/gke.py: the JobSet that it makes is one, and says what the run needs."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest
import yaml

from configs import bert_base_pkm_pod
from pkm_jax.planning import chips
from pkm_jax.refusal import Refusal

ROOT = Path(__file__).parents[2]
COMMON = ('--name=one', '--image=gcr.io/mine/pkm:1', '--bucket=mine')
WORDS = ('--config=bert_base_pkm', "--config.data.corpus=/bucket/a b/*.txt,it's")
KINDS = [('--topology=v6e:4x4',), ('--topology=v5p:2x2x2', '--slices=3', '--queue=tpus', '--spot'),
         ('--topology=tpu7x:2x2x1',), ('--topology=h100:16', '--secret=keys', '--grace=900'),
         ('--topology=h200:8', '--namespace=team', '--user=0')]


@pytest.fixture
def gke(launch):
    return lambda *words, **rest: launch('gke.py', *COMMON, *words, **rest)


@pytest.fixture(scope='module')
def program():
    """The script as a module, for its functions."""
    spec = importlib.util.spec_from_file_location('gke', ROOT / 'launch' / 'gke.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def made(program):
    """The manifest for these options, as the cluster reads it."""
    def make(*words):
        given, rest = program._options([*COMMON, *words, *WORDS])
        topology = chips.parse(given.topology, given.slices)
        return yaml.safe_load(yaml.safe_dump(program.jobset(given, topology, rest)))
    return make


def job_of(manifest):
    replicated, = manifest['spec']['replicatedJobs']
    return replicated['replicas'], replicated['template']['spec']


def pod_of(manifest):
    return job_of(manifest)[1]['template']['spec']


@pytest.mark.parametrize('words', KINDS)
def test_it_is_what_the_schemas_of_jobset_and_kubernetes_say(made, words):
    """The published models drop what they do not know, and refuse other types."""
    models = pytest.importorskip('kubeflow_trainer_api.models', reason="pip install -e '.[dev]'")
    manifest = made(*words)
    read = models.JobsetV1alpha2JobSet.from_dict(manifest)
    assert read.to_dict() == manifest
    misspelt = made(*words)
    misspelt['spec']['failurePolicy']['maxRestart'] = 1
    assert models.JobsetV1alpha2JobSet.from_dict(misspelt).to_dict() != misspelt


@pytest.mark.parametrize('topology, slices, nodes, chips_, machine', [
    ('v5e:1x1', 1, 1, 1, 'ct5lp-hightpu-1t'), ('v5e:2x4', 1, 1, 8, 'ct5lp-hightpu-8t'),
    ('v6e:4x4', 2, 4, 4, 'ct6e-standard-4t'), ('v5e:16x16', 1, 64, 4, 'ct5lp-hightpu-4t'),
    ('v5p:2x2x2', 3, 2, 4, 'ct5p-hightpu-4t'), ('v5litepod-16', 1, 4, 4, 'ct5lp-hightpu-4t'),
    ('tpu7x:2x2x1', 1, 1, 4, 'tpu7x-standard-4t'), ('tpu7x:4x4x4', 2, 16, 4, 'tpu7x-standard-4t'),
    ('h100:4', 1, 1, 4, 'a3-highgpu-4g'), ('h200:32', 1, 4, 8, 'a3-ultragpu-8g')])
def test_nodes_of_a_slice(program, topology, slices, nodes, chips_, machine):
    found = program.nodes_of(chips.parse(topology, slices))
    assert (found.number, found.chips, found.machine) == (nodes, chips_, machine)


@pytest.mark.parametrize('topology, said', [
    ('v5e:2x1', '4 chips'), ('v5p:1x2x1', '4 chips'), ('h100:12', '8 GPUs'), ('h100:3', '1, 2, 4')])
def test_nodes_that_there_are_not(program, topology, said):
    with pytest.raises(Refusal, match=said):
        program.nodes_of(chips.parse(topology))


def test_slices_are_jobs_of_as_many_pods_as_they_have_hosts(made):
    manifest = made('--topology=v6e:4x4', '--slices=2')
    replicas, job = job_of(manifest)
    assert (replicas, job['parallelism'], job['completions']) == (2, 4, 4)
    pod = pod_of(manifest)
    assert pod['nodeSelector'] == {'cloud.google.com/gke-tpu-accelerator': 'tpu-v6e-slice',
                                   'cloud.google.com/gke-tpu-topology': '4x4'}
    assert pod['containers'][0]['resources']['limits'] == {'google.com/tpu': 4}
    command = pod['containers'][0]['command']
    assert command == ['python', '-m', 'pkm_jax.pretrain', *WORDS, '--config.workdir=/bucket/runs/one',
                       '--config.data.cache=/bucket/data', '--config.compilation_cache=/bucket/compiled',
                       '--config.distributed.enabled=True', '--config.log.hang_exit=True']
    assert manifest['metadata']['annotations']      # a slice is a node pool


def test_gpu_nodes_are_told_of_each_other(made):
    manifest = made('--topology=h100:16')
    pod = pod_of(manifest)
    assert pod['containers'][0]['command'][-5:-1] == [
        '--config.distributed.enabled=True',
        '--config.distributed.coordinator=one-train-0-0.one:8476',
        '--config.distributed.processes=2', '--config.distributed.process=$(JOB_COMPLETION_INDEX)']
    assert pod['containers'][0]['resources']['limits'] == {'nvidia.com/gpu': 8}
    assert not manifest['metadata']['annotations']
    alone = pod_of(made('--topology=h200:8'))['containers'][0]['command']
    assert not any('distributed' in word for word in alone)


def test_a_run_that_hangs_ends_unless_it_is_told_not_to(made, program):
    given, words = program._options([*COMMON, '--topology=h200:8', *WORDS, '--config.log.hang_exit=False'])
    topology = chips.parse(given.topology)
    told = program._arguments(given, topology, program.nodes_of(topology), words)
    assert [word for word in told if 'hang_exit' in word] == ['--config.log.hang_exit=False']


@pytest.mark.parametrize('ended, restarts', [
    ({'exit': 2}, 'never'), ({'exit': 3}, 'never'), ({'exit': 5}, 'never'),
    ({'exit': 1}, 'counted'), ({'exit': 4}, 'counted'), ({'exit': 134}, 'counted'),
    ({'exit': 143}, 'free'), ({'exit': 129}, 'free'),
    ({'exit': 137, 'condition': 'DisruptionTarget'}, 'free')])
def test_failure_is_told_from_preemption(made, ended, restarts):
    """As the controllers read the rules: the first one that matches, by the job's message."""
    manifest = made('--topology=v6e:4x4')
    _, job = job_of(manifest)
    assert job['backoffLimit'] == 0 and pod_of(manifest)['restartPolicy'] == 'Never'
    index = next((number for number, rule in enumerate(job['podFailurePolicy']['rules'])
                  if ended['exit'] in rule.get('onExitCodes', {}).get('values', [])
                  or any(one['type'] == ended.get('condition')
                         for one in rule.get('onPodConditions', []))), None)
    message = (f'Container train for pod default/one-0 failed with exit code {ended["exit"]} matching '
               f'FailJob rule at index {index}')
    policy = manifest['spec']['failurePolicy']
    action = next((rule['action'] for rule in policy['rules'] if index is not None and any(
        re.search(pattern, message) for pattern in rule['onJobFailureMessagePatterns'])), 'RestartJobSet')
    assert {'FailJobSet': 'never', 'RestartJobSet': 'counted',
            'RestartJobSetAndIgnoreMaxRestarts': 'free'}[action] == restarts
    assert policy['maxRestarts'] == 3


def test_a_pod_gets_the_time_that_its_checkpoint_takes(made):
    """Of the largest configuration: 10 s a GB of tables and moments, of which a host has its share."""
    memory = bert_base_pkm_pod.get_config().memory
    size = memory.sub_keys ** 2 * 768 * 3 * 4       # float32: rows and both moments
    seconds = 10 * size / 1e9 / (256 / 4)
    assert seconds < pod_of(made('--topology=v5e:16x16'))['terminationGracePeriodSeconds'] == 600
    assert pod_of(made('--topology=v6e:4x4', '--grace=60'))['terminationGracePeriodSeconds'] == 60


def test_options_reach_the_manifest(made):
    manifest = made('--topology=v6e:4x4', '--queue=tpus', '--spot', '--namespace=team',
                    '--service-account=writer', '--secret=keys', '--restarts=7')
    pod = pod_of(manifest)
    assert manifest['metadata']['labels'] == {'kueue.x-k8s.io/queue-name': 'tpus'}
    assert manifest['metadata']['namespace'] == 'team' and pod['serviceAccountName'] == 'writer'
    assert manifest['spec']['failurePolicy']['maxRestarts'] == 7
    assert pod['nodeSelector']['cloud.google.com/gke-spot'] == 'true' and pod['tolerations']
    assert pod['containers'][0]['envFrom'] == [{'secretRef': {'name': 'keys'}}]
    volume, _ = pod['volumes']
    assert volume['csi']['volumeAttributes']['bucketName'] == 'mine'
    assert 'uid=1000' in volume['csi']['volumeAttributes']['mountOptions']
    assert pod['securityContext']['runAsUser'] == 1000      # of the image


@pytest.mark.slow
def test_a_dry_run_prints_what_is_applied(gke, plan, read, made):
    words = '--topology=v6e:4x4', '--queue=tpus'
    dry = gke(*words, '--dry-run', *WORDS)
    assert (dry.status, dry.called, dry.errors) == (0, [], '')
    planned, applied, toolkit, *_ = dry.printed.splitlines()
    assert yaml.safe_load(dry.printed) == made(*words)
    wet = gke(*words, *WORDS)
    assert (wet.status, wet.called) == (0, [plan('v6e:4x4', *WORDS), ['kubectl', 'apply', '--filename=-']])
    assert read('\n'.join([planned[2:], applied[2:]])) == wet.called
    assert yaml.safe_load(wet.given) == made(*words) and toolkit in wet.printed


def test_the_same_by_cluster_toolkit(gke, read):
    line = re.search('# By Cluster Toolkit: (.*)', gke(
        '--topology=h100:16', '--dry-run', *WORDS).printed)[1]
    toolkit, = read(line)
    options = dict(zip(toolkit[3::2], toolkit[4::2]))
    assert toolkit[:3] == ['gcluster', 'job', 'submit'] and options == {
        '--name': 'one', '--image': 'gcr.io/mine/pkm:1', '--compute-type': 'a3-highgpu-8g',
        '--num-nodes': '2', '--mount': 'gs://mine:/bucket:rw', '--grace-period': '600s',
        '--restarts': '3', '--restart-on-exit-codes': '1,4,129,134,137,138,143',
        '--service-account': 'default', '--command': options['--command']}
    command = shlex.split(options['--command'])
    assert command[3:5] == list(WORDS) and command[-2].endswith('=$JOB_COMPLETION_INDEX')
    assert "$JOB_COMPLETION_INDEX'" not in options['--command']     # the shell puts it in


@pytest.mark.parametrize('answers, lacking, said', [
    ({'planner': 'exit 5'}, (), 'it does not fit'),
    ({'planner': 'exit 2'}, (), 'could not be planned (status 2)'),
    ({'kubectl': 'exit 1'}, (), 'kubectl apply ended with status 1'),
    ({}, ('kubectl',), 'no kubectl on PATH')])
def test_what_fails_is_said_and_launches_nothing(gke, answers, lacking, said):
    ended = gke('--topology=v6e:4x4', *WORDS, answers=answers, lacking=lacking)
    assert ended.status == 2 and ended.errors.startswith('Not launched: ') and said in ended.errors
    assert any(call[0] == 'kubectl' for call in ended.called) == ('kubectl' in answers)


def test_without_a_plan_none_is_made(gke):
    assert [call[0] for call in gke('--topology=v6e:4x4', '--no-plan', *WORDS).called] == ['kubectl']


@pytest.mark.parametrize('words, said', [
    (('--topology=v6e:4x4', '--nmae=two', *WORDS), 'unknown: --nmae=two'),
    (('--topology=v6e:4x4',), 'Give --config='), (WORDS, 'required: --topology'),
    (('--topology=v9:4x4', *WORDS), "'v9' is none of"),
    (('--topology=v6e:4x4', '--name=My_Run', *WORDS), 'small letters'),
    (('--topology=v6e:4x4', '--bucket=', *WORDS), 'or set BUCKET')])
def test_what_is_missing_or_wrong_is_said(program, words, said, capsys):
    with pytest.raises(SystemExit) as ended:
        program.main([*COMMON, *words])
    assert ended.value.code == 2 and said in capsys.readouterr().err


def test_the_bucket_may_come_from_the_environment(launch):
    dry = launch('gke.py', '--name=one', '--image=i', '--topology=v6e:4x4', '--dry-run', *WORDS, BUCKET='ours')
    assert 'bucketName: ours' in dry.printed

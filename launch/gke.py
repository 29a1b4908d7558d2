"""Pretraining on GKE, on TPU slices or GPU nodes, as a JobSet.

    python launch/gke.py --name=one --image=IMAGE --topology=v6e:4x4 --bucket=BUCKET \\
        --config=bert_base_pkm --config.data.corpus='/bucket/corpora/*.jsonl.xz'
    python launch/gke.py --name=one --image=IMAGE --topology=tpu7x:2x2x2 --slices=4 --queue=tpus …
    python launch/gke.py --name=one --image=IMAGE --topology=h100:16 --dry-run … > jobset.yaml

Says whether the run fits, its tokens/s, days and chip hours; then hands the manifest to kubectl.
A dry run prints the manifest, with the commands beside it as comments. `kubectl get jobset NAME`
and `kubectl logs -l jobset.sigs.k8s.io/jobset-name=NAME` show what becomes of it.

When a pod is preempted or stopped the run starts again from its newest checkpoint, as often as it
takes; when one fails or hangs, --restarts times; what is refused (exit status 2), diverges (3) or
has no room on a device (5) ends the job. The cluster needs its node pools, JobSet 0.10, Cloud
Storage FUSE's CSI driver, and a service account that may write to the bucket.

Guide: docs/launch.md, "GKE".
"""

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import yaml

from pkm_jax.planning import chips
from pkm_jax.planning.chips import Topology
from pkm_jax.refusal import ExitStatus, Refusal, ends

# cloud.google.com/kubernetes-engine/docs/concepts/{tpus,tpu-ironwood} and .../how-to/gpus, of 2026:
# what node pools are labelled with, and their machines with so many chips.
ACCELERATORS = {
    'v5e': ('tpu-v5-lite-podslice', 'ct5lp-hightpu-{}t'),
    'v6e': ('tpu-v6e-slice', 'ct6e-standard-{}t'),
    'v5p': ('tpu-v5p-slice', 'ct5p-hightpu-{}t'),
    'v4': ('tpu-v4-podslice', 'ct4p-hightpu-{}t'),
    'tpu7x': ('tpu7x', 'tpu7x-standard-{}t'),
    'h200': ('nvidia-h200-141gb', 'a3-ultragpu-{}g'),
    'h100': ('nvidia-h100-80gb', 'a3-highgpu-{}g'),
    'a100': ('nvidia-a100-80gb', 'a2-ultragpu-{}g')}
BUCKET = '/bucket'      # where pods find it
PORT = 8476             # of the first process of several, on GPU nodes
# By what the run says of itself (docs/reliability.md), in the order of the pods' rules.
HOPELESS = [ExitStatus.REFUSED, ExitStatus.DIVERGED, ExitStatus.OUT_OF_MEMORY]
STOPPED = [129, 138, 143]       # by SIGHUP, SIGUSR1, SIGTERM, with a checkpoint
USER = 1000             # of the image (launch/Dockerfile)


class Nodes(NamedTuple):
    """The nodes that make up one slice, or all GPUs."""
    number: int
    chips: int          # of each
    label: str          # of their accelerator
    machine: str        # their type


def nodes_of(topology: Topology) -> Nodes:
    """The nodes of a slice, or of all GPUs.

    Raises:
      Refusal: they do not come in so many.
    """
    kind = topology.name.partition(':')[0]
    number = topology.chips // topology.slices
    alone = number <= 8 and topology.chip.dimensions == 2       # up to 8 chips of one node
    of_node = min(number, 8 if alone or not topology.is_tpu else 4)
    if number % of_node or of_node not in ((1, 4, 8) if topology.is_tpu else (1, 2, 4, 8)):
        raise Refusal(f'--topology={topology.name}: nodes have ' + (
            '4 chips; one alone 1, 4 or, of v5e and v6e, 8.' if topology.is_tpu else
            '8 GPUs; one alone 1, 2, 4 or 8.'))
    label, machine = ACCELERATORS[kind]
    return Nodes(number // of_node, of_node, label, machine.format(of_node))


def jobset(given: argparse.Namespace, topology: Topology, words: Sequence[str]) -> dict[str, Any]:
    """The JobSet that runs pretraining with these words on every node."""
    nodes = nodes_of(topology)
    labels = {'kueue.x-k8s.io/queue-name': given.queue} if given.queue else {}
    # A slice is a node pool, of which no two jobs get parts.
    exclusive = {'alpha.jobset.sigs.k8s.io/exclusive-topology': 'cloud.google.com/gke-nodepool'}
    return {
        'apiVersion': 'jobset.x-k8s.io/v1alpha2', 'kind': 'JobSet',
        'metadata': {'name': given.name, 'namespace': given.namespace, 'labels': labels,
                     'annotations': exclusive if topology.is_tpu else {}},
        'spec': {
            'failurePolicy': {
                'maxRestarts': given.restarts,
                'restartStrategy': 'BlockingRecreate',      # no old pod beside new ones
                'rules': [_on('hopeless', 'FailJobSet', '0'),
                          _on('preempted', 'RestartJobSetAndIgnoreMaxRestarts', '[12]')]},
            'replicatedJobs': [{
                'name': 'train', 'replicas': topology.slices,
                'template': {'spec': {
                    'parallelism': nodes.number, 'completions': nodes.number,
                    'completionMode': 'Indexed', 'backoffLimit': 0,
                    'podFailurePolicy': {'rules': [
                        _exits(HOPELESS),
                        {'action': 'FailJob',
                         'onPodConditions': [{'type': 'DisruptionTarget', 'status': 'True'}]},
                        _exits(STOPPED)]},
                    'template': {
                        'metadata': {'annotations': {'gke-gcsfuse/volumes': 'true'}},
                        'spec': _pod(given, topology, nodes, words)}}}}]}}


def _on(name: str, action: str, rules: str) -> dict[str, Any]:
    """What is done where one of the pods' rules ended a job, whose message has its number."""
    return {'name': name, 'action': action, 'onJobFailureReasons': ['PodFailurePolicy'],
            'onJobFailureMessagePatterns': [f'matching FailJob rule at index {rules}$']}


def _exits(statuses: Sequence[int]) -> dict[str, Any]:
    return {'action': 'FailJob', 'onExitCodes': {
        'containerName': 'train', 'operator': 'In', 'values': sorted(map(int, statuses))}}


def _pod(given: argparse.Namespace, topology: Topology, nodes: Nodes, words: Sequence[str],
         ) -> dict[str, Any]:
    resource = {'google.com/tpu' if topology.is_tpu else 'nvidia.com/gpu': nodes.chips}
    selector = ({'cloud.google.com/gke-tpu-accelerator': nodes.label,
                 'cloud.google.com/gke-tpu-topology': topology.name.partition(':')[2]}
                if topology.is_tpu else {'cloud.google.com/gke-accelerator': nodes.label})
    container = {
        'name': 'train', 'image': given.image,
        'command': ['python', '-m', 'pkm_jax.pretrain', *_arguments(given, topology, nodes, words)],
        'resources': {'requests': resource, 'limits': dict(resource)},
        'securityContext': {'allowPrivilegeEscalation': False},
        'volumeMounts': [{'name': 'bucket', 'mountPath': BUCKET},
                         {'name': 'shared-memory', 'mountPath': '/dev/shm'}]}
    if given.secret:
        container['envFrom'] = [{'secretRef': {'name': given.secret}}]
    pod: dict[str, Any] = {
        'restartPolicy': 'Never', 'serviceAccountName': given.service_account,
        # Or the run would be process 1, to which SIGTERM does nothing before it is asked to listen.
        'shareProcessNamespace': True,
        'terminationGracePeriodSeconds': given.grace,
        'nodeSelector': selector,
        'securityContext': {'runAsUser': given.user, 'runAsGroup': given.user,
                            'fsGroup': given.user},
        'containers': [container],
        'volumes': [
            {'name': 'bucket', 'csi': {
                'driver': 'gcsfuse.csi.storage.gke.io',
                'volumeAttributes': {
                    'bucketName': given.bucket,
                    # Checkpoints are finished by renaming their folder.
                    'mountOptions': f'implicit-dirs,rename-dir-limit=1000000,uid={given.user},'
                                    f'gid={given.user}'}}},
            {'name': 'shared-memory', 'emptyDir': {'medium': 'Memory'}}]}
    if given.spot:
        selector['cloud.google.com/gke-spot'] = 'true'
        pod['tolerations'] = [{'key': 'cloud.google.com/gke-spot', 'operator': 'Equal',
                               'value': 'true', 'effect': 'NoSchedule'}]
    return pod


def _arguments(given: argparse.Namespace, topology: Topology, nodes: Nodes, words: Sequence[str],
               ) -> list[str]:
    """Of the program, on every node: GKE tells the processes of TPUs of each other, of GPUs not."""
    own = [f'--config.workdir={BUCKET}/runs/{given.name}', f'--config.data.cache={BUCKET}/data',
           f'--config.compilation_cache={BUCKET}/compiled']
    if nodes.number * topology.slices > 1:
        own.append('--config.distributed.enabled=True')
        if not topology.is_tpu:
            first = f'{given.name}-train-0-0.{given.name}:{PORT}'
            own += [f'--config.distributed.coordinator={first}',
                    f'--config.distributed.processes={nodes.number}',
                    '--config.distributed.process=$(JOB_COMPLETION_INDEX)']
    if not any(word.startswith('--config.log.hang_exit') for word in words):
        own.append('--config.log.hang_exit=True')       # nobody watches it
    return [*words, *own]


def gcluster(given: argparse.Namespace, topology: Topology, words: Sequence[str]) -> list[str]:
    """The like of it for Cluster Toolkit, which writes a JobSet of its own."""
    nodes = nodes_of(topology)
    size = (['--topology', topology.name.partition(':')[2], '--num-slices', str(topology.slices)]
            if topology.is_tpu else ['--num-nodes', str(nodes.number)])
    again = [ExitStatus.FAILED, ExitStatus.HUNG, 134, 137, *STOPPED]
    command = shlex.join(['python', '-m', 'pkm_jax.pretrain',
                          *_arguments(given, topology, nodes, words)])
    # Its shell, not Kubernetes, puts the number of the pod in.
    command = command.replace("'--config.distributed.process=$(JOB_COMPLETION_INDEX)'",
                              '--config.distributed.process=$JOB_COMPLETION_INDEX')
    return ['gcluster', 'job', 'submit', '--name', given.name, '--image', given.image,
            '--compute-type', nodes.machine, *size,
            '--mount', f'gs://{given.bucket}:{BUCKET}:rw', '--grace-period', f'{given.grace}s',
            '--restarts', str(given.restarts),
            '--restart-on-exit-codes', ','.join(str(int(status)) for status in sorted(again)),
            '--service-account', given.service_account,
            *(['--queue', given.queue] if given.queue else []), '--command', command]


def launch(given: argparse.Namespace, words: Sequence[str]) -> None:
    """Plans, prints and applies, or only prints.

    Raises:
      Refusal: it does not fit or cannot be planned, a name is none, kubectl is missing or fails.
    """
    if not re.fullmatch(r'[a-z]([a-z0-9-]{0,40}[a-z0-9])?', given.name):
        raise Refusal(f'--name={given.name}: small letters, digits and "-", 42 of them at most, as '
                      f'Kubernetes names pods after it.')
    if not given.bucket:
        raise Refusal('where is the run to write? Give --bucket=BUCKET, or set BUCKET.')
    topology = chips.parse(given.topology, given.slices)
    manifest = yaml.safe_dump(jobset(given, topology, words), sort_keys=False, width=1000)
    plan = [os.environ.get('PYTHON', sys.executable), '-m', 'pkm_jax.compile_check',
            f'--topology={given.topology}', f'--slices={given.slices}',
            *([f'--price={given.price}'] if given.price else []), *words]
    apply = ['kubectl', 'apply', '--filename=-']
    beside = f'# By Cluster Toolkit: {shlex.join(gcluster(given, topology, words))}'
    if given.dry_run:
        planned = [f'# {shlex.join(plan)}'] if given.plan else []
        print('\n'.join([*planned, f'# {shlex.join(apply)}', beside, manifest]), end='')
        return
    if not shutil.which(apply[0]):
        raise Refusal('there is no kubectl on PATH: gcloud components install kubectl, then '
                      'gcloud container clusters get-credentials CLUSTER.')
    if given.plan:
        _planned(plan)
    print(f'{manifest}{beside}', flush=True)
    status = subprocess.run(apply, input=manifest, text=True).returncode
    if status:
        raise Refusal(f'kubectl apply ended with status {status}, as it says above.')


def _planned(command: list[str]) -> None:
    status = subprocess.run(command).returncode
    if status:
        why = ('it does not fit' if status == ExitStatus.OUT_OF_MEMORY else
               f'it could not be planned (status {status})')
        raise Refusal(f'{why}, so nothing was launched; --no-plan launches it all the same.')


def _options(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog='launch/gke.py', description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('--name', required=True, help="of the JobSet, and of the run's folder: BUCKET/runs/NAME")
    add('--image', required=True, help='built by launch/Dockerfile, and pushed')
    add('--topology', required=True, help='of a slice: v6e:4x4, tpu7x:2x2x2; or all GPUs: h100:16')
    add('--slices', type=int, default=1, help='TPU slices, which share the batch')
    add('--bucket', default=os.environ.get('BUCKET', ''), help=f'mounted at {BUCKET}; else $BUCKET')
    add('--namespace', default='default')
    add('--service-account', default='default', help='of Kubernetes, that may write to the bucket')
    add('--queue', default='', help='of Kueue, a LocalQueue')
    add('--spot', action='store_true', help='on spot nodes')
    add('--grace', type=int, default=600, metavar='SECONDS',
        help='between SIGTERM and SIGKILL: more than a checkpoint takes, some 10 s for each GB '
             'that a node holds of it (600). Spot nodes give some 25, whatever is asked for')
    add('--restarts', type=int, default=3, help='after failures; preemptions do not count')
    add('--secret', default='', help="of the cluster, a Secret: part of the run's environment")
    add('--user', type=int, default=USER,
        help='that the run is (1000); 0 where nodes give their chips to root alone')
    add('--price', type=float, default=0., help='of a chip for an hour, for the plan')
    add('--no-plan', dest='plan', action='store_false',
        help='launches without a plan, or against it')
    add('--dry-run', action='store_true', help='prints, and launches nothing')
    given, words = parser.parse_known_args(arguments)
    wrong = [word for word in words if not word.startswith('--config')]
    if wrong or not words:
        parser.error(f'unknown: {" ".join(wrong)}' if wrong else
                     'what to train? Give --config=NAME')
    return given, words


def main(arguments: Sequence[str] | None = None) -> None:
    given, words = _options(sys.argv[1:] if arguments is None else arguments)
    try:
        launch(given, words)
    except Refusal as refusal:
        raise ends(f'Not launched: {refusal}') from refusal


if __name__ == '__main__':
    main()

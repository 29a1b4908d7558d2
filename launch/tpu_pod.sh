#!/usr/bin/env bash
# Pretraining on Cloud TPU slices of any number of hosts. Run it from this repository.
# Commands and flags follow the gcloud reference for `compute tpus queued-resources` and `tpu-vm`
# (cloud.google.com/sdk/gcloud/reference, pages of 2026); never run on a real slice.
set -euo pipefail
script=tpu_pod.sh
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
    cat <<'END'
launch/tpu_pod.sh [option …] COMMAND [--config=NAME [--config.section.field=value …]]

Pretraining on Cloud TPU slices of any number of hosts. Guide: docs/launch.md, "TPU VMs".

    export CLOUDSDK_COMPUTE_ZONE=us-west4-a BUCKET=mine
    launch/tpu_pod.sh --name=pod --type=v5litepod-16 --version=v2-alpha-tpuv5-lite --spot watch \
        --config=bert_base_pkm --config.data.corpus='/mnt/gcs/mine/corpora/*.jsonl.xz'
    launch/tpu_pod.sh --name=pod status
    launch/tpu_pod.sh --name=pod delete

  watch     all of it: plans, creates, installs, runs; creates slices that were preempted anew and
            goes on, until the run is done
  plan      whether the run fits, tokens/s, days and chip hours
  create    asks for the slices, or uses those that are there; plans first what --config names
  install   puts this commit and its environment on all workers
  run       starts python -m pkm_jax.pretrain on all workers, in the background
  status    of the slices, and of the run on each worker
  logs      follows what a worker prints
  stop      asks the run to save a checkpoint and stop; the same `run` goes on from there
  delete    removes the slices, and what they cost; the run's folder stays

  --name=NAME         of the slices; required
  --zone=ZONE         for example us-west4-a; else $CLOUDSDK_COMPUTE_ZONE; required
  --project=PROJECT   else gcloud's own choice, such as $CLOUDSDK_CORE_PROJECT
  --type=TYPE         accelerator type, for example v5litepod-16
  --version=VERSION   runtime, for example v2-alpha-tpuv5-lite
  --slices=N          so many of them, which share the batch; 1 where it is not given
  --spot              cheaper, and preempted at any time
  --wait=DURATION     how long to stay in the queue, for example 6h; as long as it takes
  --direct            one slice, now or never: without a queued resource
  --workdir=PLACE     gs://BUCKET/FOLDER, mounted on all workers by Cloud Storage FUSE, or the path
                      of a folder that all workers share; else gs://$BUCKET/runs/NAME
  --secrets=FILE      run: NAME=value lines for the run's environment, copied to the workers as a
                      file of mode 600 and named on no command line
  --restarts=N        watch: how often a run that crashed or hung is started again; 3
  --every=SECONDS     watch: between looks; 60
  --price=PRICE       of a chip for an hour: the plan then says what the run costs
  --no-plan           launches without a plan, or against it
  --worker=N          logs: which worker, of the first slice; 0
  --dry-run           prints the commands, to be pasted, and runs none
  --help              prints this

`watch` ends with the run's status: 0 done, 2 refused, 3 diverged, 5 no room on a device. Those it
does not start again. Slices go on costing when it ends, until `delete`.
A spot slice gets some 30 seconds: the run saves what it can, and in any case has the checkpoints of
--config.log.checkpoint_every.
END
}

name='' zone=${CLOUDSDK_COMPUTE_ZONE-} project='' type='' version='' slices=1 spot='' wait=''
queued=yes workdir='' secrets='' restarts=3 every=60 price='' plan=yes worker=0 dry=''
while (($#)); do
    case $1 in
        --name=*) name=${1#*=} ;;
        --zone=*) zone=${1#*=} ;;
        --project=*) project=${1#*=} ;;
        --type=*) type=${1#*=} ;;
        --version=*) version=${1#*=} ;;
        --slices=*) slices=${1#*=} ;;
        --spot) spot=--spot ;;
        --wait=*) wait=${1#*=} ;;
        --direct) queued='' ;;
        --workdir=*) workdir=${1#*=} ;;
        --secrets=*) secrets=${1#*=} ;;
        --restarts=*) restarts=${1#*=} ;;
        --every=*) every=${1#*=} ;;
        --price=*) price=${1#*=} ;;
        --no-plan) plan='' ;;
        --worker=*) worker=${1#*=} ;;
        --dry-run) dry=yes ;;
        --help) usage; exit ;;
        -*) die "unknown option $1: see --help" ;;
        *) break ;;
    esac
    shift
done
(($#)) || die 'no command: watch, plan, create, install, run, status, logs, stop or delete;' \
    'see --help'
command=$1; shift
case $command in
    watch | plan | run)
        (($#)) || die "$command what? Give --config=NAME after $command." ;;
    create) ;;
    *) (($# == 0)) || die "$command takes no arguments, but got: $*" ;;
esac
[[ $name ]] || die 'which slices? Give --name=NAME.'
[[ $zone ]] || die 'where? Give --zone=ZONE, or set CLOUDSDK_COMPUTE_ZONE.'
[[ $slices =~ ^[1-9][0-9]*$ ]] || die "--slices=$slices must be 1 or more."
[[ $queued || $slices == 1 && ! $wait ]] || die '--direct gives one slice, now or never: leave out' \
    '--slices and --wait.'
[[ $workdir || ! ${BUCKET-} ]] || workdir=gs://$BUCKET/runs/$name

where=("--zone=$zone" ${project:+"--project=$project"})
if [[ $queued ]]; then
    group=queued-resources state_field='value(state.state)' all=(--worker=all --node=all)
else
    group=tpu-vm state_field='value(state)' all=(--worker=all)
fi

tpu() { do_it gcloud compute tpus "$group" "$@" "${where[@]}"; }

on_workers() { tpu ssh "$name" "${all[@]}" "--command=$1"; }

# Sets `state`: of the slices, '' where there are none.
look() {
    local describe=(gcloud compute tpus "$group" describe "$name" "--format=$state_field"
        "${where[@]}")
    state=''
    if [[ $dry ]]; then
        quoted "${describe[@]}"
    elif state=$("${describe[@]}" 2>&1); then
        state=${state##*$'\n'}
    elif [[ $state == *NOT_FOUND* ]]; then
        state=''
    else
        die "$state"
    fi
}

plan_run() { plan_first "$type" "$slices" "$@"; }

check_type() {
    [[ $type ]] || die 'which accelerator? Give --type=TYPE, one of' \
        "gcloud compute tpus accelerator-types list --zone=$zone"
    [[ $version ]] || die 'which runtime? Give --version=VERSION, one of' \
        "gcloud compute tpus versions list --zone=$zone"
}

create() {
    look
    case $state in
        '') ;;
        READY | ACTIVE) echo "$name is there: used as it is."; return ;;
        PREEMPTED | TERMINATED | STOPPED | SUSPENDED | FAILED)
            die "$name is $state: delete it, then create it again; its run goes on." ;;
        *) echo "$name is $state already: status says when it is there."; return ;;
    esac
    ask
}

ask() {
    local nodes=("--node-id=$name")
    ((slices == 1)) || nodes=("--node-count=$slices" "--node-prefix=$name")
    if [[ $queued ]]; then
        tpu create "$name" "${nodes[@]}" "--accelerator-type=$type" \
            "--runtime-version=$version" ${spot:+"$spot"} ${wait:+"--valid-until-duration=$wait"}
    else
        tpu create "$name" "--accelerator-type=$type" "--version=$version" ${spot:+"$spot"}
    fi
}

delete() {
    if [[ $queued ]]; then tpu delete "$name" --force --quiet; else tpu delete "$name" --quiet; fi
}

# A Python of its own: the images' may be too old. FUSE as cloud.google.com/storage/docs says.
install_on_worker=$(cat <<'END'
set -e
rm -rf pkm_jax && mkdir pkm_jax && tar -xzf pkm_jax.tar.gz -C pkm_jax && cd pkm_jax
python3 -m pip install --quiet --user uv
python3 -m uv venv --quiet --python 3.11 .venv
python3 -m uv pip install --quiet --python .venv/bin/python --constraint requirements/lock-py311.txt \
    --constraint requirements/lock-py311-tpu.txt --editable '.[train,tpu]'
if ! command -v gcsfuse > /dev/null; then
    key=/usr/share/keyrings/cloud.google.asc
    packages=https://packages.cloud.google.com/apt
    curl -fsS $packages/doc/apt-key.gpg | sudo tee $key > /dev/null
    echo "deb [signed-by=$key] $packages gcsfuse-$(lsb_release -cs) main" |
        sudo tee /etc/apt/sources.list.d/gcsfuse.list > /dev/null
    sudo apt-get update -q && sudo apt-get install -qy gcsfuse
fi
END
)

install() {
    do_it git archive --format=tar.gz --output=/tmp/pkm_jax.tar.gz HEAD
    tpu scp /tmp/pkm_jax.tar.gz "$name:pkm_jax.tar.gz" "${all[@]}"
    on_workers "$install_on_worker"
}

# Sets `folder`, where the workers find the run's folder, and `mount`, what puts it there.
place() {
    folder=$workdir mount=''
    case $workdir in
        gs://?*/?*)
            local bucket=${workdir#gs://} here
            bucket=${bucket%%/*} here=/mnt/gcs/$bucket
            folder=/mnt/gcs/${workdir#gs://}
            # Checkpoints are finished by renaming their folder.
            # shellcheck disable=SC2016  # the worker's $USER
            printf -v mount 'mountpoint -q %q || sudo install -d -o "$USER" %q
mountpoint -q %q || gcsfuse --implicit-dirs --rename-dir-limit=1000000 %q %q' \
                "$here" "$here" "$here" "$bucket" "$here"
            ;;
        /*) ;;
        *) die "--workdir='$workdir' must be gs://BUCKET/FOLDER, or the path of a folder that all" \
            'workers share.' ;;
    esac
}

run() {
    local folder mount words line
    place
    if [[ $secrets ]]; then
        [[ -r $secrets ]] || die "--secrets=$secrets cannot be read."
        on_workers 'install -m 600 /dev/null secrets.env'
        tpu scp "$secrets" "$name:secrets.env" "${all[@]}"
    fi
    unattended "$@"
    line=$(quoted "${words[@]}" --config.distributed.enabled=True "--config.workdir=$folder" \
        "--config.data.cache=${folder%/*}/data" \
        "--config.compilation_cache=${folder%/*}/compiled")     # the first process writes for all
    on_workers "set -e
if pgrep -F pretrain.pid &> /dev/null; then
    echo 'a run is under way: stop it first' >&2
    exit 1
fi
$mount
rm -f pretrain.pid pretrain.status pretrain.stop
if [ -e secrets.env ]; then set -a; . ./secrets.env; set +a; fi
cd pkm_jax
(   set +e
    nohup .venv/bin/python -m pkm_jax.pretrain $line &
    echo \$! > ../pretrain.pid
    wait \$!
    echo \$? > ../pretrain.status ) >> ../pretrain.log 2>&1 < /dev/null &
until [ -s ../pretrain.pid ]; do sleep .1; done"
}

# What each worker says of its run: running, stopped by hand, its exit status, ready, or bare.
run_on_worker=$(cat <<'END'
if pgrep -F pretrain.pid > /dev/null 2>&1; then run=running
elif [ -e pretrain.status ] && [ -e pretrain.stop ]; then run=stopped
elif [ -e pretrain.status ]; then run=$(cat pretrain.status)
elif [ -e pkm_jax/.venv/bin/python ]; then run=ready
else run=bare; fi
echo "run: $run"
END
)

status() {
    tpu describe "$name" "--format=$state_field"
    on_workers "$run_on_worker; tail -n 1 pretrain.log 2> /dev/null || true"
}

note() { echo "$(date '+%F %T') $name: $*"; }

# Looks until the run is done; what it would do is printed in order by a dry run.
watch() {
    local folder mount
    place
    plan_run "$@"
    if [[ $dry ]]; then
        look; ask; install; run "$@"; on_workers "$run_on_worker"; delete
        return
    fi
    local state before='' failures=0 unreached=0
    while :; do
        look
        [[ $state == "$before" ]] || note "${state:-there are none: asking for them}"
        before=$state
        case $state in
            '') ask ;;
            ACTIVE | READY) keep_running "$@" ;;
            SUSPENDED | PREEMPTED | TERMINATED | STOPPED)
                note 'preempted: made anew, and the run goes on'
                delete
                continue ;;
            FAILED)
                tpu describe "$name" >&2 || true
                die "$name is FAILED, as described above: delete it, then watch again." ;;
        esac
        sleep "$every"
    done
}

# One look at the run on slices that are there; ends the program where it is done.
keep_running() {
    local said
    if ! said=$(on_workers "$run_on_worker" 2>&1); then
        # A slice that is being preempted looks like this for a while.
        ((++unreached < 10)) || die "the workers of $name cannot be reached: $said"
        note "workers cannot be reached: ${said##*$'\n'}"
        return
    fi
    unreached=0
    said=$(sed -n 's/^run: //p' <<< "$said" | sort -u)
    case $'\n'$said$'\n' in
        *$'\n'running$'\n'*) return ;;
        *$'\n'stopped$'\n'*) note 'stopped by hand'; exit 0 ;;
        *$'\n'bare$'\n'*) install; run "$@"; return ;;
        *$'\n'ready$'\n'*) run "$@"; return ;;
        $'\n0\n') note "done; $name costs until: launch/tpu_pod.sh --name=$name … delete"; exit 0 ;;
    esac
    local worst
    for worst in 2 3 5; do
        if [[ $'\n'$said$'\n' == *$'\n'$worst$'\n'* ]]; then
            note "ended with status $worst, which another start would not change; see its logs"
            exit "$worst"
        fi
    done
    # The other processes of one that failed end with 134, or its launcher's signal.
    if [[ $said =~ (^|$'\n')(1|4|134|137|139)($|$'\n') ]]; then
        worst=${BASH_REMATCH[2]}
        ((++failures <= restarts)) || { note "failed $failures times: $said"; exit "$worst"; }
        note "ended with status $worst: start $failures of $restarts"
    else
        note "ended with status ${said//$'\n'/, }: it goes on"
    fi
    run "$@"
}

need gcloud 'see cloud.google.com/sdk/docs/install'
# shellcheck disable=SC2016  # the worker's $(…)
case $command in
    watch) check_type; watch "$@" ;;
    plan) [[ $type ]] || check_type; plan_run "$@" ;;
    create)
        check_type
        (($# == 0)) || plan_run "$@"
        create ;;
    install) install ;;
    run) run "$@" ;;
    status) status ;;
    logs)
        all=("--worker=$worker" ${queued:+--node=0})
        on_workers 'tail -n 100 -F pretrain.log' ;;
    stop) on_workers 'touch pretrain.stop; kill -TERM "$(cat pretrain.pid)"' ;;
    delete) delete ;;
    *) die "unknown command $command: watch, plan, create, install, run, status, logs, stop or" \
        'delete; see --help' ;;
esac

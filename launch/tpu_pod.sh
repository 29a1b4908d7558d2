#!/usr/bin/env bash
# Pretraining on a Cloud TPU slice of any number of hosts. Run it from this repository.
# Commands and flags follow the gcloud reference for `compute tpus tpu-vm` and `queued-resources`
# (cloud.google.com/sdk/gcloud/reference, pages of May 2025); never run on a real slice.
set -euo pipefail

usage() {
    cat <<'END'
launch/tpu_pod.sh [option …] COMMAND

  create    makes the slice, or uses the one that is there
  install   puts this commit and its environment on all workers
  run --config=configs/NAME.py [--config.section.field=value …]
            starts python -m pkm_jax.pretrain on all workers, in the background
  logs      follows what a worker prints
  stop      asks the run to save a checkpoint and stop; the same `run` goes on from there
  delete    removes the slice; the run's folder stays

  --name=NAME         of the slice; required
  --zone=ZONE         for example us-west4-a; required
  --project=PROJECT   gcloud's own choice where it is not given
  --type=TYPE         create: accelerator type, for example v5litepod-16
  --version=VERSION   create: runtime, for example v2-alpha-tpuv5-lite
  --spot              create: cheaper, and preempted at any time
  --queued            create, delete: through a queued resource, which waits for capacity
  --workdir=PLACE     run: gs://BUCKET/FOLDER, mounted on all workers by Cloud Storage FUSE, or the
                      path of a folder that all workers share
  --worker=N          logs: which worker; 0 where it is not given
  --dry-run           prints the commands, to be pasted, and runs none
  --help              prints this

A spot slice gets some 30 seconds: the run saves what it can, and in any case has the checkpoints of
--config.log.checkpoint_every. `delete`, `create`, `install` and the same `run` go on from there.
END
}

die() { echo "launch/tpu_pod.sh: $*" >&2; exit 2; }

name='' zone='' project='' type='' version='' workdir='' worker=0 spot='' queued='' dry=''
while (($#)); do
    case $1 in
        --name=*) name=${1#*=} ;;
        --zone=*) zone=${1#*=} ;;
        --project=*) project=${1#*=} ;;
        --type=*) type=${1#*=} ;;
        --version=*) version=${1#*=} ;;
        --workdir=*) workdir=${1#*=} ;;
        --worker=*) worker=${1#*=} ;;
        --spot) spot=--spot ;;
        --queued) queued=yes ;;
        --dry-run) dry=yes ;;
        --help) usage; exit ;;
        -*) die "unknown option $1: see --help" ;;
        *) break ;;
    esac
    shift
done
(($#)) || die 'no command: create, install, run, logs, stop or delete; see --help'
command=$1; shift
[[ $command == run ]] || (($# == 0)) || die "$command takes no arguments, but got: $*"
[[ $name ]] || die 'which slice? Give --name=NAME.'
[[ $zone ]] || die 'where? Give --zone=ZONE.'
where=("--zone=$zone" ${project:+"--project=$project"})

# Runs a command, or prints it so that a shell reads the same words.
do_it() {
    if [[ $dry ]]; then
        local words
        printf -v words ' %q' "$@"
        echo "${words:1}"
    else
        "$@"
    fi
}

tpu() { do_it gcloud compute tpus tpu-vm "$@" "${where[@]}"; }

on_workers() {      # which, what
    tpu ssh "$name" "--worker=$1" "--command=$2"
}

create() {
    [[ $type ]] || die 'which accelerator? Give --type=TYPE, one of' \
        "gcloud compute tpus accelerator-types list --zone=$zone"
    [[ $version ]] || die 'which runtime? Give --version=VERSION, one of' \
        "gcloud compute tpus versions list --zone=$zone"
    local describe=(describe "$name" '--format=value(state)') state=''
    if [[ $dry ]]; then
        tpu "${describe[@]}"
    else
        # Without an answer there is no slice, or create says what is wrong.
        state=$(tpu "${describe[@]}" 2> /dev/null) || true
    fi
    case $state in
        '') ;;
        READY) echo "$name is there: used as it is."; return ;;
        PREEMPTED | TERMINATED | STOPPED)
            die "$name is $state: delete it, then create it again; its run goes on." ;;
        *) die "$name is $state: wait until it is READY." ;;
    esac
    if [[ $queued ]]; then
        do_it gcloud compute tpus queued-resources create "$name" "--node-id=$name" "${where[@]}" \
            "--accelerator-type=$type" "--runtime-version=$version" ${spot:+"$spot"}
    else
        tpu create "$name" "--accelerator-type=$type" "--version=$version" ${spot:+"$spot"}
    fi
}

# A Python of its own: the images' may be too old. FUSE as cloud.google.com/storage/docs says.
install_on_worker=$(cat <<'END'
set -e
rm -rf pkm_jax && mkdir pkm_jax && tar -xzf pkm_jax.tar.gz -C pkm_jax && cd pkm_jax
python3 -m pip install --quiet --user uv
python3 -m uv venv --quiet --python 3.12 .venv
python3 -m uv pip install --quiet --python .venv/bin/python --editable '.[train,tpu]'
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
    tpu scp /tmp/pkm_jax.tar.gz "$name:pkm_jax.tar.gz" --worker=all
    on_workers all "$install_on_worker"
}

run() {
    (($#)) || die 'run what? Give --config=configs/NAME.py after run.'
    local folder=$workdir mount='' words
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
    printf -v words ' %q' "$@" --config.distributed.enabled=True "--config.workdir=$folder" \
        "--config.data.cache=${folder%/*}/data"
    on_workers all "set -e
if pgrep -F pretrain.pid &> /dev/null; then
    echo 'a run is under way: stop it first' >&2
    exit 1
fi
$mount
cd pkm_jax
nohup .venv/bin/python -m pkm_jax.pretrain$words >> ../pretrain.log 2>&1 < /dev/null &
echo \$! > ../pretrain.pid"
}

# shellcheck disable=SC2016  # the worker's $(…)
case $command in
    create) create ;;
    install) install ;;
    run) run "$@" ;;
    logs) on_workers "$worker" 'tail -n 100 -F pretrain.log' ;;
    stop) on_workers all 'kill -TERM "$(cat pretrain.pid)"' ;;
    delete)
        if [[ $queued ]]; then
            do_it gcloud compute tpus queued-resources delete "$name" --force --quiet "${where[@]}"
        else
            tpu delete "$name" --quiet
        fi ;;
    *) die "unknown command $command: create, install, run, logs, stop or delete; see --help" ;;
esac

#!/usr/bin/env bash
# Plans a run on spot TPUs or GPUs, then launches launch/sky.yaml by SkyPilot.
set -euo pipefail
script=sky.sh
here=$(dirname "${BASH_SOURCE[0]}")
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$here/common.sh"

usage() {
    cat <<'END'
launch/sky.sh [option …] [sky's option …] --config=NAME [--config.section.field=value …]

    launch/sky.sh --name=one --accelerators=tpu-v6e-8 --bucket=gs://BUCKET \
        --config=bert_base_pkm --config.data.corpus='/bucket/corpora/*.jsonl.xz'
    launch/sky.sh --name=one --accelerators=H100:8 --bucket=gs://BUCKET --on-demand --config=bert_base_pkm
    launch/sky.sh --name=one --accelerators=H100:8 --bucket=gs://BUCKET --dry-run --config=bert_base_pkm

Guide: docs/launch.md, "SkyPilot".
Says whether the run fits, its tokens/s, days and chip hours, then launches launch/sky.yaml as a
managed job (`sky jobs launch`), which finds a node where there is one, and another one when that is
preempted; the run goes on from its newest checkpoint. Run it from this repository.

  --name=NAME          of the job, and of the run's folder in the bucket; required
  --accelerators=WHAT  as SkyPilot names them: tpu-v6e-8, tpu-v5litepod-8, H100:8, …; required
  --bucket=BUCKET      gs://NAME or s3://NAME; else gs://$BUCKET; required
  --on-demand          dearer, and not preempted
  --price=PRICE        of a chip for an hour: the plan then says what the run costs
  --no-plan            launches without a plan, or against it
  --dry-run            prints the commands, to be pasted, and runs none
  --help               prints this

Secrets go by sky's own --secret=NAME, which takes NAME's value from the environment.
`sky jobs queue`, `sky jobs logs` and `sky jobs cancel` do the rest.
END
}

name='' what='' bucket=${BUCKET:+gs://$BUCKET} spot=--use-spot price='' plan=yes dry='' options=()
while (($#)); do
    case $1 in
        --name=*) name=${1#*=} ;;
        --accelerators=*) what=${1#*=} ;;
        --bucket=*) bucket=${1#*=} ;;
        --on-demand) spot=--no-use-spot ;;
        --price=*) price=${1#*=} ;;
        --no-plan) plan='' ;;
        --dry-run) dry=yes ;;
        --help) usage; exit ;;
        --config*) break ;;
        --secret=*=*) die "${1%=*}=…: a secret is named, and its value taken from the environment." ;;
        --*) options+=("$1") ;;
        *) die "$1: give sky's options as --name=value, before --config=NAME." ;;
    esac
    shift
done
(($#)) || die 'what to train? Give --config=NAME; see --help.'
[[ $name ]] || die 'which job? Give --name=NAME.'
[[ $what ]] || die 'on what? Give --accelerators=tpu-v6e-8 or others, see sky show-gpus --all.'
[[ $bucket == *://* ]] || die "--bucket='$bucket' must be gs://NAME or s3://NAME, or set BUCKET."
need sky 'pip install "skypilot[gcp]", then sky check'

accelerator=tpu topology=$what
if [[ $what != tpu-* ]]; then
    accelerator=cuda topology=${what,,}
    [[ $what == *:* ]] || topology+=:1
    topology=${topology/-80gb/}
fi
plan_first "$topology" 1 "$@"
unattended "$@"
do_it sky jobs launch --yes "--name=$name" "--gpus=$what" "$spot" --env "ACCELERATOR=$accelerator" \
    --env "BUCKET=$bucket" --env "FOLDER=runs/$name" --env "WORDS=$(quoted "${words[@]}")" \
    ${options[@]+"${options[@]}"} "$here/sky.yaml"

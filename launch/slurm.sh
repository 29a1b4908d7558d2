#!/usr/bin/env bash
# Plans a run on the GPUs of a Slurm cluster, then submits launch/slurm.sbatch.
set -euo pipefail
script=slurm.sh
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
    cat <<'END'
launch/slurm.sh [option …] [sbatch's option …] --config=NAME [--config.section.field=value …]

    launch/slurm.sh --gpu=h100 --nodes=4 --gpus-per-node=8 --partition=gpu \
        --config=bert_base_pkm --config.data.corpus='/corpora/*.jsonl.xz'
    launch/slurm.sh --gpu=a100 --processes=node --time=24:00:00 --config=bert_base_pkm
    launch/slurm.sh --gpu=h100 --dry-run --config=bert_base_pkm

Guide: docs/launch.md, "Slurm".
Says whether the run fits, its tokens/s, days and GPU hours, then submits launch/slurm.sbatch, whose
--help says what the job does. Run it from this repository, whose .venv and runs all nodes must see.

  --gpu=GPU          a100, h100 or h200: what is planned for; required
  --processes=WHICH  gpu: a process for each (where it is not given); node: one for all of a node
  --price=PRICE      of a GPU for an hour: the plan then says what the run costs
  --no-plan          submits without a plan, or against it
  --dry-run          prints the commands, to be pasted, and runs none
  --help             prints this
END
}

gpu='' processes=gpu price='' plan=yes dry='' nodes=2 gpus=8 options=()
while (($#)); do
    case $1 in
        --gpu=*) gpu=${1#*=} ;;
        --processes=*) processes=${1#*=} ;;
        --price=*) price=${1#*=} ;;
        --no-plan) plan='' ;;
        --dry-run) dry=yes ;;
        --help) usage; exit ;;
        --config*) break ;;
        --nodes=*) nodes=${1#*=} ;;
        --gpus-per-node=*) gpus=${1#*=} ;;
        --ntasks-per-node=*) die "$1: give --processes=gpu or --processes=node." ;;
        --*=*) options+=("$1") ;;
        *) die "$1: give sbatch's options as --name=value, before --config=NAME." ;;
    esac
    shift
done
(($#)) || die 'what to train? Give --config=NAME; see --help.'
[[ $gpu || ! $plan ]] || die 'for which GPUs? Give --gpu=h100 or another one, or --no-plan.'
[[ $nodes$gpus =~ ^[0-9]+$ ]] || die "--nodes=$nodes --gpus-per-node=$gpus must be numbers."
case $processes in
    gpu) tasks=$gpus ;;
    node) tasks=1 ;;
    *) die "--processes=$processes must be gpu or node." ;;
esac
need sbatch 'submit from a login node of the cluster.'

plan_first "$gpu:$((nodes * gpus))" 1 "$@"
do_it sbatch "--nodes=$nodes" "--gpus-per-node=$gpus" "--ntasks-per-node=$tasks" \
    "--cpus-per-task=$((8 * gpus / tasks))" ${options[@]+"${options[@]}"} launch/slurm.sbatch "$@"

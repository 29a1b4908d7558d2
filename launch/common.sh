# shellcheck shell=bash
# shellcheck disable=SC2154     # what is set by those that source it
# What the launchers share. They set: script, their name; dry, whether commands are only printed;
# plan, whether to plan first; price, of a chip for an hour, or nothing.

python=${PYTHON:-.venv/bin/python}

die() { echo "launch/$script: $*" >&2; exit 2; }

# A command line that a shell reads as the same words.
quoted() {
    local words
    printf -v words ' %q' "$@"
    echo "${words:1}"
}

# Runs a command, or prints it.
do_it() {
    if [[ $dry ]]; then quoted "$@"; else "$@"; fi
}

need() {        # a tool, and where it comes from
    [[ $dry ]] || command -v "$1" > /dev/null || die "there is no $1 on PATH: $2"
}

# Sets `words`: the run's, with what one needs that nobody watches: where it hangs it ends.
unattended() {
    words=("$@")
    [[ " $* " == *' --config.log.hang_exit'* ]] || words+=(--config.log.hang_exit=True)
}

# Says whether a run fits, how long it takes and what it costs, before anything is paid for.
plan_first() {  # topology, slices, the run's words
    [[ $plan ]] || return 0
    need "$python" "set PYTHON, or make it by \`make\`; --no-plan launches without a plan"
    local status=0
    do_it "$python" -m pkm_jax.compile_check "--topology=$1" "--slices=$2" \
        ${price:+"--price=$price"} "${@:3}" || status=$?
    case $status in
        0) ;;
        5) die 'it does not fit, so nothing was launched; --no-plan launches it all the same.' ;;
        *) die "it could not be planned (status $status), so nothing was launched;" \
            '--no-plan launches without a plan.' ;;
    esac
}

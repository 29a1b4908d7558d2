import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
TOOLS = 'gcloud', 'gcluster', 'kubectl', 'srun', 'sbatch', 'scontrol', 'sky', 'git', 'planner'
# What the scripts call besides: nothing else of this machine is on their PATH.
USED = 'bash', 'date', 'dirname', 'sed', 'sort', 'seq', 'cat', 'sleep', 'head'


class Result(NamedTuple):
    status: int
    printed: str
    errors: str
    called: list[list[str]]     # the commands, words apart
    given: str                  # what they were given on their standard input


@pytest.fixture
def launch(tmp_path):
    """Runs a script of launch/ among stand-ins for the commands it calls, which only note them.

    `answers` maps the start of a command to the shell code of its stand-in's answer, in which
    `count` is how often it was called so before. `lacking` are tools that are not there.
    """
    def run(script, *words, cwd=ROOT, answers=None, lacking=(), **environment):
        noted, given, bin_ = (tmp_path / name for name in ('called', 'given', 'bin'))
        noted.write_text('')
        given.write_text('')
        bin_.mkdir(exist_ok=True)
        for name in USED:
            if not (bin_ / name).exists():
                (bin_ / name).symlink_to(subprocess.check_output(['which', name], text=True).strip())
        for name in TOOLS:
            (bin_ / name).unlink(missing_ok=True)
            if name not in lacking:
                (bin_ / name).write_text(_stand_in(name, answers or {}, noted, given))
                (bin_ / name).chmod(0o755)
        environment = {'PATH': str(bin_), 'HOME': str(tmp_path), 'PYTHON': 'planner',
                       'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu', **environment}
        interpreter = sys.executable if script.endswith('.py') else bin_ / 'bash'
        done = subprocess.run([interpreter, ROOT / 'launch' / script, *words], env=environment,
                              cwd=cwd, text=True, capture_output=True, timeout=60)
        return Result(done.returncode, done.stdout, done.stderr, spoken(noted.read_text()),
                      given.read_text())

    return run


def _stand_in(name, answers, noted, given):
    cases = '\n'.join('{}*) {} ;;'.format(start.replace(' ', '\\ '), code)
                      for start, code in answers.items())
    reads = f'cat >> {given}\n' if name == 'kubectl' else ''
    return (f'#!/usr/bin/env bash\nthis=$(printf "%q " {name} "$@")\n'
            f'count=0; while read -r line; do [[ "$line " != "$this" ]] || ((++count)); done < {noted}\n'
            f'echo "$this" >> {noted}\n{reads}case "{name} $*" in\n{cases}\nesac\n')


def spoken(text):
    """The words of each of the lines of shell commands, by a shell's reading of them.

    Python's reading has no $'…', which bash writes for words of several lines.
    """
    if not text:
        return []
    code = '\n'.join(f'printf "%s\\0" {line}; printf "\\n\\0"' for line in text.splitlines())
    words = subprocess.run(['bash', '-c', code], text=True, capture_output=True, check=True).stdout
    return [line.split('\0')[:-1] for line in words.split('\n\0')[:-1]]


@pytest.fixture
def read():
    """Reads lines of shell commands as words."""
    return spoken


@pytest.fixture
def plan():
    """The command that plans a run, by the words of its end."""
    return lambda topology, *words, slices=1: [
        'planner', '-m', 'pkm_jax.compile_check', f'--topology={topology}', f'--slices={slices}',
        *words]

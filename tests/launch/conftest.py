import os
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]


class Result(NamedTuple):
    status: int
    printed: str
    errors: str
    called: list[list[str]]     # the commands, words apart


@pytest.fixture
def launch(tmp_path):
    """Runs a script of launch/ among stand-ins for the commands it calls, which only note them.

    `answers` maps the start of a command to the shell code of its stand-in's answer.
    """
    def run(script, *words, cwd=ROOT, answers=None, **environment):
        noted = tmp_path / 'called'
        noted.write_text('')
        for name in ('gcloud', 'srun', 'scontrol', 'git'):
            stand_in = tmp_path / 'bin' / name
            stand_in.parent.mkdir(exist_ok=True)
            cases = '\n'.join('{}*) {} ;;'.format(start.replace(' ', '\\ '), code)
                              for start, code in (answers or {}).items())
            stand_in.write_text(
                f'#!/usr/bin/env bash\nprintf "%q " {name} "$@" >> {noted}; echo >> {noted}\n'
                f'case "{name} $*" in\n{cases}\nesac\n')
            stand_in.chmod(0o755)
        environment = {'PATH': f'{tmp_path}/bin:{os.environ["PATH"]}', 'HOME': str(tmp_path),
                       **environment}
        done = subprocess.run(['bash', ROOT / 'launch' / script, *words], env=environment, cwd=cwd,
                              text=True, capture_output=True, timeout=30)
        return Result(done.returncode, done.stdout, done.stderr, spoken(noted.read_text()))

    return run


def spoken(text):
    """The words of each of the lines of shell commands, by a shell's reading of them.

    Python's reading has no $'…', which bash writes for words of several lines.
    """
    called = []
    for line in text.splitlines():
        words = subprocess.run(['bash', '-c', f'printf "%s\\0" {line}'], text=True,
                               capture_output=True, check=True).stdout
        called.append(words.split('\0')[:-1])
    return called


@pytest.fixture
def read():
    """Reads lines of shell commands as words."""
    return spoken

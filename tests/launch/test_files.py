"""What holds of all that launches: shell that a checker finds sound, images of locked versions."""

import re
import shutil
import subprocess
import sys
from importlib.metadata import requires, version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted([*(ROOT / 'launch').glob('*.sh'), ROOT / 'launch' / 'slurm.sbatch'])
DOCKERFILE = (ROOT / 'launch' / 'Dockerfile').read_text()
ACCELERATORS = ('tpu', 'cuda')


def pins(name):
    lines = (ROOT / 'requirements' / f'{name}.txt').read_text().splitlines()
    return dict(line.lower().replace('_', '-').split('==') for line in lines if '==' in line)


def test_shellcheck_finds_nothing():
    checker = shutil.which('shellcheck', path=str(Path(sys.executable).parent))
    if checker is None:
        pytest.skip("no shellcheck: pip install -e '.[dev]'")
    done = subprocess.run([checker, '--external-sources', *SCRIPTS], text=True, capture_output=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize('accelerator', ACCELERATORS)
def test_what_an_accelerator_needs_is_locked(accelerator):
    """The versions that the locked jax itself asks for."""
    locked, extra = pins('lock-py311'), pins(f'lock-py311-{accelerator}')
    if version('jax') != locked['jax']:
        pytest.skip(f'jax {version("jax")} is not the locked {locked["jax"]}, and asks for others')
    assert not locked.keys() & extra.keys() and extra
    wanted = {'tpu': 'tpu', 'cuda': 'cuda13'}[accelerator]
    asked = [one for one in requires('jax') if f'extra == "{wanted}"' in one.replace("'", '"')]
    assert asked
    for requirement in asked:
        name, least = re.match(r'([\w-]+)(?:\[.*?\])?\s*\(?(?:==|<=.*>=|>=)?([\d.]*)', requirement).groups()
        name = name.lower().replace('_', '-')
        assert name in locked | extra, requirement
        if '==' in requirement:
            assert (locked | extra)[name].startswith(least.rstrip('.*')), requirement


def test_images_have_the_locked_versions_and_no_root():
    steps = re.findall(r'^([A-Z]+) ((?:.*\\\n)*.*)', DOCKERFILE, re.M)
    users = [words for verb, words in steps if verb == 'USER']
    assert users == ['1000:1000'] and 'useradd --uid 1000' in DOCKERFILE
    installs = [words for verb, words in steps if 'pip install' in words]
    assert all('--no-deps' in words for words in installs)
    assert '--requirement requirements/lock-py311.txt' in installs[0]
    assert '--requirement "requirements/lock-py311-$ACCELERATOR.txt"' in installs[0]
    assert [verb for verb, _ in steps].index('USER') > max(
        number for number, (verb, _) in enumerate(steps) if verb in ('RUN', 'COPY'))


def test_images_copy_what_is_there_and_not_left_out():
    """.dockerignore leaves out all but what it names."""
    let_in = re.findall(r'^!(\S+)', (ROOT / '.dockerignore').read_text(), re.M)
    copied = [word for line in re.findall(r'^COPY (.*) \S+$', DOCKERFILE, re.M) for word in line.split()]
    assert sorted(copied) == sorted(let_in) and all((ROOT / name).exists() for name in copied)


def test_no_flags_are_set_that_nothing_measured_asks_for():
    """XLA's and libtpu's own are what plans compile with: docs/launch.md."""
    for path in [*SCRIPTS, *(ROOT / 'launch' / name for name in ('gke.py', 'sky.yaml', 'Dockerfile'))]:
        assert not re.search('XLA_FLAGS|LIBTPU_INIT_ARGS|--xla_', path.read_text()), path


@pytest.mark.parametrize('words, added', [
    (['--config=a'], ['--config.log.hang_exit=True']), (['--config=a', '--config.log.hang_exit=False'], [])])
def test_runs_that_nobody_watches_end_where_they_hang(words, added):
    code = f'source {ROOT}/launch/common.sh; unattended "$@"; printf "%s\\n" "${{words[@]}}"'
    done = subprocess.run(['bash', '-c', code, 'x', *words], text=True, capture_output=True, check=True)
    assert done.stdout.split() == words + added

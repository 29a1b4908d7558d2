"""What an installed package brings and needs."""

import importlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']


def test_requirements_are_those_of_the_layer_and_of_training():
    lines = (ROOT / 'requirements.txt').read_text().splitlines()
    listed = [line for line in lines if line and not line.startswith('#')]
    assert listed == PROJECT['dependencies'] + PROJECT['optional-dependencies']['train']


@pytest.mark.parametrize('python', ['py311', 'py313'])
def test_locked_versions_are_within_the_requirements(python):
    """Every direct dependency is locked, and nothing comes from a folder."""
    locked = (ROOT / 'requirements' / f'lock-{python}.txt').read_text().splitlines()
    pins = dict(line.split('==') for line in locked if line and not line.startswith('#'))
    names = {name.lower().replace('_', '-').replace('.', '-'): version
             for name, version in pins.items()}
    for requirement in (*PROJECT['dependencies'], *PROJECT['optional-dependencies']['train'],
                        *PROJECT['optional-dependencies']['dev']):
        name, operator, least = re.match(r'([\w-]+)(>=|==)([\d.]+)', requirement).groups()
        version = names[name.lower()]
        assert numbers(version) >= numbers(least), requirement
        assert operator == '>=' or version == least, requirement


def test_the_version_is_the_same_everywhere():
    citation = (ROOT / 'CITATION.cff').read_text()
    assert re.search(r'^version: (.*)$', citation, re.MULTILINE)[1] == PROJECT['version']
    assert f'\n## {PROJECT["version"]}' in (ROOT / 'CHANGELOG.md').read_text()


def numbers(version):
    return tuple(int(part) for part in version.split('.') if part.isdigit())


def test_every_configuration_is_in_the_package():
    names = {path.stem for path in (ROOT / 'configs').glob('*.py')}
    assert {path.stem for path in (ROOT / 'pkm_jax' / 'configs').glob('*.py')} == names
    for name in names:
        assert callable(importlib.import_module(f'pkm_jax.configs.{name}').get_config)


def test_the_layer_needs_nothing_of_the_program():
    """`import pkm_jax` loads no package that comes with the extra `train` alone."""
    code = ('import sys; from flax import nnx; import optax; before = set(sys.modules); '
            'import pkm_jax; print(*set(sys.modules) - before)')
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True,
                          cwd=ROOT)
    loaded = {name.split('.')[0] for name in done.stdout.split()}
    assert not loaded & {'orbax', 'tensorflow_datasets', 'array_record', 'grain', 'ml_collections',
                         'tokenizers', 'matplotlib', 'tensorboardX', 'tqdm', 'safetensors'}

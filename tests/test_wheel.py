"""The wheel in environments that hold nothing else: minutes, and a package index."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import pkm_jax
from tests.test_documents import PROGRAMS

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]


def run(*words, cwd):
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True, check=False,
                          env={'PATH': '/usr/bin:/bin', 'HOME': str(cwd), 'JAX_PLATFORMS': 'cpu'})
    assert done.returncode == 0, f'{words}: {done.stdout[-2000:]}{done.stderr[-2000:]}'
    return done.stdout


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp('wheel')
    subprocess.run([sys.executable, '-m', 'pip', 'wheel', '--quiet', '--no-deps', '--wheel-dir',
                    folder, ROOT], check=True, cwd=folder)
    made, = folder.glob('*.whl')
    return made


def installed(wheel, folder, extra=''):
    """The Python of a new environment with the wheel."""
    subprocess.run([sys.executable, '-m', 'venv', folder / 'env'], check=True)
    python = folder / 'env/bin/python'
    subprocess.run([python, '-m', 'pip', 'install', '--quiet', f'{wheel}{extra}'], check=True,
                   cwd=folder)
    return str(python)


def test_the_layer_alone(wheel, tmp_path):
    python = installed(wheel, tmp_path)
    code = ('import importlib.util as util, pkm_jax, jax; from flax import nnx\n'
            'from pkm_jax import MemoryConfig, ProductKeyMemory\n'
            'names = [getattr(pkm_jax, name) for name in pkm_jax.__all__]\n'
            'memory = ProductKeyMemory(MemoryConfig(sub_keys=4, top_k=2), 8, rngs=nnx.Rngs(0))\n'
            'print(pkm_jax.__file__, len(names), memory(jax.numpy.ones((3, 8))).shape,\n'
            '      util.find_spec("tensorflow_datasets"))')
    path, *said = run(python, '-c', code, cwd=tmp_path).split(maxsplit=1)
    assert Path(path).is_relative_to(tmp_path / 'env')
    assert said == [f'{len(pkm_jax.__all__)} (3, 8) None\n']


def test_every_program_says_how_it_is_used(wheel, tmp_path):
    python = installed(wheel, tmp_path, '[train]')
    for program in PROGRAMS:
        module = f'pkm_jax.{program.removesuffix(".__main__")}'
        said = run(python, '-m', module, '--help', cwd=tmp_path)
        assert len(re.findall(rf'(?m)^    .*python -m {module}\b', said)) >= 3, said
        assert 'Guide: docs/' in said and ('flags:' in said or 'options:' in said), said
    said = run(python, '-c', 'from pkm_jax.configuration.command_line import shipped; '
               'print(*shipped())', cwd=tmp_path)
    assert said.split() == sorted(path.stem for path in (ROOT / 'configs').glob('*.py'))

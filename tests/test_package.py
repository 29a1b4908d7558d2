"""`import pkm_jax`: what it gives, what it needs, and what it takes."""

import importlib.resources
import re
import subprocess
import sys

import pkm_jax

NOT_NEEDED = {'tensorflow_datasets', 'tensorflow', 'grain', 'matplotlib', 'ml_collections', 'orbax',
              'tensorboardX', 'tokenizers', 'safetensors', 'tensorstore', 'tqdm', 'absl'}


def imported(names):
    """{module: microseconds of itself} that importing `names` imports, in a fresh process."""
    done = subprocess.run([sys.executable, '-X', 'importtime', '-c', f'import {names}'],
                          capture_output=True, text=True, check=True)
    return {name.strip(): int(own) for own, name in re.findall(
        r'import time: +(\d+) \| +\d+ \|( +\S+)', done.stderr)}


def test_public_names_are_there_and_documented():
    for name in pkm_jax.__all__:
        assert getattr(pkm_jax, name).__doc__, name
    assert importlib.resources.files('pkm_jax').joinpath('py.typed').is_file()


def test_import_needs_nothing_of_training_and_takes_under_a_second():
    host = imported('jax, jax.numpy, flax.nnx, optax, einops, jaxtyping, numpy')
    ours = {name: own for name, own in imported('pkm_jax').items() if name not in host}
    packages = {name.split('.')[0] for name in ours}
    assert 'pkm_jax' in packages and not packages & NOT_NEEDED
    assert not any('triton' in name for name in ours)
    assert sum(ours.values()) < 1e6

"""Arrows between packages point one way."""

import ast
from pathlib import Path

import pkm_jax

# Each may import what stands in a line above it; of its own line nothing but itself.
LEVELS = (
    ('refusal', 'console'), ('fields', 'mesh', 'dispatch', 'accelerators', 'xla_flags'),
    ('ops', 'data'), ('memory',),
    ('models',), ('optimizers',), ('tasks',), ('configuration', 'convert', 'configs', 'report'),
    ('processes',), ('checkpoints',), ('training', 'prediction'), ('planning', 'inspection'),
    ('pretrain', 'finetune', 'compile_check', 'convert_checkpoint', 'predict', 'inspect', 'replay',
     'status'), ('ablate',))
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}
ROOT = Path(pkm_jax.__file__).parent


def imports(path):
    """Parts of the package that a file imports, also within functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = ([alias.name for alias in node.names] if isinstance(node, ast.Import) else
                 [f'{node.module}.{alias.name}' for alias in node.names]
                 if isinstance(node, ast.ImportFrom) else [])
        for name in names:
            if name.startswith('pkm_jax.'):
                yield name.split('.')[1]


def test_no_file_imports_upwards_or_across():
    wrong = []
    for path in sorted(ROOT.rglob('*.py')):
        own = path.relative_to(ROOT).parts[0].removesuffix('.py')
        if own == '__init__' or '__pycache__' in path.parts:
            continue
        wrong += [f'{path.relative_to(ROOT)} imports {other}' for other in imports(path)
                  if other != own and LEVEL[other] >= LEVEL[own]]
    assert wrong == []


def test_every_package_has_its_level():
    found = {path.stem for path in ROOT.iterdir() if path.suffix == '.py' or path.is_dir()}
    assert found - {'__init__', '__pycache__', 'py'} == LEVEL.keys()

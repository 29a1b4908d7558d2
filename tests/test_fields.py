"""Fields of configurations take what is of their type; of the package itself tests check that too."""

import dataclasses

import numpy as np
import pytest

from pkm_jax.fields import check_settings, setting
from pkm_jax.refusal import Refusal


@dataclasses.dataclass(frozen=True)
class Section:
    """One field of each type that there is."""
    steps: int = setting(1, 'a', least=1)
    rate: float = setting(.5, 'b')
    name: str = setting('x', 'c')
    exact: bool = setting(False, 'd')
    lowercase: bool | None = setting(None, 'e')
    layers: tuple[int, ...] = setting((), 'f')
    profile: tuple[int, int] = setting((0, 0), 'g')


@pytest.mark.parametrize('field, value', [
    ('steps', np.int64(3)), ('rate', 1), ('rate', np.float32(.5)), ('lowercase', True),
    ('layers', (1, 2, 3)), ('layers', ()), ('profile', (1, 2))])
def test_what_is_of_the_type_is_taken(field, value):
    check_settings(Section(**{field: value}), 'section')


@pytest.mark.parametrize('field, value, kind', [
    ('steps', 1.5, 'int'), ('steps', True, 'int'), ('steps', None, 'int'), ('rate', '1', 'float'),
    ('rate', False, 'float'), ('name', [], 'str'), ('name', None, 'str'), ('exact', 1, 'bool'),
    ('lowercase', 'yes', r'bool \| None'), ('layers', (1, 'x'), r'tuple\[int, \.\.\.\]'),
    ('layers', 3, r'tuple\[int, \.\.\.\]'), ('profile', (1, 2, 3), r'tuple\[int, int\]'),
    ('profile', (1,), r'tuple\[int, int\]')])
def test_what_is_of_another_type_is_refused(field, value, kind):
    with pytest.raises(Refusal, match=rf'^section\.{field} = .* must be of the type {kind}\.$'):
        check_settings(Section(**{field: value}), 'section')

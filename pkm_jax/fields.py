"""Fields of configurations: a default, what it means, and the values that it can have."""

import dataclasses
import math
import numbers
import types
import typing
from typing import Any

from pkm_jax.refusal import Refusal


def setting(
    default: Any, help: str, *,
    least: int | float | None = None,
    most: int | float | None = None, above: int | float | None = None,
    below: int | float | None = None, choices: tuple[str, ...] = (),
) -> Any:
    """A dataclass field whose metadata say what it is for, in which unit, and within which bounds.

    `least` and `most` belong to the range, `above` and `below` do not.
    """
    bounds = {'least': least, 'most': most, 'above': above, 'below': below}
    return dataclasses.field(default=default, metadata={
        'help': help, 'choices': choices,
        **{name: bound for name, bound in bounds.items() if bound is not None}})


def check_settings(section: Any, name: str = '') -> None:
    """Refuses the first field of a dataclass that is out of its range, as `name`.field.

    Raises:
      Refusal: a value is not of the type that its field says, none of the choices, or out of range.
    """
    for field in dataclasses.fields(section):
        value, limits = getattr(section, field.name), field.metadata
        called = f'{name}.{field.name}' if name else field.name
        if limits and not _is_a(value, field.type):
            raise Refusal(f'{called} = {value!r} must be of the type {in_words(field.type)}.')
        if limits.get('choices') and value not in limits['choices']:
            raise Refusal(f'{called} = {value!r} is none of {limits["choices"]}.')
        if {'least', 'most', 'above', 'below'} & limits.keys() and not _within(value, limits):
            raise Refusal(f'{called} = {value!r} must be {bounds(limits)}.')


def in_words(kind: Any) -> str:
    """A type as it is written: 'int', 'tuple[int, ...]', 'bool | None'."""
    return kind.__name__ if type(kind) is type else str(kind)


def _is_a(value, kind):
    """Whether a value is of a type; whole numbers are numbers, True and False are neither."""
    if kind is Any:
        return True
    if isinstance(kind, types.UnionType):
        return any(_is_a(value, one) for one in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        of, rest = typing.get_args(kind)[:1], typing.get_args(kind)[1:]
        of = of * len(value) if rest == (...,) and isinstance(value, tuple) else (*of, *rest)
        return (isinstance(value, tuple) and len(value) == len(of)
                and all(map(_is_a, value, of)))
    if kind in (int, float):
        wanted = numbers.Integral if kind is int else numbers.Real
        return isinstance(value, wanted) and not isinstance(value, bool)
    return isinstance(value, kind)


def _within(value, limits):
    return (not math.isnan(value)
            and limits.get('least', -math.inf) <= value <= limits.get('most', math.inf)
            and ('above' not in limits or value > limits['above'])
            and ('below' not in limits or value < limits['below']))


def bounds(limits: Any) -> str:
    """The range in a field's metadata in words: '1 or more', 'above 0 and below 1'."""
    words = {'least': '{:,} or more', 'above': 'above {:,}', 'most': 'at most {:,}',
             'below': 'below {:,}'}
    return ' and '.join(form.format(limits[name]) for name, form in words.items() if name in limits)

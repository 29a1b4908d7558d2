"""Fields of configurations: a default, what it means, and the values that it can have."""

import dataclasses
import math
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
      Refusal: a value is not one of the choices, no number or tuple where one is due, or out of
        range.
    """
    hints = typing.get_type_hints(type(section))
    for field in dataclasses.fields(section):
        value, limits = getattr(section, field.name), field.metadata
        called = f'{name}.{field.name}' if name else field.name
        if isinstance(field.default, tuple) and not _is_tuple(value, hints[field.name]):
            raise Refusal(f'{called} = {value!r} must be {_in_words(hints[field.name])}.')
        if limits.get('choices') and value not in limits['choices']:
            raise Refusal(f'{called} = {value!r} is none of {limits["choices"]}.')
        if {'least', 'most', 'above', 'below'} & limits.keys() and not _within(value, limits):
            raise Refusal(f'{called} = {value!r} must be {bounds(limits)}.')


def _is_tuple(value, hint):
    """Whether a value is a tuple as `tuple[int, ...]` or `tuple[int, int]` say."""
    kinds = typing.get_args(hint)
    if not isinstance(value, tuple) or Ellipsis not in kinds and len(value) != len(kinds):
        return False
    kinds = kinds if Ellipsis not in kinds else kinds[:1] * len(value)
    return all(isinstance(one, (int, float) if kind is float else kind)
               for one, kind in zip(value, kinds))


def _in_words(hint):
    kinds = ('…' if kind is Ellipsis else kind.__name__ for kind in typing.get_args(hint))
    return f'({", ".join(kinds)})'


def _within(value, limits):
    return (isinstance(value, (int, float)) and not math.isnan(value)
            and limits.get('least', -math.inf) <= value <= limits.get('most', math.inf)
            and ('above' not in limits or value > limits['above'])
            and ('below' not in limits or value < limits['below']))


def bounds(limits: Any) -> str:
    """The range in a field's metadata in words: '1 or more', 'above 0 and below 1'."""
    words = {'least': '{:,} or more', 'above': 'above {:,}', 'most': 'at most {:,}',
             'below': 'below {:,}'}
    return ' and '.join(form.format(limits[name]) for name, form in words.items() if name in limits)

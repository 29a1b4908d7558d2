"""Columns of tables to texts and targets; what cannot be one is refused by file and line."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from pkm_jax.data.tables import Row
from pkm_jax.refusal import Refusal

LARGEST = float(np.finfo(np.float32).max)


class Texts(NamedTuple):
    """Rows of a split: what they say, what they are labelled with, and where they are."""
    texts: list[str]
    seconds: list[str] | None       # of pairs
    labels: list[Any] | None        # as they are written; None where they are not known
    places: list[str]


def texts_of(rows: Sequence[Row], text: str, second: str, label: str) -> Texts:
    """The columns of rows that all have them; `second` and `label` may be ''.

    Raises:
      Refusal: a text is no string.
    """
    def strings(column):
        for row in rows:
            if not isinstance(row.values[column], str):
                raise Refusal(f'{row.place}: {column!r} is {row.values[column]!r}, no text.')
        return [row.values[column] for row in rows]

    return Texts(strings(text), strings(second) if second else None,
                 [row.values[label] for row in rows] if label else None,
                 [row.place for row in rows])


def names_of(label: Any, place: str, separator: str = '') -> list[str]:
    """The names in a label: one, or those between `separator` (or in a list), maybe none.

    Raises:
      Refusal: there is none where one is due, or it is something else.
    """
    if separator:
        if isinstance(label, list):
            return [str(name) for name in label]
        return [name.strip() for name in str(label).split(separator) if name.strip()]
    if isinstance(label, (list, dict, float)) and not (
            isinstance(label, float) and label.is_integer()):
        raise Refusal(f'{place}: the label {label!r} is no name: set data.problem to '
                      "'regression' for numbers, to 'multi_label' for lists.")
    name = str(int(label) if isinstance(label, float) else label).strip()
    if not name:
        raise Refusal(f'{place} has no label: every example needs one.')
    return [name]


def label_names(labels: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """All names, numbers by their size, others by their letters."""
    names = {name for some in labels for name in some}
    try:
        return tuple(sorted(names, key=float))
    except ValueError:
        return tuple(sorted(names))


def numbers_of(
    labels: Sequence[Sequence[str]], known: Sequence[str], places: Sequence[str], trained: bool,
) -> list[list[int]]:
    """The places of names among the known ones.

    `trained`: these are those that the training data have, not those of a configuration.

    Raises:
      Refusal: a name is not known.
    """
    index = {name: number for number, name in enumerate(known)}
    for some, place in zip(labels, places):
        for name in some:
            if name not in index:
                shown = ', '.join(map(repr, known[:20])) + (', …' if len(known) > 20 else '')
                raise Refusal(
                    f'{place}: the label {name!r} is none of {shown}, '
                    + ('which are those of the training data: a label that was never seen there '
                       'cannot be learnt. Mend it, or add such examples.' if trained else
                       'which are the known ones (data.labels).'))
    return [[index[name] for name in some] for some in labels]


def values_of(labels: Sequence[Any], places: Sequence[str]) -> Float[np.ndarray, 'n']:
    """Numbers that are to be estimated.

    Raises:
      Refusal: one is no finite number, as float32 holds them.
    """
    found = []
    for label, place in zip(labels, places):
        try:
            value = float(label)
        except (TypeError, ValueError, OverflowError):
            value = math.nan
        if not abs(value) <= LARGEST:
            raise Refusal(f'{place}: {label!r} is no number, as regression needs. Mend it, or set '
                          "data.problem = 'single_label'.")
        found.append(value)
    return np.array(found, np.float64)


def balanced(numbers: Sequence[int], classes: int) -> Float[np.ndarray, 'classes']:
    """Weights that give all classes the same share, with mean 1 over these examples."""
    counts = Counter(numbers)
    return np.array([len(numbers) / (len(counts) * counts[number]) if counts[number] else 0.
                     for number in range(classes)], np.float32)


def held_out(size: int, share: float, seed: int = 0) -> tuple[Int[np.ndarray, 'a'],
                                                              Int[np.ndarray, 'b']]:
    """Numbers of examples to train on, and a share of at least one to validate on, both ascending.

    Raises:
      Refusal: there are fewer than two.
    """
    if size < 2:
        raise Refusal(f'{size} example cannot be split into some to train on and some to validate '
                      'on: name data.validation, or give more.')
    order = np.random.default_rng(seed).permutation(size)
    part = min(max(1, round(share * size)), size - 1)
    return np.sort(order[part:]), np.sort(order[:part])

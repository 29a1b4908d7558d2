"""Entities in labelled words, and their scores by the definition of CoNLL's conlleval.

A label is O, or a place in an entity and its type: B-PER begins one, I-PER goes on, E-PER ends it,
S-PER is one alone. Where labels contradict each other, an entity is what conlleval, and seqeval
after it, take it for: one of another type begins without B, one that was ended begins anew.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

_LABEL = re.compile(r'O|[BIES]-.+')


class Entity(NamedTuple):
    """Words from `first` to `last`, both in it, of a sentence."""
    sentence: int
    type: str
    first: int
    last: int


def are_entities(labels: Sequence[str]) -> bool:
    """Whether labels are of entities, not of words."""
    return any(label != 'O' for label in labels) and all(map(_LABEL.fullmatch, labels))


def entities(sentences: Sequence[Sequence[str]]) -> set[Entity]:
    """The entities of labelled sentences."""
    found = set()
    for number, labels in enumerate(sentences):
        first, before, kind = 0, 'O', ''
        for word, label in enumerate([*labels, 'O']):
            place, _, of = label.partition('-')
            goes_on = place in ('I', 'E') and before in ('B', 'I') and of == kind
            if not goes_on:
                if before != 'O':
                    found.add(Entity(number, kind, first, word - 1))
                first = word
            before, kind = place, of
    return found


def scores(
    gold: Sequence[Sequence[str]], guessed: Sequence[Sequence[str]],
) -> dict[str, float]:
    """Precision, recall and F1 of whole entities, and F1 by type."""
    theirs, ours = entities(gold), entities(guessed)
    values = _scores(theirs, ours)
    for kind in sorted({entity.type for entity in theirs}):
        values[f'f1_{kind}'] = _scores({one for one in theirs if one.type == kind},
                                       {one for one in ours if one.type == kind})['f1']
    return values


def _scores(theirs: set[Entity], ours: set[Entity]) -> dict[str, float]:
    right = len(theirs & ours)
    return {'precision': right / len(ours) if ours else 0.,
            'recall': right / len(theirs) if theirs else 0.,
            'f1': 2 * right / (len(ours) + len(theirs)) if ours or theirs else 0.}

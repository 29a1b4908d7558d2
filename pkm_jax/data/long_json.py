"""The text in a JSON object that is too long to be held: read piece by piece."""

import json
import re
from collections.abc import Iterable, Iterator

# The inside of a string up to its closing quote, or to an escape that the next piece completes.
_INSIDE = re.compile(r'(?:[^"\\]|\\u[0-9a-fA-F]{4}|\\[^u])*')
_FIRST_HALF = re.compile(r'\\u[dD][89abAB][0-9a-fA-F]{2}$')     # its second half may follow
_LONGEST_ESCAPE = 6


def text_of_long_object(pieces: Iterable[str]) -> Iterator[str]:
    """Yields the field "text" of the JSON object that `pieces` make up, in pieces of their size.

    Raises:
      ValueError: they are no JSON object, found before or after some of its text was yielded.
      KeyError: it has no text.
    """
    depth, value_of, word, found = 0, None, '', False
    for kind, part in _parts(pieces):
        if kind == 'string':
            if depth == 1 and value_of == 'text':
                found = True
                yield json.loads(f'"{part}"', strict=False)
            else:
                word = (word + part)[:len('text') + 1]
        elif part in '{[':
            if not depth and part != '{':
                raise ValueError('not an object')
            depth, word = depth + 1, ''
        elif part in '}]':
            depth -= 1
        elif depth == 1:
            value_of, word = (word, '') if part == ':' else (None, '')
    if depth:
        raise ValueError('cut short')
    if not found:
        raise KeyError('text')


def _parts(pieces: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yields ('string', some of its inside) and ('mark', one of {}[]:,) in their order."""
    inside, rest = False, ''
    for piece in pieces:
        rest += piece
        while rest:
            if not inside:
                outside, quote, rest = rest.partition('"')
                yield from (('mark', character) for character in outside if character in '{}[]:,')
                inside = bool(quote)
                continue
            part = _INSIDE.match(rest)[0]
            inside = not rest.startswith('"', len(part))
            if inside and (half := _FIRST_HALF.search(part)):
                part = part[:half.start()]
            yield 'string', part
            rest = rest[len(part) + (not inside):]
            if inside:
                if len(rest) > 2 * _LONGEST_ESCAPE:
                    raise ValueError(f'no escape: {rest[:_LONGEST_ESCAPE]}')
                break
    if inside or rest:
        raise ValueError('cut short within a string')

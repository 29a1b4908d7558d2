"""Questions over paragraphs, in the JSON of SQuAD 1.1 and 2.0 (Rajpurkar et al. 2016, 2018)."""

import gzip
import io
import json
import lzma
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pkm_jax.data.files import expand, parse_json, refuse_pointer
from pkm_jax.data.xz import open_xz
from pkm_jax.refusal import Refusal

MOST_BYTES = 2 ** 30    # of a file, unpacked: SQuAD 2.0 has 42 MB
_OPENERS: dict[str, Any] = {'.gz': gzip.open, '.xz': open_xz}


class Answer(NamedTuple):
    """A text and where it begins in its context, in characters."""
    text: str
    start: int


class Question(NamedTuple):
    """A question, its paragraph, and the answers that people gave: none where there is none."""
    id: str
    question: str
    context: str
    answers: tuple[Answer, ...]
    place: str


def read_squad(paths: Sequence[str]) -> list[Question]:
    """The questions of files, .json or also .gz or .xz, in their order.

    Raises:
      Refusal: a file cannot be read, is too large or of another form, an answer begins outside its
        paragraph, or an id is there twice; file and question are named.
    """
    questions = [question for path in paths for question in _of_file(Path(expand(path)))]
    seen: dict[str, str] = {}
    for one in questions:
        if one.id in seen:
            raise Refusal(f'{one.place}: its id is there twice, first at {seen[one.id]}, and '
                          'predictions are kept by ids.')
        seen[one.id] = one.place
    return questions


def unalignable(question: Question) -> str:
    """Why the first answer is not what stands at its place in the paragraph; '' where it is."""
    for answer in question.answers[:1]:
        there = question.context[answer.start:answer.start + len(answer.text)]
        if there != answer.text:
            return f'the answer is {answer.text!r}, but at {answer.start} stands {there!r}'
    return ''


def _of_file(path: Path) -> Iterator[Question]:
    found = 0
    for where, paragraph in _paragraphs(path):
        context = _part(paragraph, 'context', str, where)
        for number, one in enumerate(_part(paragraph, 'qas', list, where)):
            yield _question(one, context, f'{where}.qas[{number}]')
            found += 1
    if not found:
        raise Refusal(f'{path} holds no questions.')


def _paragraphs(path):
    """Each paragraph of a file, with its place in it."""
    for a, article in enumerate(_part(_json(path), 'data', list, str(path))):
        where = f'{path}: data[{a}]'
        for p, paragraph in enumerate(_part(article, 'paragraphs', list, where)):
            yield f'{where}.paragraphs[{p}]', paragraph


def _json(path: Path) -> Any:
    refuse_pointer(path)
    try:
        with path.open('rb') as raw, _opened(raw, path.suffix) as file:
            text = file.read(MOST_BYTES + 1)
            if len(text) > MOST_BYTES:
                raise Refusal(f'{path} holds more than {MOST_BYTES:,} bytes of JSON, which would '
                              'be read at once: split it into several files.')
            return parse_json(text.decode('utf-8-sig'))
    except Refusal:
        raise
    except UnicodeDecodeError as error:
        raise Refusal(f'{path} is not UTF-8 (byte {error.start:,}): save it as UTF-8.') from error
    except json.JSONDecodeError as error:
        what = 'is empty' if not error.doc.strip() else (
            f'is no JSON (line {error.lineno}, column {error.colno}: {error.msg})')
        raise Refusal(f'{path} {what}: fetch it again.') from error
    except (OSError, EOFError, lzma.LZMAError, zlib.error, ValueError, RecursionError) as error:
        raise Refusal(f'{path} cannot be read ({error}): fetch it again.') from error


def _opened(raw: io.BufferedReader, suffix: str) -> io.BufferedReader | gzip.GzipFile:
    opener = _OPENERS.get(suffix)
    return opener(raw) if opener else raw


def _part(parent: Any, name: str, kind: type, where: str) -> Any:
    value = parent.get(name) if isinstance(parent, dict) else None
    if not isinstance(value, kind):
        raise Refusal(f'{where} has no {name!r} that is a {kind.__name__}: the file is not of '
                      "SQuAD's form.")
    return value


def _question(one: Any, context: str, where: str) -> Question:
    name = str(one.get('id', '')) if isinstance(one, dict) else ''
    if not name:
        raise Refusal(f"{where} has no 'id': the file is not of SQuAD's form.")
    where = f'{where} (id {name})'
    answers = []
    if not one.get('is_impossible'):
        for given in _part(one, 'answers', list, where) if one.get('answers') else []:
            text = _part(given, 'text', str, where)
            start = _part(given, 'answer_start', int, where)
            if not 0 <= start < max(len(context), 1):
                raise Refusal(f'{where}: answer_start = {start}, outside of a paragraph of '
                              f'{len(context):,} characters. Mend it, or take the question out.')
            answers.append(Answer(text, start))
    return Question(name, _part(one, 'question', str, where), context, tuple(answers), where)

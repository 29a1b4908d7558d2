import textwrap

import pytest

from pkm_jax.data import installed_docs
from pkm_jax.data.installed_docs import prose
from pkm_jax.refusal import Refusal

SOURCE = '''
# This comment explains why the function below is written
# in the way it is, over two lines.
def solve(a):
    """
    Solve an equation for the unknown that is in it.

    Parameters
    ----------
    a : int
        The :class:`~some.Number` to start from, or ``None`` to begin with the default.

    - the first item of a list is a sentence that runs
      on to a second line
    - and this is the second item of the same list

    >>> solve(1)
    the answer is in the doctest of the function

    =====  =====
    x      y
    =====  =====

    Copyright of the authors, who are named in the file that is called AUTHORS.
    """
    "this string is not a docstring of the function but an expression that stands for nothing"
'''


def test_docstrings_and_comments_become_paragraphs_of_prose(tmp_path):
    (tmp_path / 'module.py').write_text(SOURCE)
    found = [paragraph for text in installed_docs._texts(tmp_path / 'module.py')
             for paragraph in prose(text)]
    assert found == [
        'Solve an equation for the unknown that is in it.',
        'The some.Number to start from, or None to begin with the default.',
        'the first item of a list is a sentence that runs on to a second line',
        'and this is the second item of the same list',
        'This comment explains why the function below is written in the way it is, over two lines.']


@pytest.mark.parametrize('text', [
    'def f(x): return the(value) if it == is_in and for_the or to_be',
    'import os, the, a, of, and, to, in, is',
    'Licensed under the terms of the licence that is in the file',
    '| the | table | is | in | a | box | of | the |',
    'See https://example.org for the documentation of all that is in it', 'Three short words'])
def test_code_tables_and_licences_are_left_out(text):
    assert list(prose(textwrap.dedent(text))) == []


def test_too_little_documentation_is_an_error_with_the_number(tmp_path, monkeypatch):
    (tmp_path / 'module.py').write_text(SOURCE)
    monkeypatch.setattr(installed_docs, '_folders', lambda: [tmp_path])
    with pytest.raises(Refusal, match=r'only \d+ bytes of documentation found in 1 files'):
        installed_docs.extract(tmp_path / 'docs.txt')
    assert not (tmp_path / 'docs.txt').exists()


def test_the_text_is_extracted_once(tmp_path, monkeypatch):
    (tmp_path / 'module.py').write_text(SOURCE)
    monkeypatch.setattr(installed_docs, '_folders', lambda: [tmp_path])
    monkeypatch.setattr(installed_docs, 'MINIMUM_BYTES', 10)
    path = installed_docs.extract(tmp_path / 'cache' / 'docs.txt')
    first = path.read_text()
    assert len(first.splitlines()) == len(set(first.splitlines())) >= 5
    (tmp_path / 'module.py').unlink()
    assert installed_docs.extract(path).read_text() == first


@pytest.mark.slow
def test_every_machine_has_eight_megabytes(tmp_path):
    path = installed_docs.extract(tmp_path / 'docs.txt')
    assert path.stat().st_size > 8_000_000

"""English prose that is on every machine already: the documentation in installed packages."""

import ast
import inspect
import os
import re
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from pkm_jax.data.progress import progress_bar
from pkm_jax.refusal import Refusal

# Only packages that come with the requirements, so that a full environment neither slows this down
# nor changes what kind of text it finds.
PACKAGES = ('PIL', 'absl', 'array_record', 'attr', 'chex', 'click', 'clu', 'contourpy', 'dateutil',
            'einops', 'etils', 'flax', 'fontTools', 'fsspec', 'google', 'grain', 'huggingface_hub',
            'jax', 'jaxlib', 'jaxtyping', 'matplotlib', 'ml_collections', 'mpl_toolkits', 'numpy',
            'opt_einsum', 'optax', 'orbax', 'packaging', 'pip', 'pkg_resources', 'psutil',
            'pyarrow', 'pygments', 'pyparsing', 'requests', 'rich', 'scipy', 'setuptools',
            'simple_parsing', 'tensorboardX', 'tensorflow_datasets', 'tokenizers', 'tqdm',
            'treescope', 'urllib3', 'wrapt')
SKIPPED_FOLDERS = {'site-packages', 'test', 'tests', 'testing', 'idlelib', 'lib2to3', '__pycache__'}
MINIMUM_BYTES = 2_000_000

_MARKUP = [
    (re.compile(r':[\w:.+-]+:`~?([^`<]*?)(?: *<[^`>]*>)?`'), r'\1'),   # :class:`~a`, :ref:`a <b>`
    (re.compile(r'`+([^`<]*?)(?: *<[^`>]*>)?`+_{0,2}'), r'\1'),        # ``code``, `link <url>`_
    (re.compile(r'\s*\[[\w#*-]+\]_'), ''),                             # footnote and citation marks
    (re.compile(r'\*\*?([^\s*][^*]*)\*\*?'), r'\1'),                   # *emphasis*, **strong**
]
_SECTION_BREAK = re.compile(r'^\s*([-=~^"\'`+#*.|_])\1{2,}[\s\-=~+|]*$')
_ITEM = re.compile(r'^\s*(?:[-*+•] |\(?\d{1,2}[.)] |:\w[^:]*: ?|@\w+ )')
_NOT_PROSE = re.compile(r'>>>|^\s*\.\. |^\s*\.\.\.|\$|https?://|[{}\\|]|::|==|->|\(\)\.'
                        r'|licen[cs]e|copyright|warrant|coding[:=]|noqa|pylint|pytype'
                        r'|type: ignore', re.IGNORECASE)
_COMMON_WORD = re.compile(r'\b(?:the|a|an|is|are|of|to|in|for|and|or|be|if|this|that|with|by|it|as'
                          r'|from|not|on)\b', re.IGNORECASE)
_TRIPLE_QUOTED = re.compile(r'("""|\'\'\')(.*?)\1', re.DOTALL)
_COMMENTS = re.compile(r'(?:^[ \t]*#(?: .*)?\n)+', re.MULTILINE)


def extract(path: Path, log: Callable[[str], None] = print) -> Path:
    """Writes the prose of the installed documentation to `path`, one paragraph a line.

    Returns `path`; does nothing where it exists already. Takes well under a minute; nothing is
    imported or run.
    Raises:
      Refusal: this Python's packages were installed without their sources; with the bytes found.
    """
    if path.exists():
        log(f'text: using the documentation extracted before, {path} '
            f'({path.stat().st_size / 1e6:.1f} MB)')
        return path
    files = [file for folder in _folders() for file in _documented_files(folder)]
    found: dict[str, None] = {}   # keeps the order
    with progress_bar('reading installed documentation', len(files), ' files', log) as bar:
        for file in files:
            for text in _texts(file):
                found.update(dict.fromkeys(prose(text)))
            bar.update()
    content = ''.join(f'{paragraph}\n' for paragraph in found).encode()
    if len(content) < MINIMUM_BYTES:
        raise Refusal(f'only {len(content):,} bytes of documentation found in {len(files):,} '
                      f'files of the installed packages, at least {MINIMUM_BYTES:,} are needed: '
                      'were they installed without sources? Name a corpus of your own instead')
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as partial:
        partial.write(content)
    os.chmod(partial.name, 0o644)   # a temporary file is private
    os.replace(partial.name, path)
    log(f'text: {len(content) / 1e6:.1f} MB, {len(found):,} paragraphs of installed documentation, '
        f'in {path}')
    return path


def prose(text: str) -> Iterator[str]:
    """Yields the paragraphs of a docstring, comment or document that read as English prose.

    Markup is removed. Doctests, tables, formulas, signatures, code and licence boilerplate are left
    out.
    """
    for block in re.split(r'\n[ \t]*\n', text):
        for group in _same_indentation(block):
            paragraph = ' '.join(' '.join(group).split())
            for pattern, replacement in _MARKUP:
                paragraph = pattern.sub(replacement, paragraph)
            if _reads_as_prose(paragraph):
                yield paragraph


def _reads_as_prose(paragraph: str) -> bool:
    words = re.findall(r"\b[A-Za-z][a-z']*\b", paragraph)
    letters = sum(map(len, words)) + paragraph.count(' ')
    return (len(words) >= 6 and letters >= 0.85 * len(paragraph) and paragraph[0].isalnum()
            and len(_COMMON_WORD.findall(paragraph)) >= max(2, len(words) // 10))


def _same_indentation(block: str) -> Iterator[list[str]]:
    """Yields runs of lines; list items and the descriptions below parameters stand alone."""
    if '>>>' in block:
        return
    group: list[str] = []
    indentation = -1
    for line in block.splitlines():
        depth = len(line) - len(line.lstrip())
        item = _ITEM.match(line)
        broken = _SECTION_BREAK.match(line) or _NOT_PROSE.search(line)
        if item or broken or (depth != indentation and indentation >= 0):
            yield group
            group = []
        indentation = -1 if item or broken else depth   # an item's second line may hang
        if not broken:
            group.append(line[item.end():] if item else line)
    yield group


def _folders() -> list[Path]:
    """The standard library and every listed package that is installed, in a fixed order."""
    paths = sysconfig.get_paths()
    sites = sorted({Path(paths['purelib']), Path(paths['platlib'])})
    packages = [site / name for name in PACKAGES for site in sites]
    return [Path(paths['stdlib'])] + [folder for folder in packages if folder.is_dir()]


def _documented_files(folder: Path) -> list[Path]:
    return [file for file in sorted(folder.rglob('*')) if file.suffix in {'.py', '.rst', '.md'}
            and not SKIPPED_FOLDERS.intersection(file.relative_to(folder).parts)
            and not file.name.startswith('test_') and not file.name.endswith('_test.py')]


def _texts(file: Path) -> Iterator[str]:
    """Yields the docstrings and comment blocks of a Python file, or the whole of any other file.

    Docstrings are found as triple-quoted strings, ten times faster than with a parser; `prose`
    sorts out the others.
    """
    source = file.read_text('utf-8', errors='replace')
    if file.suffix != '.py':
        yield source
    elif file.parent.name == 'pydoc_data':   # the language reference, a dictionary of strings
        yield from (node.value for node in ast.walk(ast.parse(source))
                    if isinstance(node, ast.Constant) and isinstance(node.value, str))
    else:
        for _, string in _TRIPLE_QUOTED.findall(source):
            yield inspect.cleandoc(string)
        for comment in _COMMENTS.findall(source):
            yield re.sub(r'^[ \t]*# ?', '', comment, flags=re.MULTILINE)

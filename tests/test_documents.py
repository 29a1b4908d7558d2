"""README and docs/: every Python block runs, every command parses, every link leads somewhere."""

import ast
import copy
import importlib
import itertools
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import jax
import pytest
from absl import flags
from markdown_it import MarkdownIt
from ml_collections import config_flags

from pkm_jax.configuration import command_line
from pkm_jax.configuration.cells import every_run

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / f'{name}.md' for name in ('README', 'CONTRIBUTING', 'CHANGELOG')] + sorted(
    (ROOT / 'docs').glob('*.md'))
PROGRAMS = ('pretrain', 'finetune', 'ablate', 'predict', 'inspect', 'replay', 'convert_checkpoint',
            'compile_check', 'status', 'report.__main__')
WITH_CONFIG = {'pretrain', 'finetune', 'ablate', 'replay', 'compile_check'}
# Scripts whose other options are those of the tool that they call.
PASSING_ON = {'launch/slurm.sh': '--partition --time', 'launch/sky.sh': ''}
MARKDOWN = MarkdownIt('commonmark').enable('table')
NOT_RUN = re.compile(r'<!-- not run: (.*?) -->', re.DOTALL)


class Block(NamedTuple):
    """A block of code of a page, and where its first line is."""
    language: str       # '' of an indented block
    content: str
    place: str
    not_run: str        # why it cannot run here; '' where it can


def parsed(path):
    return MARKDOWN.parse(path.read_text())


def blocks(tokens, name) -> Iterator[Block]:
    reason = ''
    for token in tokens:
        if token.type in ('fence', 'code_block'):
            yield Block(token.info.strip(), token.content, f'{name}:{token.map[0] + 1}', reason)
        comment = NOT_RUN.search(token.content) if token.type == 'html_block' else None
        reason = comment[1].strip() if comment else ''


def blocks_of(path):
    return list(blocks(parsed(path), path.relative_to(ROOT)))


def usage(path):
    """What --help of a script of the shell prints."""
    found = re.search(r"<<'END'\n(.*?)\nEND", path.read_text(), re.DOTALL)
    return found[1] if found else ''


def docstring(path):
    return ast.get_docstring(ast.parse(path.read_text())) or ''


# Python


@pytest.mark.parametrize('page', [page for page in PAGES if page.name != 'README.md' and any(
    block.language == 'python' for block in blocks_of(page))], ids=lambda page: page.stem)
def test_the_python_of_a_page_runs_from_top_to_bottom(page):
    """That of README.md: tests/test_readme.py."""
    names = {}
    for block in blocks_of(page):
        if block.language == 'python':
            code = compile(block.content, block.place, 'exec')
            # JAX as a reader has it: conftest.py makes it stricter.
            with jax.numpy_rank_promotion('allow'), jax.numpy_dtype_promotion('standard'):
                if not block.not_run:
                    exec(code, names)


# Commands


class Command(NamedTuple):
    words: list[str]
    place: str


def commands(found) -> Iterator[Command]:
    """The commands of shell and indented blocks, continued lines joined, to the first `>` or `|`."""
    for block in found:
        if block.language not in ('', 'bash', 'text'):
            continue
        for line in re.sub(r'\\\n', ' ', block.content).splitlines():
            if block.language == 'text' and not line.startswith('$ '):
                continue
            line = re.sub(r' \[[^]]*…\]', '', line.removeprefix('$ '))
            if not re.search(r'(^|[\s/])(python[\d.]*|make|pip|bash|launch/\w+\.sh)\s', line):
                continue
            try:
                words = shlex.split(line, comments=True)
            except ValueError as error:
                raise AssertionError(f'{block.place}: {line}: {error}') from error
            while words and (re.fullmatch(r'\w+=.*', words[0]) or words[0] in ('watch', '-n', '60')):
                words = words[1:]
            ends = [place for place, word in enumerate(words) if word in ('>', '|', '&&', ';')]
            words = words[:min(ends, default=len(words))]
            yield Command([word for word in words if word != '…'], block.place)


def all_commands():
    for page in PAGES:
        yield from commands(blocks_of(page))
    for folder in ('pkm_jax', 'pkm_jax/report', 'configs', 'launch', 'examples', 'benchmarks'):
        for path in sorted((ROOT / folder).glob('*.py')):
            name = path.relative_to(ROOT)
            yield from commands(blocks(MARKDOWN.parse(docstring(path)), name))
    for path in sorted((ROOT / 'launch').glob('*.s*')):
        yield from commands(blocks(MARKDOWN.parse(usage(path)), path.relative_to(ROOT)))


def test_every_command_is_one_that_the_programs_take():
    counts = dict.fromkeys(('program', 'make', 'launcher', 'script', 'pip'), 0)
    for command in all_commands():
        kind = checked(command)
        if kind:
            counts[kind] += 1
    assert counts['program'] > 60 and all(counts.values()), counts


def checked(command):
    """What kind of command it is, or None of one that is not ours."""
    first, *rest = command.words or ['']
    try:
        if first == 'make':
            targets = re.findall(r'^([\w-]+):', (ROOT / 'Makefile').read_text(), re.MULTILINE)
            for word in rest:
                assert '=' in word or word in targets, f'no target {word}'
            return 'make'
        if first == 'pip' or rest[:2] == ['-m', 'pip']:
            _extras(rest)
            return 'pip'
        if first.startswith('launch/') or rest and rest[0].startswith('launch/'):
            script = first if first.startswith('launch/') else rest[0]
            _launcher(script, command.words[command.words.index(script) + 1:])
            return 'launcher'
        if first.endswith('python') and rest[:1] == ['-m']:
            return _module(*rest[1:])
        if first.endswith('python') and rest:
            assert (ROOT / rest[0]).is_file(), f'there is no {rest[0]}'
            return 'script'
    except (AssertionError, SystemExit, ValueError, flags.Error) as error:
        pytest.fail(f'{command.place}: {shlex.join(command.words)}: {error}')
    return None


def _extras(words):
    known = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project'][
        'optional-dependencies']
    for word in words:
        for extra in re.findall(r'^\.\[(.*)\]$', word):
            assert set(extra.split(',')) <= set(known), f'no extra {extra}'


def _module(name, *words):
    if not name.startswith('pkm_jax.'):
        path = ROOT / name.replace('.', '/')
        assert name == 'pytest' or path.with_suffix('.py').is_file() or (
            path / '__main__.py').is_file(), f'there is no {name}'
        return 'script'
    program = name.removeprefix('pkm_jax.')
    if program == 'configuration.reference':
        return 'script'
    program = f'{program}.__main__' if program == 'report' else program
    assert program in PROGRAMS, f'there is no program {name}'
    module = importlib.import_module(f'pkm_jax.{program}')
    if hasattr(module, '_parser'):
        module._parser().parse_intermixed_args(words)
    else:
        _with_flags(module, words)
    return 'program'


def _with_flags(module, words):
    """Parses by flags of its own, as several programs are tried in one process."""
    program, values = module.__name__.removeprefix('pkm_jax.'), flags.FlagValues()
    for flag in flags.FLAGS.flags_by_module_dict().get(module.__name__, ()):
        if flag.name != 'config':
            values[flag.name] = copy.deepcopy(flag)
    words = command_line._with_paths(words)
    if program not in WITH_CONFIG:
        assert values(['program', *words])[1:] == [], 'no option takes this'
        return
    name = command_line._config_named(words)
    assert name, 'it names no configuration'
    command_line.check_fields(words, command_line._configuration(name))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr('sys.argv', ['program', *words])    # where ml_collections looks
        config_flags.DEFINE_config_file('config', flag_values=values)
        rest = values(['program', *words])
    assert rest[1:] == [], f'no option takes {rest[1:]}'
    if program != 'finetune' and 'finetune' not in values.config:
        every_run(values.config)        # values that fit together


def _launcher(script, words):
    text = (ROOT / script).read_text()
    own = [word for word in words if not word.startswith('--config')]
    for word in own:
        option = word.partition('=')[0]
        if option.startswith('--'):
            assert f'{option}' in text or option in PASSING_ON.get(script, '').split(), (
                f'{script} has no option {option}')
    if len(own) < len(words) and not any('NAME' in word for word in words):
        config = [word for word in words if word.startswith('--config')]
        _with_flags(importlib.import_module('pkm_jax.pretrain'), config)


@pytest.mark.parametrize('program', PROGRAMS)
def test_help_says_what_a_program_is_for_its_uses_and_its_guide(program):
    """--help prints the docstring; tests/test_wheel.py looks at what is really printed."""
    path = ROOT / 'pkm_jax' / f'{program.replace(".", "/")}.py'
    said = docstring(path)
    module = f'pkm_jax.{program.removesuffix(".__main__")}'
    own = [command for command in commands(blocks(MARKDOWN.parse(said), path.name))
           if command.words[2:3] == [module]]
    assert len(own) >= 3 and re.search(r'\nGuide: docs/\w+\.md', said)
    assert len(said.splitlines()[0]) > len(f'python -m {module}') + 20


@pytest.mark.parametrize('name', ['gke.py', 'tpu_pod.sh', 'slurm.sh', 'sky.sh'])
def test_help_of_a_launcher_has_its_uses_and_its_guide(name):
    path = ROOT / 'launch' / name
    said = docstring(path) if name.endswith('.py') else usage(path)
    uses = [command for command in commands(blocks(MARKDOWN.parse(said), name))
            if f'launch/{name}' in command.words]
    assert len(uses) >= 3 and re.search(r'Guide: docs/launch\.md, "[^"]+"', said)


# Links


def slugs(tokens):
    """The anchors of a page's headings, as GitHub and the site name them."""
    found = []
    for heading, inline in itertools.pairwise(tokens):
        if heading.type == 'heading_open':
            text = ''.join(child.content for child in inline.children
                           if child.type in ('text', 'code_inline'))
            slug = re.sub(r'[^\w\- ]', '', text.strip().lower()).replace(' ', '-')
            repeated = sum(one == slug or re.fullmatch(rf'{re.escape(slug)}-\d+', one) is not None
                           for one in found)
            found.append(f'{slug}-{repeated}' if repeated else slug)
    return found


def links(tokens):
    for token in tokens:
        if token.type == 'html_block':
            yield from re.findall(r'(?:src|srcset|href)="([^"]*)"', token.content)
        for child in token.children or ():
            for name in ('href', 'src'):
                if child.attrGet(name):
                    yield child.attrGet(name)
            if child.type == 'html_inline':
                yield from re.findall(r'(?:src|srcset|href)="([^"]*)"', child.content)
        if token.type == 'fence' and token.info.startswith('{literalinclude}'):
            yield token.info.split()[1]
        if token.type == 'fence' and token.info.startswith('{help-of}'):
            yield f'../{token.info.split()[1]}'


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.stem)
def test_every_link_leads_somewhere(page):
    for link in links(parsed(page)):
        address = urlsplit(link)
        if address.scheme:
            assert address.scheme == 'https' and '.' in address.netloc and ' ' not in link, link
            continue
        target = (page.parent / address.path).resolve() if address.path else page
        assert target.exists() and target.is_relative_to(ROOT), f'{link}: there is no such file'
        if address.fragment:
            assert address.fragment in slugs(parsed(target)), f'{link}: no heading of that name'


def test_documents_that_the_code_names_are_there():
    """And their headings, where one is named: docs/launch.md, "Plan"."""
    found = 0
    for path in (*ROOT.glob('pkm_jax/**/*.py'), *ROOT.glob('configs/*.py'),
                 *ROOT.glob('launch/*'), *ROOT.glob('examples/*.py'), ROOT / 'Makefile'):
        for name, heading in re.findall(r'(docs/\w+\.(?:md|png))(?:, "([^"]+)")?', path.read_text()):
            found += 1
            assert (ROOT / name).exists(), f'{path}: there is no {name}'
            if heading:
                tokens = parsed(ROOT / name)
                heads = [inline.content for opening, inline in itertools.pairwise(tokens)
                         if opening.type == 'heading_open']
                assert heading in heads, f'{path}: {name} has no heading {heading!r}'
    assert found > 20


def test_the_figures_are_what_their_script_draws():
    spec = importlib.util.spec_from_file_location('figures', ROOT / 'docs/figures.py')
    figures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(figures)
    there = {path.name: path.read_text() for path in figures.FOLDER.iterdir()}
    assert there == figures.drawn(), 'draw them anew: python docs/figures.py'

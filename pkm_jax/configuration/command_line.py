"""The flag --config of the entry points: a file or a shipped name, and fields that it has."""

import difflib
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import ml_collections
from absl import app, flags
from ml_collections import config_flags
from ml_collections.config_flags.config_flags import ConfigFileFlagParser

from pkm_jax.refusal import Refusal, ends

flags.disclaim_key_flags()      # --help shows --config as the program's own
SHIPPED = Path(__file__).parents[1] / 'configs'
HELP = ("A configuration: one of those that are shipped, such as quickstart, or the path of a "
        "file, with its arguments after ':'. Fields are set by --config.section.field=value.")
HELPS = {'--help', '--helpshort', '--helpfull', '-?'}


def define_config() -> flags.FlagHolder:
    """Defines the flag, which is required."""
    return config_flags.DEFINE_config_file('config', help_string=HELP)


def parse(argv: Sequence[str]) -> list[str]:
    """Parses a command line with --config, for `app.run(main, flags_parser=parse)`; see `parsed`.

    Ends the program with one line too where the configuration is not there or has no such field.
    """
    try:
        arguments = _with_paths(argv)
        if config := _config_named(arguments):
            check_fields(arguments, _configuration(config))
        elif not HELPS & set(arguments):
            raise Refusal(f'give --config, a path or one of {", ".join(shipped())}.')
    except Refusal as refusal:
        # Of one that a configuration raised, ml_collections makes a message with its traceback.
        said = str(refusal).rpartition('Refusal: ')[2].strip()
        raise ends(f'Not started: {said}') from refusal
    sys.argv[:] = arguments     # where ml_collections looks for what was set
    return parsed(arguments)


def parsed(argv: Sequence[str]) -> list[str]:
    """Parses a command line of flags alone, for `app.run(main, flags_parser=parsed)`; returns the
    program's name.

    Ends the program with one line where a flag is unknown or of a wrong type, or where something is
    no flag.
    """
    if HELPS & set(argv):       # absl would end with status 1, that of a failure
        app.usage(shorthelp='--helpfull' not in argv, writeto_stdout=True, exitcode=0)
    try:
        rest = flags.FLAGS(argv)
    except flags.Error as error:
        raise ends(f'Not started: {_in_words(error)}') from error
    if rest[1:]:
        raise ends(f'Not started: {" ".join(rest[1:])}: no option takes this; options begin with '
                   f'"--".')
    return rest


def _in_words(error):
    """What was wrong with a flag: its name, its value, and what kind of value it takes."""
    wrong = re.match(r'flag (--[\w.]+)=(.*?): ', str(error), re.DOTALL)
    name = wrong[1].removeprefix('--') if wrong else ''
    if name not in flags.FLAGS or wrong[2] == 'None':       # of what is required and not there
        return ' '.join(str(error).split())
    return f'{wrong[1]}={wrong[2]}: {wrong[2]!r} is no {flags.FLAGS[name].flag_type()}.'


def _configuration(config):
    try:
        return ConfigFileFlagParser('config').parse(config)
    except TypeError as error:
        if 'get_config() takes 0' not in str(error):
            raise
        raise Refusal(f'--config={config}: this configuration takes no arguments after '
                      f"':'.") from None


def shipped() -> list[str]:
    """Names of the configurations that come with the package."""
    return sorted(path.stem for path in SHIPPED.glob('*.py'))


def locate(config: str) -> str:
    """The path of a configuration, its arguments after ':' kept.

    Raises:
      Refusal: there is no such file or name.
    """
    name, colon, arguments = config.partition(':')
    by_name = name.endswith('.py') or '/' in name
    path = Path(name).expanduser() if by_name else SHIPPED / f'{name}.py'
    if not path.is_file():
        raise Refusal(f'--config={config}: there is no {path}. Give the path of a file, or one of '
                      f'{", ".join(shipped())}.')
    return f'{path}{colon}{arguments}'


def check_fields(arguments: Sequence[str], config: ml_collections.ConfigDict) -> None:
    """Refuses the first --config.FIELD that the configuration does not have.

    Raises:
      Refusal: the field and those nearest to it, or what can be changed of that run.
    """
    for argument in arguments:
        field = re.match(r'--?(?:no)?config\.([\w.]+)', argument)
        if field and field[1].startswith('runs.'):
            _check_field_of_run(field[1], config)
        elif field:
            check_field(field[1], config, '--config.')


def _check_field_of_run(field, config):
    _, name, *rest = field.split('.', 2)
    if name not in config.runs:
        raise Refusal(f'--config.{field}: there is no run {name!r}; those of this configuration: '
                      f'{", ".join(config.runs) or "none"}.')
    own = set(_fields(config.runs[name]))
    if rest and rest[0] not in own:
        raise Refusal(f'--config.{field}: of the run {name!r} only what the configuration sets '
                      f'there can be changed: {", ".join(sorted(own))}. --config.{rest[0]} sets it '
                      f'for all runs.')


def check_field(field: str, config: ml_collections.ConfigDict, prefix: str = '') -> None:
    """Refuses a field that the configuration does not have; `prefix`: what it was called with.

    Raises:
      Refusal: the field and those nearest to it.
    """
    known = set(_fields(config))
    if field not in known:
        last = field.rpartition('.')[2]
        near = (sorted(name for name in known if last in name.rpartition('.')[2].split('_'))[:3]
                or difflib.get_close_matches(field, known, n=3, cutoff=0.5))
        hint = f': did you mean {" or ".join(near)}?' if near else ''
        raise Refusal(f'{prefix}{field}: there is no such field{hint}')


def _with_paths(argv):
    arguments = list(argv)
    for place, argument in enumerate(arguments):
        if match := re.fullmatch(r'(--?config)=(.*)', argument):
            arguments[place] = f'{match[1]}={locate(match[2])}'
        elif argument in ('--config', '-config') and place + 1 < len(arguments):
            arguments[place + 1] = locate(arguments[place + 1])
    return arguments


def _config_named(arguments):
    for argument, following in zip(arguments, [*arguments[1:], '']):
        if match := re.fullmatch(r'--?config=(.*)', argument):
            return match[1]
        if argument in ('--config', '-config'):
            return following
    return None


def _fields(config: ml_collections.ConfigDict, prefix: str = '') -> Iterator[str]:
    for name, value in config.items():
        yield prefix + name
        if isinstance(value, ml_collections.ConfigDict):
            yield from _fields(value, f'{prefix}{name}.')

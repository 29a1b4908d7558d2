"""docs/configuration.md: python -m pkm_jax.configuration.reference > docs/configuration.md"""

import dataclasses
from collections.abc import Iterator
from typing import Any

from pkm_jax.configuration.ablation import Ablation
from pkm_jax.configuration.finetuning import Schedule
from pkm_jax.configuration.resolve import DECIDED, MODELS, PLACEMENT, TASKS, TOP
from pkm_jax.configuration.run import Distributed, Log, Parts, Run, Tables, Train
from pkm_jax.fields import bounds
from pkm_jax.memory.layer import MemoryConfig
from pkm_jax.models.transformer import TransformerConfig

INTRODUCTION = '''# Configuration

All fields of all programs that take `--config`. A field is set in a file of `configs/`, or on the
command line: `--config.train.steps=1000`. The defaults here are those of the program; a
configuration can have others. `pkm_jax.finetune` takes the sizes of the model from its weights, and
steps, warmup and evaluations from the section `finetune`. Letters such as N and H are those of the
[method](method.md#notation).

This page is written by `python -m pkm_jax.configuration.reference` from the dataclasses that check
the fields.
'''


def reference() -> str:
    """The whole page: a table of fields for each section."""
    lines = [INTRODUCTION, '## Top\n', *_table(_fields(Run, '', only=TOP)),
             f'| `task` | `masked_lm` | what is learnt, of {", ".join(TASKS)}: see `data` |',
             '| `runs` | `{}` | {name: changes}: several runs in turn, each in a folder of its '
             'own; `init_from` can name an earlier one |']
    for family, model in MODELS.items():
        lines += [f"\n## `model`, with `model.family = '{family}'`\n",
                  *_table(_fields(model, 'model', without=DECIDED))]
    names = {field: name for name, field in PLACEMENT.items()}
    lines += ['\n## `memory`\n', *_table(_fields(MemoryConfig, 'memory')),
              *_rows(_fields(TransformerConfig, 'memory', only=tuple(names), names=names)),
              *_rows(_fields(Tables, 'memory', without=('shards',))),
              *_rows(_fields(Parts, 'memory.shards'))]
    for name, task in TASKS.items():
        lines += [f"\n## `data`, with `task = '{name}'`\n", *_table(_fields(task, 'data'))]
    for name, section in (('train', Train), ('finetune', Schedule), ('log', Log),
                          ('distributed', Distributed), ('ablation', Ablation)):
        lines += [f'\n## `{name}`\n', *_table(_fields(section, name))]
    return '\n'.join(lines) + '\n'


def _fields(
    kind: type, section: str, only: tuple[str, ...] = (), without: tuple[str, ...] = (),
    names: dict[str, str] | None = None,
) -> Iterator[tuple[str, dataclasses.Field]]:
    for field in dataclasses.fields(kind):
        if field.name not in without and (not only or field.name in only):
            name = (names or {}).get(field.name, field.name)
            yield f'{section}.{name}' if section else name, field


def _table(fields: Iterator[tuple[str, Any]]) -> list[str]:
    return ['| field | default | meaning |', '| --- | --- | --- |', *_rows(fields)]


def _rows(fields: Iterator[tuple[str, Any]]) -> list[str]:
    return [f'| `{name}` | `{field.default!r}` | {_meaning(field.metadata)} |'
            for name, field in fields]


def _meaning(metadata: Any) -> str:
    choices = ', '.join(f'`{choice}`' for choice in metadata['choices'])
    limits = bounds(metadata)
    return '; '.join(filter(None, [metadata['help'], choices and f'one of {choices}', limits]))


if __name__ == '__main__':
    print(reference(), end='')

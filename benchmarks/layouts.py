"""Which layout configurations get on topologies, and which they would get by memory alone.

    python -m benchmarks.layouts

The table of docs/scaling.md: arithmetic, nothing is compiled. Milliseconds are those of a step's
work on value tables, by `training.layout_time`.
"""

import importlib

from absl import app

from pkm_jax.configuration.resolve import runs_of
from pkm_jax.planning import chips
from pkm_jax.training.layout import Candidate, candidates, lay_out, work_of

CONFIGS = {'bert_base_pkm_pod': {}, 'bert_base_pkm': {}, 'causal_pkm': {},
           'bert_base_pkm, 32 × 512 a device': {'batch': 32}}
TOPOLOGIES = {'v5e:4x4': 3, 'v5e:16x16': 3, 'v6e:16x16': 3, 'v5p:4x4x4': 3, 'h100:2': 4,
              'h200:8': 4}      # and how many of these configurations


def rows() -> list[str]:
    """The lines of the table."""
    titles = ('configuration', 'topology', 'fewest parts that fit', 'ms', 'least time', 'ms',
              'next', 'ms')
    return [f'| {" | ".join(titles)} |', '| --- ' * len(titles) + '|', *(
        _row(name, topology) for topology, count in TOPOLOGIES.items()
        for name in list(CONFIGS)[:count])]


def _row(name: str, topology: str) -> str:
    place, config = chips.parse(topology), importlib.import_module(
        f'pkm_jax.configs.{name.split(",")[0]}').get_config()
    if 'batch' in CONFIGS[name]:
        config.train.batch = CONFIGS[name]['batch'] * place.size
    run, = runs_of(config)
    available, rates = chips.available_bytes(place), chips.rates(place)
    possible = candidates(run, work_of(run)[0], place.size, rates)
    fitting = [one for one in possible if one.bytes <= available / 2]
    chosen = lay_out(run, place.size, device_bytes=available, rates=rates).shards
    if not fitting:
        return f'| `{name}` | {topology} | none | | {_parts(chosen)}, the most | | | |'
    best, *others = sorted(fitting, key=lambda one: (one.shards != chosen, one.seconds))
    cells = [_cell(fitting[0]), _cell(best), _cell(others[0]) if others else ' | ']
    return f'| {_title(name)} | {topology} | {" | ".join(cells)} |'


def _title(name):
    config, *rest = name.split(',')
    return f'`{config}`' + ''.join(f',{words}' for words in rest)


def _cell(one: Candidate) -> str:
    return f'{_parts(one.shards)} | {one.seconds * 1e3:.1f}'


def _parts(shards):
    return ' × '.join(map(str, shards))


def main(_):
    print('\n'.join(rows()))


if __name__ == '__main__':
    app.run(main)

"""The table of docs/scaling.md: configurations on topologies, planned without their hardware.

    python -m benchmarks.scaling [--topologies=v5e:4x4,…] [--configs=bert_large,…] [--reports=DIR]
        [--kernels=with,without] [--set=train.batch=512,data.length=128]

Needs the TPU compiler (pip install 'jax[tpu]'), minutes for each combination. With --reports the
whole of what `pkm_jax.compile_check` prints is kept as a file for each. `without` kernels the
program is plain JAX, to compare with: a run has the kernels.
"""

import contextlib
import importlib
import itertools
import json
from pathlib import Path

import jax
from absl import app, flags, logging

from pkm_jax import dispatch
from pkm_jax.configuration.resolve import runs_of
from pkm_jax.planning import chips
from pkm_jax.planning.estimate import STEP, Estimate, estimate
from pkm_jax.planning.text import text_of

CONFIGS = flags.DEFINE_list('configs', ['bert_base_pkm_pod', 'bert_base_pkm', 'bert_large',
                                        'causal_pkm'],
                            'Names in pkm_jax/configs/.')
TOPOLOGIES = flags.DEFINE_list('topologies', ['v5e:4x4', 'v5e:16x16', 'v6e:16x16', 'v5p:4x4x4'],
                               'See pkm_jax.compile_check.')
KERNELS = flags.DEFINE_list('kernels', ['with'], 'with, without, or both.')
SET = flags.DEFINE_list('set', [], 'Fields of the configurations to change, as SECTION.FIELD=JSON.')
REPORTS = flags.DEFINE_string('reports', None, 'Folder for the reports.')


def row(name: str, found: Estimate) -> str:
    """A line of the table; of a step that the compiler refused, what it would have needed."""
    needed = found.memory[found.largest]
    fits = 'fits' if found.fits else '**does not fit**'
    cells = [name, found.topology.name, ' × '.join(map(str, found.layout.shards)),
             f'{needed.total / 1e9:.1f} of {needed.available / 1e9:.1f}, {fits}']
    if STEP in found.refusals:
        return f'| {" | ".join(cells)} | | | | |'
    seconds = found.seconds
    cells += [f'{seconds[part] * 1e3:.1f}' for part in ('arithmetic', 'HBM', 'links')]
    tokens = found.run.tokens_per_step / found.step_seconds
    return f'| {" | ".join([*cells, f"{tokens / 1e6:.2f}"])} |'


def main(_):
    logging.set_verbosity(logging.WARNING)
    jax.config.update('jax_platforms', 'cpu')
    print(f'jax {jax.__version__}\n\n| configuration | topology | data × rows × columns | '
          'GB of a chip | arithmetic, ms | HBM, ms | links, ms | million tokens/s |')
    print('| --- ' * 8 + '|')
    for topology, name, kernels in itertools.product(TOPOLOGIES.value, CONFIGS.value,
                                                     KERNELS.value):
        config = importlib.import_module(f'pkm_jax.configs.{name}').get_config()
        for change in SET.value:
            field, _, value = change.partition('=')
            config.update_from_flattened_dict({field: json.loads(value)})
        run, = runs_of(config)
        with dispatch.without_kernels() if kernels == 'without' else contextlib.nullcontext():
            found = estimate(run, chips.parse(topology))
        print(row(f'`{name}`, {kernels} kernels', found), flush=True)
        if REPORTS.value:
            path = Path(REPORTS.value) / f'{name}_{topology.replace(":", "_")}_{kernels}.txt'
            path.write_text(text_of(found, name) + '\n')


if __name__ == '__main__':
    app.run(main)

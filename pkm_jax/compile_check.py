"""Plans a run without its hardware: python -m pkm_jax.compile_check --config=NAME --topology=CHIPS

    python -m pkm_jax.compile_check --config=bert_base_pkm_pod --topology=v5e:16x16
    python -m pkm_jax.compile_check --config=bert_base_pkm --topology=h200:8 --config.seed=1
    python -m pkm_jax.compile_check --config=bert_base_pkm --topology=v6e-16 --slices=2 --price=1.2

Compiles the programs of the run for a TPU topology, on any machine (pip install 'jax[tpu]'): the
training step, the one that makes the first state, and that of evaluations. Prints what a device
would hold in each of them, what it would compute and send in a step, and how long all steps would
take. For GPUs ('h200:8') it estimates the step alone. The exit status is 5 where one of them does
not fit, 2 where it cannot be planned. Minutes for BERT-base.

Guide: docs/launch.md, "Plan". Plans that were made: docs/scaling.md.
"""

import sys

import jax
import ml_collections
from absl import app, flags, logging

from pkm_jax.accelerators import CHIPS
from pkm_jax.configuration import command_line
from pkm_jax.configuration.cells import every_run
from pkm_jax.console import survive_any_console
from pkm_jax.planning import chips
from pkm_jax.planning.estimate import estimate
from pkm_jax.planning.text import text_of
from pkm_jax.refusal import ExitStatus, Refusal, ends

TOPOLOGY = flags.DEFINE_string(
    'topology', None, 'chips along each dimension, or number of GPUs, of '
    f'{", ".join(CHIPS)}: v5e:16x16, v5p:4x4x4, h200:8; or as clouds name slices: v5litepod-256, '
    'v5p-128')
SLICES = flags.DEFINE_integer('slices', 1, 'TPU slices of that topology')
PRICE = flags.DEFINE_float('price', 0., 'of a chip for an hour, in any currency: what the run '
                           'costs')


def run(config: ml_collections.ConfigDict, topology: str, slices: int = 1,
        price: float = 0.) -> bool:
    """Prints the plan of every run of a configuration; whether all of them fit.

    Runs that differ in seeds, folders and what they start from alone are planned once.

    Raises:
      Refusal: see `every_run`, `chips.parse` and `estimate`.
    """
    place, fits, planned = chips.parse(topology, slices), True, []
    for one in every_run(config):
        program = one.model, one.task, one.tables, one.train
        if program in planned:
            continue
        planned.append(program)
        found = estimate(one, place)
        print(text_of(found, one.name, price), flush=True)
        fits &= found.fits
    return fits


def main(_: list[str]) -> None:
    survive_any_console()
    logging.set_verbosity(logging.WARNING)
    jax.config.update('jax_platforms', 'cpu')     # what is here takes no part
    try:
        fits = run(flags.FLAGS.config, TOPOLOGY.value, SLICES.value, PRICE.value)
    except Refusal as refusal:
        raise ends(f'Not planned: {refusal}') from refusal
    sys.exit(ExitStatus.DONE if fits else ExitStatus.OUT_OF_MEMORY)


if __name__ == '__main__':      # defined here: pretrain.py has a flag of the same name
    command_line.define_config()
    flags.mark_flags_as_required(['config', 'topology'])
    app.run(main, flags_parser=command_line.parse)

"""Plans a run without its hardware: python -m pkm_jax.compile_check --config=… --topology=v5e:16x16

    python -m pkm_jax.compile_check --config=bert_base_pkm_pod --topology=v5e:16x16
    python -m pkm_jax.compile_check --config=bert_base_pkm --topology=h200:8 --config.seed=1

Compiles the real training step for a TPU topology, on any machine (pip install 'jax[tpu]'), and
prints what a device would hold, compute and send. For GPUs ('h200:8') it estimates. The exit
status is 1 where the step does not fit, 2 where it cannot be planned. Minutes for BERT-base. The
first state and evaluations are programs of their own, which are not compiled.
"""

import sys

import jax
import ml_collections
from absl import app, flags, logging

from pkm_jax.accelerators import CHIPS
from pkm_jax.configuration import command_line
from pkm_jax.configuration.resolve import runs_of
from pkm_jax.console import survive_any_console
from pkm_jax.planning import chips
from pkm_jax.planning.estimate import estimate
from pkm_jax.planning.text import text_of
from pkm_jax.refusal import Refusal


def run(config: ml_collections.ConfigDict, topology: str) -> bool:
    """Prints the plan of every run of a configuration; whether all of them fit.

    Raises:
      Refusal: see `runs_of`, `chips.parse` and `estimate`.
    """
    place, fits = chips.parse(topology), True
    for one in runs_of(config):
        found = estimate(one, place)
        print(text_of(found, one.name), flush=True)
        fits &= found.fits
    return fits


def main(_: list[str]) -> None:
    survive_any_console()
    logging.set_verbosity(logging.WARNING)
    jax.config.update('jax_platforms', 'cpu')     # what is here takes no part
    try:
        fits = run(flags.FLAGS.config, flags.FLAGS.topology)
    except Refusal as refusal:
        print(f'Not planned: {refusal}', file=sys.stderr)
        sys.exit(2)
    sys.exit(0 if fits else 1)


if __name__ == '__main__':      # defined here: pretrain.py has a flag of the same name
    command_line.define_config()
    flags.DEFINE_string(
        'topology', None, 'chips along each dimension, or number of GPUs, of '
        f'{", ".join(CHIPS)}: v5e:16x16, v5p:4x4x4, h200:8')
    flags.mark_flags_as_required(['config', 'topology'])
    app.run(main, flags_parser=command_line.parse)

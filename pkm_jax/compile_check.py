"""Plans a run without its hardware: python -m pkm_jax.compile_check --config=… --topology=v5e:16x16

Compiles the real training step for a TPU topology, on any machine (pip install 'jax[tpu]'), and
prints what a device would hold, compute and send. For GPUs ('h200:8') it estimates. The exit
status is 1 where the step does not fit, 2 where it cannot be planned. Minutes for BERT-base. The
first state and evaluations are programs of their own, which are not compiled.
"""

import sys
from pathlib import Path

import jax
import ml_collections
from absl import app, flags, logging
from ml_collections import config_flags

from pkm_jax.planning import chips
from pkm_jax.planning.check import check
from pkm_jax.planning.report import report
from pkm_jax.training import settings


def run(config: ml_collections.ConfigDict, topology: str) -> bool:
    """Prints the plan of every run of a configuration; whether all of them fit.

    Raises:
      ValueError, ModuleNotFoundError: see `chips.parse` and `check`.
    """
    place, fits = chips.parse(topology), True
    for name, run_config in settings.runs_of(config):
        found = check(run_config, place)
        print(report(found, name or Path(config.workdir).name), flush=True)
        fits &= found.fits
    return fits


def main(_) -> None:
    logging.set_verbosity(logging.WARNING)
    jax.config.update('jax_platforms', 'cpu')     # what is here takes no part
    try:
        fits = run(flags.FLAGS.config, flags.FLAGS.topology)
    except (ValueError, ModuleNotFoundError) as error:
        if not settings.is_refusal(error):
            raise
        print(f'Not planned: {error}', file=sys.stderr)
        sys.exit(2)
    sys.exit(0 if fits else 1)


if __name__ == '__main__':      # defined here: pretrain.py has a flag of the same name
    config_flags.DEFINE_config_file('config', help_string='configs/NAME.py')
    flags.DEFINE_string(
        'topology', None, 'chips along each dimension, or number of GPUs, of '
        f'{", ".join(chips.CHIPS)}: v5e:16x16, v5p:4x4x4, h200:8')
    flags.mark_flags_as_required(['config', 'topology'])
    app.run(main)

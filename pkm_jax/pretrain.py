"""Masked-LM pretraining: python -m pkm_jax.pretrain --config=configs/NAME.py"""

import sys
from pathlib import Path

import jax
import ml_collections
from absl import app, flags, logging
from ml_collections import config_flags

from pkm_jax.report.report import write_report
from pkm_jax.training import hosts, settings
from pkm_jax.training.loop import train
from pkm_jax.training.preemption import Stopped

CONFIG = config_flags.DEFINE_config_file('config', help_string='configs/NAME.py')


def run(config: ml_collections.ConfigDict) -> Path | None:
    """Trains every run of a configuration in turn, and returns the page that reports on them.

    Of several processes the first one writes the page, and the others return None.

    Raises:
      ValueError, FileNotFoundError, ImportError: see `loop.train`; bad settings of any run are found
        before the first starts.
      Stopped: a signal asked for it; started again it goes on.
    """
    hosts.join(config.distributed)
    runs = settings.runs_of(config)
    for _, settings_of_run in runs:
        settings.check(settings_of_run, jax.device_count(), jax.process_count())
    for name, settings_of_run in runs:
        train(settings_of_run, name)
    if jax.process_index() > 0:
        return None
    return write_report(Path(config.workdir), [name for name, _ in runs if name] or None)


def main(_) -> None:
    logging.set_verbosity(logging.WARNING)      # libraries say much that is not about the run
    try:
        page = run(CONFIG.value)
    except (ValueError, FileNotFoundError, ImportError) as error:
        if not settings.is_refusal(error):
            raise
        sys.exit(f'Not trained: {error}')
    except Stopped as stopped:
        print(stopped)
        sys.exit(stopped.status)
    if page:
        print(f'report: {page}')


if __name__ == '__main__':
    flags.mark_flag_as_required('config')
    app.run(main)

r"""Pretrains a model, with or without memories: python -m pkm_jax.pretrain --config=NAME

    python -m pkm_jax.pretrain --config=quickstart
    python -m pkm_jax.pretrain --config=bert_base_pkm --config.data.corpus='/corpora/*.jsonl.xz'
    python -m pkm_jax.pretrain --config=bert_base_pkm --config.init_from=bert-base-uncased \
        --config.data.corpus='/corpora/*.jsonl.xz' --config.seed=1

A configuration says what is trained, and --config.SECTION.FIELD=VALUE changes it. The same command
goes on where a run stopped. At the end a report is written.

Guide: docs/pretraining.md. Every field: docs/configuration.md.
"""

from pathlib import Path

import jax
import ml_collections
from absl import app

from pkm_jax.configuration import command_line
from pkm_jax.configuration.resolve import runs_of
from pkm_jax.planning.out_of_memory import explained
from pkm_jax.processes import hosts
from pkm_jax.report.report import write_report
from pkm_jax.training import ending, start
from pkm_jax.training.layout import lay_out_here
from pkm_jax.training.loop import train

CONFIG = command_line.define_config()


def run(config: ml_collections.ConfigDict) -> Path | None:
    """Trains every run of a configuration in turn, and returns the page that reports on them.

    Of several processes the first one writes the page, and the others return None.

    Raises:
      Refusal: see `loop.train`, or a device has no room; bad settings of any run are found before
      the first starts.
      Stopped: a signal asked for it; started again it goes on.
      Diverged: losses or gradients were not finite, see `loop.train`.
    """
    runs = runs_of(config)
    start.use_compilation_cache(runs[0].compilation_cache)
    hosts.join(runs[0].distributed)
    layouts = [lay_out_here(one) for one in runs]
    for one, layout in zip(start.announced(runs), layouts):
        with explained(one, layout):
            train(one, layout)
    if jax.process_index() > 0:
        return None
    return write_report(runs[0].folder.parent if config.runs else runs[0].folder,
                        [one.name for one in runs] if config.runs else None)


def main(_: list[str]) -> None:
    with ending.said():
        page = run(CONFIG.value)
    if page:
        print(f'report: {page}')


if __name__ == '__main__':
    app.run(main, flags_parser=command_line.parse)

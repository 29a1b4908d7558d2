"""Draws the report of runs, finished or not: python -m pkm_jax.report FOLDER [RUN …]

    python -m pkm_jax.report runs/bert_base_pkm
    python -m pkm_jax.report runs/quickstart pretrain pretrained_add
    python -m pkm_jax.report runs/ablation_grid_bert_small

Draws loss, memory usage and slots of one or several runs, and writes FOLDER/report/report.html: one
file that needs no network, with its figures beside it as PNG files. Of an ablation it is
FOLDER/ablation/report.md, unless runs are named.

Guide: docs/pretraining.md, "Watch it"; of ablations docs/ablation.md.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from pkm_jax.data.files import expand
from pkm_jax.refusal import Refusal, ends
from pkm_jax.report.ablation import write_ablation
from pkm_jax.report.cells import PLAN
from pkm_jax.report.report import write_report


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes the report that the command line asks for, and prints where it is."""
    given = _parser().parse_args(arguments)
    try:
        folder = Path(expand(given.folder))
        is_ablation = (folder / PLAN).exists() and not given.runs
        print(write_ablation(folder) if is_ablation else write_report(folder, given.runs))
    except Refusal as refusal:
        raise ends(f'Not reported: {refusal}') from refusal


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='python -m pkm_jax.report',
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', metavar='FOLDER',
                        help='the folder of a run (with config.json and metrics.jsonl), or one '
                             'whose subfolders are runs')
    parser.add_argument('runs', metavar='RUN', nargs='*',
                        help='subfolders of FOLDER to report on; all of them by default')
    return parser


if __name__ == '__main__':
    main()

r"""Trains a grid of settings and seeds: python -m pkm_jax.ablate --config=NAME

    python -m pkm_jax.ablate --config=ablation_grid:scale=small --config.data.corpus='/corpus/*.xz'
    python -m pkm_jax.ablate --config=ablation_grid:scale=small --shard=2/3 \
        --config.data.corpus='/corpus/*.xz'
    python -m pkm_jax.ablate --config=bert_base_pkm --config.ablation.seeds='(0, 1, 2)' \
        --config.ablation.axes="(('memory.top_k', (8, 32)), ('memory.zero_start', (False, True)))"

Trains every cell of the section `ablation` of any configuration of pretraining, and every seed of
it, one after the other; fine-tunes each where there is a section `finetuning`; and writes
WORKDIR/ablation/report.md. The same command goes on where it stopped and skips what is done. A cell
that fails is named in the report, the others go on, and the exit status is 6.

Guide: docs/ablation.md. Every field: docs/configuration.md.
"""

import fnmatch
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import ml_collections
from absl import app, flags

from pkm_jax import finetune
from pkm_jax.configuration import command_line
from pkm_jax.configuration.cells import Cell, cells_of, shard, with_sources
from pkm_jax.configuration.folder import check_same_run
from pkm_jax.configuration.run import Distributed
from pkm_jax.data.files import expand
from pkm_jax.planning.out_of_memory import explained
from pkm_jax.processes import hosts
from pkm_jax.processes.preemption import Stopped
from pkm_jax.refusal import ExitStatus, Refusal
from pkm_jax.report.ablation import write_ablation
from pkm_jax.training import ending, start
from pkm_jax.training.cells import CellFile, plan
from pkm_jax.training.layout import lay_out_here
from pkm_jax.training.loop import train
from pkm_jax.training.refresh import refresh

SHARD = flags.DEFINE_string('shard', '', 'i/n: the i-th of n parts of the cells, and what they '
                                         'start from')
ONLY = flags.DEFINE_string('only', '', 'cells whose names match this pattern, such as '
                                       "'*-add-*', and what they start from")


def run(config: ml_collections.ConfigDict, part: str = '', only: str = '',
        arguments: Sequence[str] = ()) -> tuple[Path | None, list[str]]:
    """Trains the cells of a configuration that are not done, and returns the report and the names
    of those that failed.

    part: 'i/n', or '' for all. only: a pattern of names. `arguments` set the configuration on the
    command line: the report says how each cell is trained again. Of several processes the first one
    writes the report, and the others return None.

    Raises:
      Refusal: there are no such cells, or the section `ablation` cannot work; found before any is
        trained. Stopped: a signal asked for it.
    """
    cells = cells_of(config)
    chosen = shard(cells, part) if part else cells
    chosen = [cell for cell in chosen if fnmatch.fnmatchcase(cell.name, only or '*')]
    if not chosen:
        raise Refusal(f'--only={only}, --shard={part}: no cell is chosen, of '
                      f'{", ".join(cell.name for cell in cells)}.')
    start.use_compilation_cache(config.compilation_cache)
    hosts.join(Distributed(**config.distributed))
    folder, failed = Path(expand(config.workdir)), {}
    if jax.process_index() == 0:
        plan(folder, cells, config.ablation.budget)
    todo = with_sources(cells, chosen)
    for number, cell in enumerate(todo, 1):
        hosts.say(f'cell {number} of {len(todo)}: {cell.name}')
        CellFile(cell.folder).begin(cell, arguments)
        why = _attempted(cell, config, failed, whole=cell in chosen)
        if why:
            failed[cell.name] = why
            hosts.say(f'cell {cell.name} FAILED: {why}')
    page = write_ablation(folder) if jax.process_index() == 0 else None
    return page, [cell.name for cell in todo if cell.name in failed]


def _attempted(cell: Cell, config: ml_collections.ConfigDict, failed: dict[str, str],
               whole: bool) -> str:
    """Why a cell failed, which its folder says too, or ''."""
    file = CellFile(cell.folder)
    try:
        if cell.starts_from in failed:
            raise Refusal(f'it starts from {cell.starts_from}, which failed')
        _do(cell, config, file, whole)
    except Stopped:
        raise
    except Exception as error:      # whatever it is, the other cells go on
        return file.fail(error)
    file.update(failure='')
    return ''


def _do(cell: Cell, config: ml_collections.ConfigDict, file: CellFile, whole: bool) -> None:
    """Trains a cell, and where `whole` measures what refreshing does and fine-tunes it; all that is
    not done."""
    one = cell.run()
    layout = lay_out_here(one)
    check_same_run(one)
    steps, refreshes = one.train.steps, config.ablation.refresh_batches
    if not file.has('trained', steps):
        with file.part('trained', steps) as found, explained(one, layout):
            train(one, layout)
            found['flops'] = steps * one.with_vocabulary(one.task.vocab_size).flops_per_step
    if whole and refreshes and one.model.memories and not file.has('refreshed', steps):
        with file.part('refreshed', steps) as found, start.phase('refreshing the values'):
            found |= refresh(one, layout, refreshes)
    if whole and 'finetuning' in config and not file.has('finetuned', steps):
        with file.part('finetuned', steps) as found:
            found['tasks'] = _finetuned(config.finetuning, cell.folder, steps)


def _finetuned(config: ml_collections.ConfigDict, folder: Path, steps: int) -> finetune.Results:
    """Mean and deviation of each task over the seeds of fine-tuning."""
    config = config.copy_and_resolve_references()
    config.update(workdir=str(folder / f'finetuned-{steps}'), init_from=str(folder))
    results = finetune.run(config)
    tasks = results.get('tasks', {config.data.get('name', config.task): results})
    return {name: {key: one[key] for key in ('metric', 'mean', 'deviation', 'scores')}
            for name, one in tasks.items()}


def main(_: list[str]) -> None:
    arguments = [argument for argument in sys.orig_argv[-len(sys.argv) + 1:]
                 if not argument.lstrip('-').startswith(('shard=', 'only=', 'config.workdir='))]
    with ending.said():
        page, failed = run(flags.FLAGS.config, SHARD.value, ONLY.value, arguments)
    if page:
        print(f'report: {page}')
    if failed:
        print(f'{len(failed)} cell(s) failed: {", ".join(failed)}', file=sys.stderr)
        sys.exit(ExitStatus.CELLS_FAILED)


if __name__ == '__main__':
    command_line.define_config()
    app.run(main, flags_parser=command_line.parse)

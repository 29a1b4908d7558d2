"""Takes the step again at which a run diverged: python -m pkm_jax.replay, with the run's options

    python -m pkm_jax.replay --config=bert_base_pkm
    python -m pkm_jax.replay --config=bert_base_pkm --config.workdir=runs/mine --config.seed=1
    python -m pkm_jax.replay --config=glue:task=mrpc --config.workdir=runs/glue/mrpc

Reads what the run kept in its folder, on any devices, and prints the loss, the gradient norms by
group of parameters, and the operation that gave the first NaN. Of fine-tuning, every run in the
folder that diverged is replayed.

Guide: docs/reliability.md, "Processes and numbers".
"""

import contextlib
import dataclasses
from pathlib import Path

import jax
import ml_collections
import numpy as np
from absl import app, flags, logging

from pkm_jax.checkpoints.store import Checkpoints
from pkm_jax.configuration import command_line
from pkm_jax.configuration.cells import every_run
from pkm_jax.configuration.folder import read_description
from pkm_jax.configuration.resolve import resolve
from pkm_jax.configuration.run import Run
from pkm_jax.console import survive_any_console
from pkm_jax.data import tokenizer
from pkm_jax.data.files import expand
from pkm_jax.mesh import make_mesh
from pkm_jax.refusal import Refusal, ends
from pkm_jax.training.divergence import DIAGNOSIS, FOLDER, why
from pkm_jax.training.layout import lay_out_here
from pkm_jax.training.program import make_program
from pkm_jax.training.state import batch_sharding


def diverged(config: ml_collections.ConfigDict) -> list[Run]:
    """The runs of a configuration that diverged, or else the first one; those of fine-tuning as
    their folders describe them: what follows from the data is not read again.

    Raises:
      Refusal: a field cannot work, or none of fine-tuning has diverged.
    """
    if 'finetune' not in config:
        runs = every_run(config)
        return [run for run in runs
                if (run.folder / FOLDER / DIAGNOSIS).exists()] or runs[:1]
    folder = Path(expand(config.workdir))
    found = [path.parents[1] for path in sorted(folder.rglob(f'{FOLDER}/{DIAGNOSIS}'))]
    if not found:
        raise Refusal(f'{folder} holds no diagnosis: no run in it has diverged.')
    return [dataclasses.replace(resolve(read_description(run)), workdir=str(run)) for run in found]


def replay(run: Run) -> str:
    """What the first bad step of a run gives when it is taken again, in words.

    Raises:
      Refusal: the run has not diverged, or what it kept cannot be read.
    """
    folder = run.folder / FOLDER
    if not (folder / DIAGNOSIS).exists():
        raise Refusal(f'{folder} holds no diagnosis: the run in {run.folder} has not diverged.')
    if tokenizer.find(run.folder):
        run = run.with_vocabulary(len(tokenizer.load(run.folder).tokens))
    layout = lay_out_here(run)
    mesh = make_mesh(layout.shards)
    with jax.set_mesh(mesh), contextlib.closing(Checkpoints(folder, 1)) as kept:
        program = make_program(run, run.model, layout.sparse, mesh)
        found = kept.newest()
        if not found:
            raise Refusal(f'{folder} holds no state: the run was killed while it was kept.')
        state = kept.restore(found[0], program.abstract)
        batch = jax.device_put(_batch(run), batch_sharding(mesh))
        # The state is needed twice: without reusing its memory.
        step = jax.jit(program.take_step.__wrapped__,   # type: ignore[attr-defined]
                       static_argnames='all_norms')
        _, metrics = jax.device_get(step(state, batch, np.uint32(run.seed), all_norms=False))
        told = why(int(state.step) + 1, metrics)
        try:
            with jax.debug_nans(True):
                step(state, batch, np.uint32(run.seed), all_norms=False)
        except FloatingPointError as error:
            told += f'.\n{error}'
    return told


def _batch(run):
    """The parts of all processes, one below the other."""
    parts = [np.load(path) for path in sorted(
        (run.folder / FOLDER).glob('batch-*.npz'), key=lambda path: int(path.stem[6:]))]
    return {name: np.concatenate([part[name] for part in parts]) for name in run.task.arrays}


def main(_: list[str]) -> None:
    survive_any_console()
    logging.set_verbosity(logging.WARNING)
    try:
        for run in diverged(flags.FLAGS.config):
            print(replay(run))
    except Refusal as refusal:
        raise ends(f'Not replayed: {refusal}') from refusal


if __name__ == '__main__':
    command_line.define_config()
    app.run(main, flags_parser=command_line.parse)

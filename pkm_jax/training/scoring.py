"""A finished run's best weights over whole splits of its data."""

import jax
import numpy as np

from pkm_jax.checkpoints import pretrained
from pkm_jax.configuration.run import Run
from pkm_jax.data import loader
from pkm_jax.mesh import make_mesh
from pkm_jax.tasks.interface import Data
from pkm_jax.training.evaluation import Evaluation, evaluate
from pkm_jax.training.layout import Layout
from pkm_jax.training.loop import EVALUATION_SEED, of_this_process, to_devices
from pkm_jax.training.program import make_program


def score(run: Run, layout: Layout, data: Data, splits: list[str]) -> dict[str, Evaluation]:
    """Evaluates the best weights in the run's folder over each of these splits, all of it.

    Raises:
      Refusal: the run has no checkpoint.
    """
    mesh, size = make_mesh(layout.shards), run.train.micro_batch
    examples = run.task.examples(data, EVALUATION_SEED)
    with jax.set_mesh(mesh):
        program = make_program(run, run.model, layout.sparse, mesh)
        source = pretrained.open_pretrained(str(run.folder))
        state = pretrained.load_pretrained(
            source, program.initialise(np.uint32(run.seed)), say=lambda text: None)
        found = {}
        for split in splits:
            number = data.num_records(split)
            batches = loader.evaluation_batches(
                data, split, examples, batch_size=size, n_batches=-(-number // size),
                seed=EVALUATION_SEED, buckets=run.task.buckets, **of_this_process())
            found[split] = evaluate(
                state._replace(last_selected={}), (to_devices(batch, mesh) for batch in batches),
                program, run.task, run.model.memories, data, split, number)
    return found

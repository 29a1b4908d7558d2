"""One training run, from its configuration to its last checkpoint; read it from top to bottom."""

import contextlib
import functools
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jax.stages import Lowered

from pkm_jax import dispatch
from pkm_jax.checkpoints import pretrained
from pkm_jax.checkpoints.store import Checkpoints
from pkm_jax.configuration import folder as run_folder
from pkm_jax.configuration.run import Run
from pkm_jax.data import loader, tokenizer
from pkm_jax.mesh import make_mesh
from pkm_jax.models.interface import flatten
from pkm_jax.optimizers.groups import schedule
from pkm_jax.processes import hosts
from pkm_jax.processes.lock import only_run_in
from pkm_jax.processes.preemption import Stopped, StopRequests
from pkm_jax.processes.watch import Watch
from pkm_jax.refusal import Refusal
from pkm_jax.tasks.interface import Batch, Data
from pkm_jax.training import divergence, out_of_memory, start
from pkm_jax.training.evaluation import evaluate, save_counts
from pkm_jax.training.layout import Layout
from pkm_jax.training.program import Program, abstract_batch, make_program
from pkm_jax.training.run_log import RunLog, utilisation
from pkm_jax.training.state import TrainState, batch_sharding

EVALUATION_SEED = 0     # of the examples evaluated over: the same for runs of any seed


def train(run: Run, layout: Layout) -> Path:
    """Trains the model of a run in its folder, or goes on where it stopped.

    Returns the folder; of a finished run at once. `layout` is `layout.lay_out`'s.

    Raises:
      Refusal: the settings, corpus, checkpoint or folder cannot be used, before anything is
      compiled; or a device has no room. Stopped: a signal asked for it; see preemption.py.
      Diverged: losses or gradients were not finite, for train.max_skipped_steps in a row. The
      checkpoints are of before; divergence.py says what is kept beside them.
    """
    changed = run_folder.check_same_run(run)
    with contextlib.ExitStack() as around:
        if jax.process_index() == 0:
            around.enter_context(only_run_in(run.folder))
        around.enter_context(out_of_memory.explained(run, layout))
        return _train(run, layout, changed)


def _train(run: Run, layout: Layout, changed: str) -> Path:
    # 1. Prepare the data.
    with start.phase('preparing the data'), hosts.first_process_first('the prepared data'):
        data = run.task.prepare(pretrained.vocabulary_of(run.init_from),
                                functools.partial(print, flush=True))
    configured, run = run, run.with_vocabulary(data.vocab_size)
    mesh = make_mesh(layout.shards)

    with contextlib.ExitStack() as closing:
        closing.enter_context(jax.set_mesh(mesh))
        stream = closing.enter_context(contextlib.closing(_stream(run, data)))
        checkpoints = closing.enter_context(contextlib.closing(
            Checkpoints(run.folder / 'checkpoints', run.log.keep)))

        # 2. The state: resumed, else from pretrained weights, else from scratch.
        with start.phase('making the program'):
            program = make_program(run, run.model, layout.sparse, mesh)
        if checkpoints.steps():
            _check_vocabulary(run.folder, data)
        with start.phase('looking for a checkpoint'):
            resumed = checkpoints.restore(program.abstract)
        if resumed:
            state, progress = resumed
            stream.set_state(progress['data'])
            if int(state.step) >= run.train.steps:
                return run.folder
        else:
            state = _first_state(run, program, data, lambda: run_folder.describe(configured))
        if changed and jax.process_index() == 0:
            run_folder.describe(configured)

        # 3. Say what is trained, and train it.
        log = closing.enter_context(contextlib.closing(
            RunLog(run.folder, run.name, int(state.step), run.train.steps)))
        shapes = {path: leaf.shape for path, leaf in flatten(state.params).items()}
        log.say('\n'.join([pretrained.parameter_table(shapes), *start.summary(run, layout, mesh),
                           *filter(None, [changed])]))
        if not resumed:
            log.write('start', 0, 0, parameters=sum(map(math.prod, shapes.values())))
        requests = closing.enter_context(StopRequests(mesh))
        with start.phase('compiling the step'), log.pause():
            take_step = _compiled_steps(run, program, state, mesh, log)
        watch = closing.enter_context(Watch(run.folder, jax.process_index(), run.log.hang_exit))
        _loop(run, state, take_step, _evaluation(run, program, mesh, data, log), stream, mesh,
              checkpoints, log, requests, watch)
    return run.folder


def _first_state(
    run: Run, program: Program, data: Data, make_folder: Callable[[], None],
) -> TrainState:
    """Fresh weights, or those that the run starts from; the folder is made once they fit."""
    source = pretrained.open_pretrained(run.init_from) if run.init_from else None
    if source:
        pretrained.check_fits(source, program.abstract, run.model, data.vocab_path)
    if jax.process_index() == 0:
        make_folder()
        if data.vocab_path:
            tokenizer.load(data.vocab_path).save(run.folder)
    with start.phase('making the first state'):
        state = jax.block_until_ready(program.initialise(np.uint32(run.seed)))
    if source:
        with start.phase('loading pretrained weights'):
            state = pretrained.load_pretrained(source, state)
    return state


def _compiled_steps(run: Run, program: Program, state: TrainState, mesh: Mesh,
                    log: RunLog) -> dict[bool, Callable]:
    """The step with all norms and the one without, those that the run will take."""
    needed = {_takes_norms(run, step) for step in range(int(state.step) + 1, run.train.steps + 1)}
    with dispatch.recorded() as chosen:
        lowered = [program.take_step.lower(state, abstract_batch(run, mesh), all_norms=all_norms)
                   for all_norms in needed]
    log.say('\n'.join(f'{operation}: {how}' for operation, how in chosen.items()))
    with ThreadPoolExecutor() as pool:
        return dict(zip(needed, pool.map(Lowered.compile, lowered)))


def _takes_norms(run: Run, step: int) -> bool:
    return step % run.log.norms_every == 0


def _loop(run: Run, state: TrainState, take_step: dict[bool, Callable], evaluate_now: Callable,
          stream: loader.BatchStream, mesh: Mesh, checkpoints: Checkpoints, log: RunLog,
          requests: StopRequests, watch: Watch) -> None:
    """Steps from state.step to the last, never waiting for a step before the next is under way."""
    step, steps, every = int(state.step), run.train.steps, run.log
    profiling, asked, due = False, 0, False
    window: list[dict[str, Any]] = []   # metrics of the steps since the last line, on the devices
    skips = divergence.Skips()
    report = _reporter(run, log, skips)
    while step < steps and not asked:
        with watch.waiting_for('the loader, which makes batches'):
            rows = next(stream)
        batch = _to_devices(rows, mesh)
        if step + 1 == every.profile[0]:
            jax.profiler.start_trace(str(run.folder / 'profile'))
            profiling = True
        with jax.transfer_guard('disallow'):
            state, metrics = take_step[_takes_norms(run, step + 1)](state, batch)
        step += 1
        if (step - 1) % every.every == 0 and window:
            report(step - 1, window)
            window = []
            if skips.in_a_row >= run.train.max_skipped_steps:
                skips.see(step, [jax.device_get(metrics)])      # they may have ended since
            divergence.stop_after_too_many(run, skips, state, stream)
        window.append(metrics)
        if profiling and step == every.profile[1]:
            jax.block_until_ready(metrics)
            jax.profiler.stop_trace()
        asked = requests.agreed()
        evaluates = step % every.eval_every == 0 or step == steps
        due |= step % every.checkpoint_every == 0
        if evaluates or due or asked:
            report(step, window)
            window = []
            divergence.stop_after_too_many(run, skips, state, stream)
            with log.pause(), watch.pause():
                if evaluates:
                    evaluate_now(state, step)
                # Among steps that are skipped a checkpoint waits: it might replace a better one.
                if due and not skips.in_a_row or asked or step == steps:
                    checkpoints.save(state, {'data': stream.get_state()})
                    due = False
        watch.step_done()
    with watch.pause():
        checkpoints.wait()
    if not asked:       # one heard in the last step stops all processes too, before another run
        requests.agreed()
        asked = requests.agreed()
    if asked:
        raise Stopped(asked, step)


def _reporter(
    run: Run, log: RunLog, skips: divergence.Skips,
) -> Callable[[int, list[dict[str, Any]]], None]:
    """A function that logs the mean of the metrics of the steps up to `step` that were taken, and
    counts those that were skipped."""
    rate = schedule(run.train.learning_rate, run.train.warmup, run.train.steps)

    def report(step, window):
        window = jax.device_get(window)
        seconds = log.lap()
        tokens_per_second = run.tokens_per_step * len(window) / seconds
        taken = [dict(metrics) for metrics in window if not metrics['skipped']]
        skips.see(step - len(window) + 1, window)
        skipped = len(window) - len(taken)
        if skipped:
            log.say(f'{skipped:,} of {len(window):,} steps up to {step:,} skipped: {skips.why()}')
        if not taken:
            log.write('skipped', step, step * run.tokens_per_step, skipped=skipped)
            return
        norms = {}      # each kind of the last step that took it
        for metrics in taken:
            norms |= metrics.pop('norms')
        values = jax.tree.map(lambda *numbers: float(np.mean(numbers)), *taken)
        values |= {'norms': jax.tree.map(float, norms),
                   'skipped': skipped,
                   'learning_rate': float(rate(step - 1)),
                   'steps_per_second': len(window) / seconds,
                   'tokens_per_second': tokens_per_second}
        used = utilisation(run.flops_per_step * len(window) / seconds)
        if used is not None:
            values['mfu'] = used
        log.write('train', step, step * run.tokens_per_step, **values)
        log.show(step, values['loss'], tokens_per_second)

    return report


def _evaluation(run: Run, program: Program, mesh: Mesh, data: Data,
                log: RunLog) -> Callable[[TrainState, int], None]:
    """A function that evaluates a state on the same validation batches each time, and logs it."""
    number = run.log.eval_batches * run.train.gradient_accumulation_steps
    size, sites = run.train.micro_batch, run.model.memories
    examples = run.task.examples(data, EVALUATION_SEED)

    def evaluate_now(state, step):
        batches = loader.evaluation_batches(data, 'validation', examples, batch_size=size,
                                            n_batches=number, seed=EVALUATION_SEED, **_hosts())
        values, counts = evaluate(
            state, (_to_devices(batch, mesh) for batch in batches), program.count, run.task, sites,
            min(number * size, data.num_records('validation')), run.tables.dead_after)
        divergence.check_evaluation(step, values['loss'], run)
        log.write('eval', step, step * run.tokens_per_step, **values)
        shown = ', '.join(f'{name} {value:.4f}' for name, value in values.items()
                          if isinstance(value, float) and name != 'perplexity')
        log.say(f'evaluation at step {step:,}: {shown}' + ''.join(
            f'; layer {name}: top-1 usage {use["top_1_usage"]:.1%}, top-{use["k"]} '
            f'{use["top_k_usage"]:.1%} of {use["slots"]:,} slots over '
            f'{values["eval_tokens"]:,} tokens'
            for name, use in values.get('memory', {}).items()))
        if jax.process_index() == 0:
            for name, slots in counts.items():
                save_counts(run.folder / f'slot_counts_{name}.npz', slots)

    return evaluate_now


def _stream(run: Run, data: Data) -> loader.BatchStream:
    return loader.BatchStream(data, 'train', run.task.examples(data, run.seed),
                              batch_size=run.train.batch, seed=run.seed,
                              workers=run.task.workers, **_hosts())


def _check_vocabulary(folder: Path, data: Data) -> None:
    """Refuses other words than a run began with, whose embeddings would go to the wrong ones."""
    if tokenizer.find(folder) and data.vocab_path and (
            tokenizer.load(folder).tokens != tokenizer.load(data.vocab_path).tokens):
        raise Refusal(f'The text or the vocabulary changed: {data.vocab_path} holds other words '
                      f'than {folder}, with which the run began. Restore them, or start another '
                      f'run (--config.workdir).')


def _hosts() -> dict[str, int]:
    return dict(process_index=jax.process_index(), process_count=jax.process_count())


def _to_devices(batch: dict[str, np.ndarray], mesh: Mesh) -> Batch:
    """This host's rows as its part of global arrays, split over all devices."""
    return {name: jax.make_array_from_process_local_data(batch_sharding(mesh), rows)
            for name, rows in batch.items()}

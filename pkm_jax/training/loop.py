"""One training run, from its configuration to its last checkpoint; read it from top to bottom."""

import contextlib
import dataclasses
import functools
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

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
from pkm_jax.training import divergence, start
from pkm_jax.training.compiling import Programs, shapes_of, takes_norms
from pkm_jax.training.drift import DriftLog
from pkm_jax.training.evaluation import evaluate, save_counts
from pkm_jax.training.layout import Layout
from pkm_jax.training.program import Program, make_program
from pkm_jax.training.progress import Progress
from pkm_jax.training.run_log import RunLog, utilisation
from pkm_jax.training.state import TrainState, batch_sharding

EVALUATION_SEED = 0     # of the examples evaluated over: the same for runs of any seed


def train(run: Run, layout: Layout, data: Data | None = None) -> Path:
    """Trains the model of a run in its folder, or goes on where it stopped.

    Returns the folder; of a finished run at once. `layout` is `layout.lay_out`'s, `data` what the
    task prepares, where that is done. Programs are traced in another thread: settings of JAX count
    if they were made by `jax.config.update`, not by a context.

    Raises:
      Refusal: the settings, corpus, checkpoint or folder cannot be used; before anything is
      compiled. Stopped: a signal asked for it; see preemption.py.
      Diverged: losses or gradients were not finite, for train.max_skipped_steps in a row. The
      checkpoints are of before; divergence.py says what is kept beside them.
    """
    changed = run_folder.check_same_run(run)
    with run_folder.written_or_named(run.folder), contextlib.ExitStack() as alone:
        still_ours = (alone.enter_context(only_run_in(run.folder)) if jax.process_index() == 0
                      else lambda: None)
        return _train(run, layout, changed, data, still_ours)


def _train(run: Run, layout: Layout, changed: str, data: Data | None,
           still_ours: Callable[[], None]) -> Path:
    # 1. Prepare the data.
    data = data or prepared(run)
    configured, run = run, run.with_vocabulary(data.vocab_size)
    mesh = make_mesh(layout.shards)

    with contextlib.ExitStack() as closing:
        closing.enter_context(jax.set_mesh(mesh))
        stream = closing.enter_context(contextlib.closing(_stream(run, data)))
        checkpoints = closing.enter_context(contextlib.closing(
            Checkpoints(run.folder / 'checkpoints', run.log.keep, still_ours, copies=True)))

        # 2. The state: resumed, else from pretrained weights, else from scratch.
        with start.phase('making the program'):
            program = make_program(run, run.model, layout.sparse, mesh)
        with start.phase('looking for a checkpoint'):
            found = checkpoints.newest()
        room = checkpoints.room(program.abstract)
        step, saved = found or (0, {})
        # In runs of before it was not kept.
        progress = Progress(**saved.get('progress', {'tokens': step * run.tokens_per_step}))
        source = None if found or not run.init_from else _source(run, program, data)
        programs = Programs(run, program, mesh, run.train.steps if progress.stopped else step,
                            fresh=not found)
        closing.callback(programs.close)
        if found:
            stream.set_state(saved['data'])
        ended = step >= run.train.steps or progress.stopped
        if not ended:
            stream.begin()
        if found:
            with start.phase('reading the checkpoint'):
                state = checkpoints.restore(step, program.abstract)
            if jax.process_index() == 0:
                _mend_vocabulary(run.folder, data)
        else:
            state = _first_state(run, programs, source, data,
                                 lambda: run_folder.describe(configured))
        if changed and jax.process_index() == 0:
            run_folder.describe(configured)

        # 3. Say what is trained, and train it.
        log = closing.enter_context(contextlib.closing(
            RunLog(run.folder, run.name, int(state.step), run.train.steps, run.log.every,
                   saved.get('log'))))
        if ended:
            return run.folder
        shapes = {path: leaf.shape for path, leaf in flatten(state.params).items()}
        log.say('\n'.join([pretrained.parameter_table(shapes), *start.summary(run, layout, mesh),
                           *filter(None, [room, changed, _moved(saved.get('layout'), mesh)])]))
        log.begin(parameters=sum(map(math.prod, shapes.values())),
                  loss_name=run.task.loss_name._asdict(),
                  lower_is_better=run.task.lower_is_better,
                  memories={name: site.title for name, site in run.model.memories.items()})
        requests = closing.enter_context(StopRequests(mesh))
        with start.phase('compiling the programs'), log.pause():
            programs.wait()
        log.say('\n'.join(f'{name}: {"; ".join(ways)}'
                           for name, ways in programs.operations.items()))
        best = closing.enter_context(contextlib.closing(
            Checkpoints(run.folder / 'best', 1, still_ours))) if run.train.best else None
        watch = closing.enter_context(Watch(run.folder, jax.process_index(), run.log.hang_exit))
        _loop(run, state, progress, programs, _evaluation(run, program, mesh, data, log), stream,
              mesh, checkpoints, best, log, requests, watch)
    return run.folder


def _moved(before: list[int] | None, mesh: Mesh) -> str:
    """What is said where a run goes on in another layout than its checkpoint was written in."""
    now = list(mesh.devices.shape)
    if before in (None, now):
        return ''
    keep = ('. memory.shards.rows and memory.shards.columns keep a layout'
            if math.prod(before) == math.prod(now) else '')
    return (f'layout: {" × ".join(map(str, now))} (data × rows × columns), of the checkpoint '
            f'{" × ".join(map(str, before))}: the run goes on within rounding, not to the bit'
            f'{keep}')


def prepared(run: Run) -> Data:
    """The data of a run, which the first process prepares."""
    with start.phase('preparing the data'), hosts.first_process_first('the prepared data'):
        return run.task.prepare(pretrained.vocabulary_of(run.init_from),
                                functools.partial(print, flush=True))


def _source(run: Run, program: Program, data: Data) -> pretrained.Pretrained:
    """The weights that a run starts from, which fit."""
    source = pretrained.open_pretrained(run.init_from)
    pretrained.check_fits(source, program.abstract, run.model, data.vocab_path)
    return source


def _first_state(run: Run, programs: Programs, source: pretrained.Pretrained | None, data: Data,
                 make_folder: Callable[[], None]) -> TrainState:
    """Fresh weights, or those that the run starts from; first the folder is made."""
    if jax.process_index() == 0:
        make_folder()
        if data.vocab_path:
            tokenizer.load(data.vocab_path).save(run.folder)
    with start.phase('making the first state'):
        state = jax.block_until_ready(programs.first_state())
    if source:
        with start.phase('loading pretrained weights'):
            state = pretrained.load_pretrained(source, state)
    return state


def _loop(run: Run, state: TrainState, progress: Progress, programs: Programs,
          evaluate_now: Callable, stream: loader.BatchStream, mesh: Mesh, checkpoints: Checkpoints,
          best: Checkpoints | None, log: RunLog, requests: StopRequests, watch: Watch) -> None:
    """Steps from state.step to the last, never waiting for a step before the next is under way."""
    step, steps, every = int(state.step), run.train.steps, run.log
    profiling, asked, due = False, 0, False
    window: list[dict[str, Any]] = []   # metrics of the steps since the last line, on the devices
    lengths: list[int] = []             # of their batches
    skips = divergence.Skips()
    report = _reporter(run, log, progress, skips)
    seed = jax.device_put(np.uint32(run.seed), NamedSharding(mesh, PartitionSpec()))
    if every.eval_at_start and step == 0:
        with log.pause(), watch.apart('an evaluation'):
            evaluate_now(state, step, progress)
    while step < steps and not asked and not progress.stopped:
        with watch.waiting_for('the loader, which makes batches'):
            rows = next(stream)
        batch = to_devices(rows, mesh)
        shapes = shapes_of(batch)
        take_step = programs.step(takes_norms(run, step + 1), shapes)
        if step + 1 == every.profile[0]:
            jax.profiler.start_trace(str(run.folder / 'profile'))
            profiling = True
        with jax.transfer_guard('disallow'):
            state, metrics = take_step(state, batch, seed)
        step += 1
        if (step - 1) % every.every == 0 and window:
            report(step - 1, window, lengths)
            window, lengths = [], []
            if skips.in_a_row >= run.train.max_skipped_steps:
                skips.see(step, [jax.device_get(metrics)])      # they may have ended since
            with watch.apart('a save'):
                divergence.stop_after_too_many(run, skips, state, stream)
        window.append(metrics)
        lengths.append(programs.lengths[shapes])
        if profiling and step == every.profile[1]:
            jax.block_until_ready(metrics)
            jax.profiler.stop_trace()
        asked = requests.agreed()
        evaluates = step % every.eval_every == 0 or step == steps
        due |= step % every.checkpoint_every == 0
        if evaluates or due or asked:
            report(step, window, lengths)
            window, lengths = [], []
            with watch.apart('a save'):
                divergence.stop_after_too_many(run, skips, state, stream)
            if evaluates:
                with log.pause(), watch.apart('an evaluation'):
                    values = evaluate_now(state, step, progress)
                if _is_best(run, step, values, progress, log):
                    with log.pause(), watch.apart('a save'):
                        best.save(state._replace(optimizer={}, last_selected={}), {})
            # Among steps that are skipped a checkpoint waits: it might replace a better one.
            if due and not skips.in_a_row or asked or step == steps or progress.stopped:
                with log.pause(), watch.apart('a save'):
                    checkpoints.save(state, {'data': stream.get_state(), 'log': log.state,
                                             'progress': dataclasses.asdict(progress),
                                             'layout': list(mesh.devices.shape)})
                due = False
        watch.step_done()
    with watch.apart('a save'):
        checkpoints.wait()
    if not asked:       # one heard in the last step stops all processes too, before another run
        requests.agreed()
        asked = requests.agreed()
    if asked:
        raise Stopped(asked, step)


def _is_best(run: Run, step: int, values: dict[str, Any], progress: Progress, log: RunLog) -> bool:
    """Whether an evaluation is the best so far; says where training stops for want of better ones.

    Raises:
      Refusal: it has no such metric.
    """
    metric = run.train.best
    if not metric:
        return False
    if not isinstance(values.get(metric), float):
        raise Refusal(f'train.best = {metric!r} is none of the metrics of an evaluation: '
                      f'{", ".join(name for name in values if isinstance(values[name], float))}.')
    is_best = progress.judge(step, values[metric], metric in run.task.lower_is_better,
                             run.train.patience)
    if progress.stopped:
        log.say(f'training stops at step {step:,}: {progress.worse} evaluations without a better '
                f'{metric} than {progress.best:.4f} of step {progress.best_step:,} '
                f'(train.patience)')
    return is_best


def _reporter(run: Run, log: RunLog, progress: Progress, skips: divergence.Skips,
              ) -> Callable[[int, list[dict[str, Any]], list[int]], None]:
    """A function that logs the mean of the metrics of the steps up to `step` that were taken, on
    batches of these lengths, and counts those that were skipped."""
    rate = schedule(run.train.learning_rate, run.train.warmup, run.train.steps)

    def report(step, window, lengths):
        window = jax.device_get(window)
        seconds = log.lap()
        tokens = run.train.batch * sum(lengths)
        tokens_per_second = tokens / seconds
        progress.tokens += tokens
        taken = [dict(metrics) for metrics in window if not metrics['skipped']]
        skips.see(step - len(window) + 1, window)
        skipped = len(window) - len(taken)
        if skipped:
            log.say(f'{skipped:,} of {len(window):,} steps up to {step:,} skipped: {skips.why()}')
        if not taken:
            log.write('skipped', step, progress.tokens, skipped=skipped)
            return
        norms = {}      # each kind of the last step that took it
        for metrics in taken:
            norms |= metrics.pop('norms')
        values = jax.tree.map(lambda *numbers: float(np.mean(numbers)), *taken)
        values |= {'norms': jax.tree.map(float, norms),
                   'skipped': skipped,
                   'learning_rate': float(rate(step - 1)),
                   'steps_per_second': len(window) / seconds,
                   'examples_per_second': run.train.batch * len(window) / seconds,
                   'tokens_per_second': tokens_per_second}
        used = utilisation(sum(map(run.flops_of, lengths)) / seconds)
        if used is not None:
            values['mfu'] = used
        log.write('train', step, progress.tokens, **values)
        log.show(step, values['loss'], tokens_per_second)

    return report


def _evaluation(run: Run, program: Program, mesh: Mesh, data: Data,
                log: RunLog) -> Callable[[TrainState, int, Progress], dict[str, Any]]:
    """A function that evaluates a state on the same validation batches each time, and logs it."""
    sites, validation = run.model.memories, validation_batches(run, data)
    titles = {str(name): site.title for name, site in sites.items()}

    def batches():
        return (to_devices(batch, mesh) for batch in validation())

    drift = (DriftLog(run, program, mesh, next(batches()))
             if sites and run.tables.drift_tokens else None)

    def evaluate_now(state, step, progress):
        values, counts, _ = evaluate(
            state, batches(), program, run.task, sites, data, 'validation',
            min(run.log.eval_batches * run.train.batch, data.num_records('validation')),
            run.tables.dead_after)
        divergence.check_evaluation(step, values['loss'], run)
        for name, moved in (drift(state, step) if drift else {}).items():
            values['memory'][name] |= moved
        log.write('eval', step, progress.tokens, **values)
        shown = ', '.join(f'{name} {value:.4f}' for name, value in values.items()
                          if isinstance(value, float))
        log.say(f'evaluation at step {step:,}: {shown}' + ''.join(
            f'; {titles[name]}: top-1 usage {use["top_1_usage"]:.1%}, top-{use["k"]} '
            f'{use["top_k_usage"]:.1%} of {use["slots"]:,} slots over '
            f'{values["eval_tokens"]:,} tokens'
            for name, use in values.get('memory', {}).items()))
        if jax.process_index() == 0:
            for name, slots in counts.items():
                save_counts(run.folder / f'slot_counts_{name}.npz', slots)
        return values

    return evaluate_now


def validation_batches(run: Run, data: Data) -> Callable[[], Iterator[dict[str, np.ndarray]]]:
    """A function that makes the micro-batches of the run's evaluations, the same each time."""
    return functools.partial(
        loader.evaluation_batches, data, 'validation', run.task.examples(data, EVALUATION_SEED),
        batch_size=run.train.micro_batch,
        n_batches=run.log.eval_batches * run.train.gradient_accumulation_steps,
        seed=EVALUATION_SEED, buckets=run.task.buckets, **of_this_process())


def _stream(run: Run, data: Data) -> loader.BatchStream:
    return loader.BatchStream(data, 'train', run.task.examples(data, run.seed),
                              batch_size=run.train.batch, seed=run.seed,
                              buckets=run.task.buckets, workers=run.task.workers,
                              **of_this_process())


def _mend_vocabulary(folder: Path, data: Data) -> None:
    """Writes the run's copy of its vocabulary anew where it is lost or damaged.

    The data are those that the run began with, vocabulary and all, as their fingerprint says.
    """
    if not data.vocab_path:
        return
    with tempfile.TemporaryDirectory() as whole:
        tokenizer.load(data.vocab_path).save(whole)
        for path in sorted(Path(whole).iterdir()):
            copy = folder / path.name
            if not copy.exists() or copy.read_bytes() != path.read_bytes():
                print(f'WARNING: {copy} is {"damaged" if copy.exists() else "missing"}: it is '
                      f'written anew, from the vocabulary of the prepared text', flush=True)
                shutil.copyfile(path, copy)


def of_this_process() -> dict[str, int]:
    """Which part of the batches this process makes."""
    return dict(process_index=jax.process_index(), process_count=jax.process_count())


def to_devices(batch: dict[str, np.ndarray], mesh: Mesh) -> Batch:
    """This host's rows as its part of global arrays, split over all devices."""
    return {name: jax.make_array_from_process_local_data(batch_sharding(mesh), rows)
            for name, rows in batch.items()}

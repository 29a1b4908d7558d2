"""One training run, from its configuration to its last checkpoint; read it from top to bottom."""

import contextlib
import functools
import math
from collections.abc import Callable
from pathlib import Path

import jax
import ml_collections
import numpy as np
from etils import epath
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from pkm_jax.convert.tensors import flatten
from pkm_jax.data import dataset, loader
from pkm_jax.mesh import make_mesh
from pkm_jax.models.bert import BertConfig
from pkm_jax.training import hosts, init_from, settings
from pkm_jax.training.checkpoints import Checkpoints
from pkm_jax.training.evaluation import evaluate, save_counts
from pkm_jax.training.metrics import RunLog, parameter_table, training_flops, utilisation
from pkm_jax.training.optimizer import schedule
from pkm_jax.training.plan import make_plan
from pkm_jax.training.preemption import Stopped, StopRequests
from pkm_jax.training.program import make_program
from pkm_jax.training.state import TrainState, batch_sharding
from pkm_jax.training.step import Batch, eval_step


EVALUATION_SEED = 0     # of the records and masks evaluated over: the same for runs of any seed


def train(config: ml_collections.ConfigDict, name: str = '') -> Path:
    """Trains the model of a configuration in config.workdir, or goes on where it stopped.

    Returns the run's folder; of a finished run at once. `name` is shown with the progress.

    Raises:
      ValueError, FileNotFoundError: the configuration, corpus, checkpoint or folder cannot be used;
        raised before anything is compiled.
      Stopped: a signal asked for it; see preemption.py.
    """
    # 1. Refuse what cannot work; prepare the text.
    settings.check(config, jax.device_count(), jax.process_count())
    folder = settings.run_folder(config)
    vocabulary = config.data.vocab or init_from.vocabulary_of(config.init_from)
    with hosts.first_process_first('the prepared text'):
        prepared = dataset.prepare(
            settings.corpora(config), vocab=vocabulary, vocab_size=config.data.vocab_size,
            length=config.data.length, validation_fraction=config.data.validation_fraction,
            cache=config.data.cache, log=functools.partial(print, flush=True))
    model_config = settings.model_config(config, prepared.vocab_size)
    plan = make_plan(config, model_config, jax.device_count(), _device_bytes())
    mesh = make_mesh(plan.shards)

    with contextlib.ExitStack() as closing:
        closing.enter_context(jax.set_mesh(mesh))
        stream = closing.enter_context(contextlib.closing(_stream(config, prepared)))
        checkpoints = closing.enter_context(contextlib.closing(
            Checkpoints(folder / 'checkpoints', config.log.keep)))

        # 2. The state: resumed, else from pretrained weights, else from scratch.
        program = make_program(config, model_config, plan.sparse, mesh)
        resumed = checkpoints.restore(program.abstract)
        if resumed:
            state, progress = resumed
            stream.set_state(progress['data'])
            if int(state.step) == config.train.steps:
                return folder
        else:
            source = init_from.read(config.init_from) if config.init_from else None
            if source:
                init_from.check(source, program.abstract, model_config, prepared.vocab_path)
            if jax.process_index() == 0:
                settings.describe_run(config, folder)
                epath.Path(prepared.vocab_path).copy(folder / 'vocab.txt', overwrite=True)
            state = program.initialise(config.seed)
            if source:
                state = init_from.graft(source, state)

        # 3. Say what is trained, and train it.
        log = closing.enter_context(contextlib.closing(
            RunLog(folder, name or folder.name, int(state.step), config.train.steps)))
        shapes = {path: leaf.shape for path, leaf in flatten(state.params).items()}
        log.say('\n'.join([parameter_table(shapes), *plan.reasons]))
        if not resumed:
            log.write('start', 0, 0, parameters=sum(map(math.prod, shapes.values())))
        evaluate_now = _evaluation(config, model_config, program.graph, mesh, prepared, folder, log)
        requests = closing.enter_context(StopRequests(mesh))
        _loop(config, model_config, state, program.take_step, evaluate_now, stream, mesh,
              checkpoints, log, requests)
    return folder


def _loop(config, model_config: BertConfig, state: TrainState, take_step: Callable,
          evaluate_now: Callable, stream: loader.BatchStream, mesh: Mesh, checkpoints: Checkpoints,
          log: RunLog, requests: StopRequests) -> None:
    """Steps from state.step to the last, never waiting for a step before the next is under way."""
    step = start = int(state.step)
    steps, every = config.train.steps, config.log
    profiling, asked = False, 0
    window = []     # metrics of the steps since the last line, still on the devices
    report = _reporter(config, model_config, log)
    while step < steps and not asked:
        batch = _to_devices(next(stream), mesh)
        if step == start:
            with log.pause():
                log.say('compiling …')
                take_step = take_step.lower(state, batch).compile()
        if step + 1 == every.profile[0]:
            jax.profiler.start_trace(str(checkpoints.folder.parent / 'profile'))
            profiling = True
        with jax.transfer_guard('disallow'):
            state, metrics = take_step(state, batch)
        step += 1
        if (step - 1) % every.every == 0 and window:
            report(step - 1, window)
            window = []
        window.append(metrics)
        if profiling and step == every.profile[1]:
            jax.block_until_ready(metrics)
            jax.profiler.stop_trace()
        asked = requests.agreed()
        evaluates = step % every.eval_every == 0 or step == steps
        saves = step % every.checkpoint_every == 0 or step == steps or asked
        if evaluates or saves:
            report(step, window)
            window = []
            with log.pause():
                if evaluates:
                    evaluate_now(state, step)
                if saves:
                    checkpoints.save(state, {'data': stream.get_state()})
    checkpoints.wait()
    if not asked:       # one heard in the last step stops all processes too, before another run
        requests.agreed()
        asked = requests.agreed()
    if asked:
        raise Stopped(asked, step)


def _reporter(config, model_config, log):
    """A function that logs the mean of the metrics of the steps up to `step`."""
    tokens_per_step = config.train.batch * config.data.length
    flops = training_flops(model_config, config.data.length, config.data.max_predictions)
    rate = schedule(config.train.learning_rate, config.train.warmup, config.train.steps)

    def report(step, window):
        window = jax.device_get(window)
        seconds = log.lap()
        tokens_per_second = tokens_per_step * len(window) / seconds
        values = {name: float(np.mean([metrics[name] for metrics in window]))
                  for name in window[0]}
        values |= {'learning_rate': float(rate(step - 1)),
                   'steps_per_second': len(window) / seconds,
                   'tokens_per_second': tokens_per_second}
        used = utilisation(flops * tokens_per_second)
        if used is not None:
            values['mfu'] = used
        log.write('train', step, step * tokens_per_step, **values)
        log.show(step, values['loss'], tokens_per_second)

    return report


def _evaluation(config, model_config: BertConfig, graph: nnx.GraphDef, mesh: Mesh,
                prepared: dataset.Prepared, folder: Path, log: RunLog) -> Callable:
    """A function that evaluates a state on the same validation batches each time, and logs it."""
    count = jax.jit(functools.partial(eval_step, graph=graph),
                    out_shardings=NamedSharding(mesh, P()))     # for every host to read
    size = config.train.batch // config.train.accumulate

    def evaluate_now(state, step):
        batches = loader.evaluation_batches(
            prepared, 'validation', batch_size=size, seed=EVALUATION_SEED,
            n_batches=config.log.eval_batches * config.train.accumulate, **_masking(config),
            **_hosts())
        values, counts = evaluate(state, (_to_devices(batch, mesh) for batch in batches), count,
                                  model_config, config.memory.dead_after)
        log.write('eval', step, step * config.train.batch * config.data.length, **values)
        log.say(f'evaluation at step {step:,}: loss {values["loss"]:.4f}, accuracy '
                f'{values["accuracy"]:.4f}' + ''.join(
                    f'; layer {layer}: top-1 usage {use["top_1_usage"]:.1%}, top-{use["k"]} '
                    f'{use["top_k_usage"]:.1%} of {use["slots"]:,} slots over '
                    f'{values["eval_tokens"]:,} tokens'
                    for layer, use in values.get('memory', {}).items()))
        if jax.process_index() == 0:
            for layer, slots in counts.items():
                save_counts(folder / f'slot_counts_{layer}.npz', slots)

    return evaluate_now


def _stream(config, prepared) -> loader.BatchStream:
    return loader.BatchStream(prepared, 'train', batch_size=config.train.batch, seed=config.seed,
                              workers=config.data.workers, **_masking(config), **_hosts())


def _masking(config) -> dict:
    return dict(mask_rate=config.data.mask_rate, whole_word=config.data.whole_word,
                max_predictions=config.data.max_predictions)


def _device_bytes() -> int | None:
    """Memory of a device, or None where it does not say."""
    return (jax.local_devices()[0].memory_stats() or {}).get('bytes_limit')


def _hosts() -> dict:
    return dict(process_index=jax.process_index(), process_count=jax.process_count())


def _to_devices(batch: dict[str, np.ndarray], mesh: Mesh) -> Batch:
    """This host's rows as its part of global arrays, split over all devices."""
    return {name: jax.make_array_from_process_local_data(batch_sharding(mesh), rows)
            for name, rows in batch.items()}

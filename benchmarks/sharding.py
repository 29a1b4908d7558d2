"""Training steps over the GPUs of this machine: equality, weak scaling by layout, XLA's options.

    python -m benchmarks.sharding [--small]

First three steps of a small model on several GPUs beside those of one, in each kind of layout,
dense and sparse. Then BERT-base in bfloat16, without memory and with two memories of 512² slots
(dense updates of float32 tables) on 32 × 512 tokens a GPU, and with one memory of 2048² slots
(sparse updates of a bfloat16 table, row-wise Adam) on 8 × 512: by layout, the one that is chosen by
default marked. *Weak scaling* is one GPU's time over that of several, each with as many tokens.
Then other options of XLA, most of them without memory alone.

Times are medians of repeated timings, each of several steps of which none waits for the host
(`steps.seconds_of`). All programs are compiled side by side, and nothing is timed meanwhile. Some
five minutes on two GPUs and 16 cores. `--small` is a test of this program, for a CPU with
JAX_NUM_CPU_DEVICES=2. Exits 1 if steps differ.
"""

import argparse
import itertools
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np

from benchmarks.steps import (
    CALLS,
    RUNS,
    WORDS,
    Step,
    compiled,
    random_batch,
    run_of,
    seconds_of_step,
)
from pkm_jax.configs import bert_base_pkm, bert_base_pkm_pod
from pkm_jax.configuration.run import Run
from pkm_jax.memory.kernels import GPU_COLUMNS
from pkm_jax.mesh import Shards
from pkm_jax.training.layout import Layout, bytes_of_device, lay_out, tables_of
from pkm_jax.training.layout_time import rates_here

TOLERANCE = 2e-5        # of parameters after three steps of 1e-4 and 1e-3, and of losses
PLAIN, MEMORIES, SPARSE = 'BERT-base', 'two memories of 512², dense', '2048² slots, sparse'
TARGETS = {PLAIN: 0.96, MEMORIES: 0.96, SPARSE: 0.92}
SCHEDULER = {'xla_gpu_enable_latency_hiding_scheduler': True}
MEGABYTE = 2 ** 20
FEW = 128       # words of small models
# What may make the sum of gradients cheaper, or overlap it with the backward pass, as XLA of jax
# 0.10 to 0.12 calls it. Left to itself XLA packs the gradients that it sums together into one array
# (`training.program`).
OPTIONS: dict[str, dict[str, Any]] = {
    'gradients packed': {'xla_disable_hlo_passes': ''},
    'scheduler': SCHEDULER,
    'scheduler, sums of 128 MB': SCHEDULER | {
        'xla_gpu_all_reduce_combine_threshold_bytes': 128 * MEGABYTE},
    'scheduler, sums of 8 MB': SCHEDULER | {
        'xla_gpu_all_reduce_combine_threshold_bytes': 8 * MEGABYTE},
    'scheduler, urgent stream': SCHEDULER | {
        'xla_gpu_enable_highest_priority_async_stream': True},
    'scheduler, four sums at a time': SCHEDULER | {
        'xla_gpu_experimental_parallel_collective_overlap_limit': 4},
    'scheduler, no command buffers': SCHEDULER | {'xla_gpu_enable_command_buffer': ''},
    'no command buffers': {'xla_gpu_enable_command_buffer': ''},
}
OF_ALL_MODELS = 2       # of these; the rest is tried without memory alone


class Case(NamedTuple):
    """A step to be timed."""
    model: str
    run: Run
    layout: Layout
    default: bool           # what `lay_out` chooses
    options: str = ''       # a name in OPTIONS

    @property
    def devices(self) -> int:
        return int(np.prod(self.layout.shards))

    def compiled(self) -> Step:
        return compiled(self.run, self.layout.shards, self.layout.sparse,
                        jax.devices()[:self.devices], OPTIONS.get(self.options))


def configuration(model: str, small: bool) -> ml_collections.ConfigDict:
    """That of one of the models in TARGETS."""
    config = (bert_base_pkm_pod if model == SPARSE else bert_base_pkm).get_config()
    config.model.attention_dropout = 0.
    config.memory.update({PLAIN: dict(placement='none', layers=()),
                          MEMORIES: dict(layers=(4, 8), updates='dense'),
                          SPARSE: dict(sub_keys=2048)}[model])
    if small:
        config.model.update(layers=1, width=128, attention_heads=1, feed_forward_width=128)
        config.memory.update(sub_keys=16, top_k=4, query_width=8)
        if model != PLAIN:
            config.memory.layers = (0,)
    return config


def run_on(model: str, devices: int, small: bool) -> Run:
    """Its run on so many devices."""
    rows, length = (4, 16) if small else (8 if model == SPARSE else 32, 512)
    return run_of(configuration(model, small), rows * devices, length, FEW if small else WORDS)


def chosen(run: Run, devices: int) -> Layout:
    return lay_out(run, devices, 1, bytes_of_device(), rates_here())


def kinds_of_layouts(run: Run, devices: int) -> list[Shards]:
    """Tables whole, in rows, in as many columns as may be, and where there are four in both."""
    if not run.model.memories:
        return [Shards(devices)]
    width = tables_of(run.model.memories).width
    columns = max(part for part in range(1, devices + 1)
                  if devices % part == 0 and (part == 1 or width % (part * GPU_COLUMNS) == 0))
    both = [Shards(devices // 4, 2, 2)] if devices % 4 == width % (2 * GPU_COLUMNS) == 0 else []
    return list(dict.fromkeys([Shards(devices), Shards(1, devices),
                               Shards(devices // columns, 1, columns), *both]))


def small_programs(devices: int, pool: Executor) -> dict[tuple[str, Shards], tuple[Run, Future]]:
    """A small model's steps on one device and on several in each kind of layout, by updates and
    layout."""
    config = bert_base_pkm.get_config()
    config.model.update(layers=1, width=512, attention_heads=4, feed_forward_width=64,
                        dtype='float32', attention_dropout=0.)
    config.memory.update(layers=(0,), sub_keys=16, heads=2, top_k=4, query_width=16)
    config.train.update(warmup=1)
    cases = {}
    for updates in ('dense', 'sparse'):
        config.memory.updates = updates
        run, sparse = run_of(config, 16, 16, FEW), updates == 'sparse'
        cases |= {(updates, shards): (run, shards, sparse)
                  for shards in (Shards(), *kinds_of_layouts(run, devices))}

    def compiled_exactly(case):
        run, shards, sparse = case
        with jax.default_matmul_precision('highest'):
            return compiled(run, shards, sparse, jax.devices()[:int(np.prod(shards))])

    return {name: (case[0], pool.submit(compiled_exactly, case)) for name, case in cases.items()}


def differences(programs: dict[tuple[str, Shards], tuple[Run, Future]],
                ) -> Iterator[tuple[str, float]]:
    """Each layout, and the largest difference to one device of losses and all parameters after
    three steps."""
    found = {name: _after_three_steps(run, future.result())
             for name, (run, future) in programs.items()}
    for (updates, shards), ours in found.items():
        if shards != Shards():
            largest = jax.tree.map(lambda one, other: float(np.max(np.abs(
                np.float64(one) - np.float64(other)))), ours, found[updates, Shards()])
            yield f'{updates}, {_parts(shards)}', max(jax.tree.leaves(largest))


def _after_three_steps(run: Run, step: Step) -> tuple:
    """Parameters and losses."""
    state, losses = step.initialise(np.uint32(0)), []
    for number in range(3):
        state, metrics = step.take(state, step.put(random_batch(run, number)), np.uint32(0))
        losses.append(metrics['loss'])
    return jax.device_get((state.params, losses))


def cases_on(devices: int, small: bool) -> Iterator[Case]:
    """All models in all kinds of layouts; the sparse one in the layout chosen alone."""
    for model in TARGETS:
        run = run_on(model, devices, small)
        layout = chosen(run, devices)
        yield Case(model, run, layout, True)
        if model == MEMORIES:
            yield from (Case(model, run, layout._replace(shards=shards), False)
                        for shards in kinds_of_layouts(run, devices) if shards != layout.shards)


def print_equality(found: Iterable[tuple[str, float]]) -> bool:
    """The table; whether all are equal up to TOLERANCE."""
    print('| layout, data × rows × columns | largest difference |\n| --- | --- |', flush=True)
    equal = True
    for name, difference in found:
        one = difference <= TOLERANCE
        equal &= one
        print(f'| {name} | {difference:.1e}{"" if one else " DIFFERENT"} |', flush=True)
    return equal


def compiling(cases: Iterable[Case], pool: Executor) -> list[tuple[Case, Future]]:
    return [(case, pool.submit(case.compiled)) for case in cases]


def _seconds(future: Future, case: Case, small: bool) -> float | Exception:
    """Of a step; of one that cannot be compiled or run, why."""
    try:
        return seconds_of_step(future.result(), random_batch(case.run), *(
            (1, 1) if small else (CALLS, RUNS)))
    except (RuntimeError, ValueError) as error:     # JaxRuntimeError is one
        return error.with_traceback(None)           # whose frames hold the state


def report(case: Case, seconds: float | Exception, alone: dict[str, float]) -> None:
    """A line of the table."""
    layout = _parts(case.layout.shards) + (' (default)' if case.default else '')
    cells = [case.model, case.options or 'none', str(case.devices), layout]
    if isinstance(seconds, Exception):
        said = (str(seconds).splitlines() or [type(seconds).__name__])[0][:100]
        print(f'| {" | ".join(cells)} | failed: {said} | | | |', flush=True)
        return
    scaling = f'{alone[case.model] / seconds:.3f}' if case.model in alone else ''
    target = f'{TARGETS[case.model]:.2f}' if case.default and case.devices > 1 else ''
    tokens = case.run.tokens_per_step / seconds
    print(f'| {" | ".join(cells)} | {seconds * 1e3:.2f} | {tokens:,.0f} | {scaling} | {target} |',
          flush=True)


def print_times(programs: list[tuple[Case, Future]], small: bool) -> None:
    """The table; on one device first, for weak scaling."""
    print('| model | options | GPUs | layout | ms | tokens/s | weak scaling | target |\n'
          + '| --- ' * 8 + '|', flush=True)
    alone: dict[str, float] = {}
    while programs:
        case, future = programs.pop(0)      # so that each program can go when it was timed
        seconds = _seconds(future, case, small)
        if case.devices == 1 and not isinstance(seconds, Exception):
            alone[case.model] = seconds
        report(case, seconds, alone)


def with_options(devices: int, small: bool) -> Iterator[Case]:
    """The layouts chosen by other options of XLA."""
    for model in TARGETS:
        run = run_on(model, devices, small)
        tried = None if model == PLAIN and not small else OF_ALL_MODELS
        yield from (Case(model, run, chosen(run, devices), True, options)
                    for options in list(OPTIONS)[:tried])


def _parts(shards):
    return ' × '.join(map(str, shards))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--small', action='store_true')
    small, start = parser.parse_args().small, time.perf_counter()
    counts = [count for count in (1, 2, 4, 8) if count <= jax.device_count()]
    print(f'{counts[-1]} of {jax.device_count()} × {jax.devices()[0].device_kind}, '
          f'jax {jax.__version__}\n', flush=True)
    cases = [cases_on(count, small) for count in counts]
    if counts[-1] > 1:
        cases.append(with_options(counts[-1], small))
    with ThreadPoolExecutor() as pool:
        of_equality = small_programs(counts[-1], pool)
        programs = compiling(itertools.chain.from_iterable(cases), pool)
        equal = print_equality(differences(of_equality))
    print(f'\n({len(programs)} programs compiled in {time.perf_counter() - start:.0f} s)\n',
          flush=True)
    print_times(programs, small)
    print(f'({time.perf_counter() - start:.0f} s in all)')
    sys.exit(not equal)


if __name__ == '__main__':
    main()

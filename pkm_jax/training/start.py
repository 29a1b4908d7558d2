"""What a person sees before the first step: which run begins, each phase with its time, and what
will run; and where compiled programs are kept."""

import contextlib
import time
from collections.abc import Iterator, Sequence

import jax
from jax.experimental.compilation_cache import compilation_cache as jax_cache
from jax.sharding import Mesh

from pkm_jax.configuration.run import Run
from pkm_jax.processes import hosts
from pkm_jax.training.layout import Layout


def compilation_cache() -> str | None:
    """Where JAX keeps compiled programs."""
    return jax.config.jax_compilation_cache_dir     # type: ignore[attr-defined]  # made when run


def use_compilation_cache(folder: str) -> None:
    """Keeps compiled programs in a folder, unless JAX was given one already."""
    if folder and compilation_cache() is None:
        jax.config.update('jax_compilation_cache_dir', folder)


@contextlib.contextmanager
def uncached() -> Iterator[None]:
    """Keeps JAX's cache from being read or written, in all threads: programs for other machines
    cannot be read back from it."""
    cache = compilation_cache()
    jax.config.update('jax_compilation_cache_dir', None)
    jax_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update('jax_compilation_cache_dir', cache)
        jax_cache.reset_cache()


def announced(runs: Sequence[Run]) -> Iterator[Run]:
    """The runs in turn, each of several by its number and name."""
    for number, run in enumerate(runs, 1):
        if len(runs) > 1:
            hosts.say(f'run {number} of {len(runs)}: {run.name}')
        yield run


@contextlib.contextmanager
def phase(what: str) -> Iterator[None]:
    """Says what begins, and the seconds that it took if it was long; the first process alone."""
    start = time.perf_counter()
    hosts.say(f'{what} …')
    yield
    seconds = time.perf_counter() - start
    if seconds >= 1:
        hosts.say(f'{what}: {seconds:.1f} s')


def _kept(run):
    if cache := compilation_cache():
        return f'kept in {cache}'
    why = ('nobody has called training.start.use_compilation_cache' if run.compilation_cache else
           "compilation_cache = ''")
    return f'not kept ({why}): each start compiles anew'


def summary(run: Run, layout: Layout, mesh: Mesh) -> list[str]:
    """Lines on devices, layout, and which fast paths are on or off and why."""
    device = mesh.devices.flat[0]
    sizes = ', '.join(f'{axis} {size}' for axis, size in mesh.shape.items() if size > 1)
    return [
        f'devices: {mesh.size} × {device.device_kind} in {jax.process_count()} processes, as '
        f'{sizes or "one"}; jax {jax.__version__}',
        *layout.reasons,
        *run.model.fast_paths(device.platform),
        f'compiled programs: {_kept(run)}',
        f'a step: {run.train.batch:,} examples of '
        f'{" or ".join(f"{length:,}" for length in run.task.buckets)} tokens, '
        f'{run.train.gradient_accumulation_steps} micro-batch(es), '
        f'{run.flops_of(run.task.buckets[-1]) / 1e12:,.3f} TFLOP']


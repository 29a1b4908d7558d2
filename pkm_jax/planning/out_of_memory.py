"""Where a run does not fit its devices: of what there is too much, and which settings help."""

import contextlib
import dataclasses
from collections.abc import Iterator

import jax

from pkm_jax.configuration.run import Run
from pkm_jax.mesh import make_mesh
from pkm_jax.models.interface import table_paths
from pkm_jax.planning import device_memory
from pkm_jax.planning.device_memory import DeviceMemory
from pkm_jax.refusal import OutOfMemory, Refusal, is_out_of_memory
from pkm_jax.training.layout import Layout, bytes_of_device, lay_out
from pkm_jax.training.layout_time import rates_here
from pkm_jax.training.program import abstract_batch, make_program


@contextlib.contextmanager
def explained(run: Run, layout: Layout) -> Iterator[None]:
    """Turns what XLA says for want of memory into a message that says of what, and two remedies.

    Other errors pass.

    Raises:
      OutOfMemory: the device has no room for what is done within.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(_message(run, layout, str(error).strip().splitlines()[0])) from error


def _message(run, layout, said):
    available, memory = bytes_of_device(), _plan(run, layout)
    by_size = sorted(memory.bytes.items(), key=lambda kind: -kind[1])
    parts = ', '.join(f'{kind} {_gigabytes(size)}' for kind, size in by_size if size)
    device = f'a device has {_gigabytes(available)}' if available else 'a device does not say'
    return (f'The memory of a device is exhausted ({said[:300]}). By the plan a step needs '
            f'{_gigabytes(memory.total)} of it ({parts}); {device}. Set '
            f'{" or ".join(_remedies(run, memory)) or "fewer slots, layers or a smaller width"}.')


def _remedies(run: Run, memory: DeviceMemory) -> list[str]:
    """Of the settings that need less, the first two that fit, else the two that save most; those
    too where by the plan all fits, which then knows too little."""
    found = []
    for setting, changed in _changes(run):
        with contextlib.suppress(Refusal):      # what cannot be helps nobody
            plan = _plan(changed)
            if plan.total < memory.total:
                helps = plan.fits and not memory.fits
                found.append((0 if helps else plan.total, f'{setting} ({_gigabytes(plan.total)})'))
    return [words for _, words in sorted(found, key=lambda one: one[0])[:2]]


def _changes(run: Run) -> Iterator[tuple[str, Run]]:
    """Settings that need less memory, those first that change no result, with the run that each
    makes of `run`."""
    train, tables, model = run.train, run.tables, run.model

    def trained(**fields):
        return dataclasses.replace(run, train=dataclasses.replace(train, **fields))

    def of_model(saving):
        return f'model.{saving.field}={saving.value}', dataclasses.replace(
            run, model=dataclasses.replace(model, **{saving.field: saving.value}))  # type: ignore[type-var]

    yield from (of_model(saving) for saving in model.savings() if saving.same_results)
    for steps in range(train.gradient_accumulation_steps + 1, train.batch + 1):
        if train.batch % steps == 0 and train.batch // steps % jax.device_count() == 0:
            more = trained(gradient_accumulation_steps=steps)
            if _plan(more).fits or train.batch // steps == jax.device_count():
                yield f'train.gradient_accumulation_steps={steps}', more
                break
    if not train.fsdp:
        yield 'train.fsdp=True', trained(fsdp=True)
    if model.memories and tables.updates != 'sparse':
        yield "memory.updates='sparse'", dataclasses.replace(
            run, tables=dataclasses.replace(tables, updates='sparse'))
    if model.memories and train.values_optimizer == 'adam':
        yield ("train.values_optimizer='rowwise_adagrad' with memory.updates='sparse'",
               dataclasses.replace(trained(values_optimizer='rowwise_adagrad'),
                                   tables=dataclasses.replace(tables, updates='sparse')))
    yield from (of_model(saving) for saving in model.savings() if not saving.same_results)


def _plan(run: Run, layout: Layout | None = None) -> DeviceMemory:
    """What a step of the run keeps on a device, as far as arithmetic tells."""
    available, rates = bytes_of_device(), rates_here()
    # `lay_out_here` asks all processes, of which this one alone may have no room.
    layout = layout or lay_out(run, jax.device_count(), jax.process_count(), available, rates)
    mesh = make_mesh(layout.shards)
    with jax.set_mesh(mesh):
        program = make_program(run, run.model, layout.sparse, mesh)
        given = device_memory.arguments(program.abstract, abstract_batch(run, mesh),
                                        table_paths(run.model.memories))
    return DeviceMemory(device_memory.estimated(given, run, layout, rates), available or 0)


def _gigabytes(size: int) -> str:
    return f'{size / 1e9:,.3g} GB' if size >= 1e9 else f'{size / 1e6:,.3g} MB'

"""What the loss of a trained run falls by when its values are refreshed, and rises by when they are
not read (docs/method.md, 4)."""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from pkm_jax.checkpoints import pretrained
from pkm_jax.configuration.run import Run
from pkm_jax.data import loader
from pkm_jax.memory.drift import OUTDATED, SIMPSON, fall_by_slot
from pkm_jax.memory.layer import MemoryReads
from pkm_jax.memory.usage import SlotCounts, count_slots, host_counts, no_counts
from pkm_jax.mesh import make_mesh
from pkm_jax.models.interface import MemorySite, at, replaced, table_paths
from pkm_jax.tasks.interface import Batch, Data, Task
from pkm_jax.training.layout import Layout
from pkm_jax.training.loop import of_this_process, prepared, to_devices, validation_batches
from pkm_jax.training.program import Program, make_program
from pkm_jax.training.state import gathered

FIRST, LAST = -8, 16        # powers of two that the step of a refresh is chosen from
Tables = dict[Any, Float[Array, 'S V']]     # by the memory that owns each


class Sums(NamedTuple):
    """Over some batches."""
    loss: Float[Array, '']
    terms: Float[Array, '']
    gradient: Tables                            # of the loss
    squares: dict[Any, SlotCounts]              # of which the mass is Σ w², w what reads a slot


def refresh(run: Run, layout: Layout, batches: int) -> dict[str, Any]:
    """Refreshes all values of a finished run at once, by its next `batches` training batches.

    Each value moves by −α·Σ w·g / (Σ w² + 1) over the tokens that read it with weight w, g being
    the gradient of the summed loss by what a token read: to what its readers ask for. α is the
    power of two with the least loss over as many batches after these. Nothing else changes, and
    there is no dropout.

    Returns the losses over the validation text 'before' and 'after', the 'step' α, and for each
    of 'memories' the share of the fall that its slots took off ('fall', see `fall_by_slot`), and of
    it, where drift was measured, what 'outdated' ones did. 'rise' is what the loss before rises by
    where reads are zeros: those of one memory's table, and of all. Writes
    FOLDER/slot_fall_MEMORY.npy [S].
    """
    data = prepared(run)
    run = run.with_vocabulary(data.vocab_size)
    mesh = make_mesh(layout.shards)
    with jax.set_mesh(mesh):
        program = make_program(run, run.model, layout.sparse, mesh)
        params, batch_stats = _loaded(run, program)
        sites = _owners(run.model.memories)
        tables = {name: at(params, site.table) for name, site in sites.items()}
        given: dict[str, Any] = dict(task=run.task, graph=program.graph, sites=run.model.memories)
        add = jax.jit(functools.partial(_add, **given), donate_argnums=0)
        loss = jax.jit(functools.partial(_loss, **given))

        def summed(tables, chosen):
            total = Sums(jnp.zeros(()), jnp.zeros(()),
                         {name: jnp.zeros(one.shape) for name, one in tables.items()},
                         {name: no_counts(len(one)) for name, one in tables.items()})
            for batch in chosen:
                total = add(total, tables, params, batch_stats, to_devices(batch, mesh))
            return total

        learnt, chosen_by = (list(_training_batches(run, data, first, batches))
                             for first in (run.train.steps, run.train.steps + batches))
        validation = validation_batches(run, data)
        on_every_host = functools.partial(jax.jit, out_shardings=NamedSharding(mesh, P()))
        change = _change(summed(tables, learnt), on_every_host(lambda counts: counts))

        def moved(step):
            return {name: (tables[name] + step * change[name]).astype(tables[name].dtype)
                    for name in tables}

        def total_loss(tables, chosen):
            return sum(float(loss(tables, params, batch_stats, to_devices(batch, mesh))[0])
                       for batch in chosen)

        step = _best_step(lambda step: total_loss(moved(step), chosen_by))
        unread = _unread(tables, lambda some: total_loss(some, validation()))
        by_slot = on_every_host(fall_by_slot)

        def measured(part):
            """Sums over the validation text after a part of the change, and what it takes off by
            slot. Its gradient, as large as the tables, is not kept."""
            total = summed(moved(part * step), validation())
            return float(total.loss), float(total.terms), {
                name: np.asarray(by_slot(gradient, change[name])) * step / float(total.terms)
                for name, gradient in total.gradient.items()}

        (before, terms, _), _, (after, *_) = parts = [measured(part) for part in SIMPSON]
        rise = {names: (total - before) / terms for names, total in unread.items()}
        memories = {}
        for name in tables:
            fall = sum(weight * falls[name] for weight, (*_, falls) in zip(SIMPSON.values(), parts))
            memories[str(name)] = {'rise': rise[name,], **_described(run, name, fall)}
    return {'before': before / terms, 'after': after / terms, 'rise': rise[*tables,], 'step': step,
            'batches': batches, 'memories': memories}


def _loaded(run: Run, program: Program) -> tuple[dict, dict]:
    """Parameters and running statistics of the run, without what its optimizer keeps."""
    state = pretrained.load_pretrained(
        pretrained.open_pretrained(str(run.folder)), program.initialise(np.uint32(run.seed)),
        say=lambda text: None)
    return state.params, state.batch_stats


def _change(of_training: Sums, whole: Callable[[SlotCounts], SlotCounts]) -> Tables:
    """What a refresh with the step 1 adds to the tables."""
    return {name: -gradient / (
        host_counts(whole(of_training.squares[name])).mass.astype(np.float32)[:, None] + 1)
        for name, gradient in of_training.gradient.items()}


def _described(run: Run, name: Any, fall: Float[np.ndarray, 'S']) -> dict[str, float]:
    drift = run.folder / f'slot_drift_{name}.npy'
    if jax.process_index() == 0:
        np.save(run.folder / f'slot_fall_{name}.npy', fall)
    found = {'fall': float(fall.sum())}
    if drift.exists():
        found['outdated'] = float(fall[np.load(drift) > OUTDATED].sum())
    return found


def _unread(
    tables: Tables, loss_of: Callable[[Tables], float],
) -> dict[tuple[Any, ...], float]:
    """The loss with zeros in the place of some tables, by their names: all, and each alone."""
    found = {}
    for names in dict.fromkeys([tuple(tables), *((name,) for name in tables)]):
        zeros = {name: jnp.zeros_like(tables[name], device=tables[name].sharding)
                 for name in names}
        found[names] = loss_of({**tables, **zeros})
    return found


def _best_step(loss_at: Callable[[float], float]) -> float:
    """The power of two up to which the loss falls; 0 where it never does."""
    best, lowest = 0., loss_at(0.)
    for power in range(FIRST, LAST + 1):
        found = loss_at(2. ** power)
        if not found < lowest:
            break
        best, lowest = 2. ** power, found
    return best


def _loss(
    tables: Tables, params: dict, batch_stats: dict, batch: Batch, *, task: Task,
    graph: nnx.GraphDef, sites: dict[Any, MemorySite],
) -> tuple[Float[Array, ''], tuple[Float[Array, ''], dict[Any, MemoryReads]]]:
    """The summed loss; its terms, and what each memory read."""
    for name, table in tables.items():
        params = replaced(params, sites[name].table, table)
    model = nnx.merge(graph, gathered(params, table_paths(sites)), batch_stats)
    outcome = task.outcome(model, batch, deterministic=True)
    return outcome.loss, (task.terms(batch), outcome.reads)


def _add(
    total: Sums, tables: Tables, params: dict, batch_stats: dict, batch: Batch, *, task: Task,
    graph: nnx.GraphDef, sites: dict[Any, MemorySite],
) -> Sums:
    differentiate = jax.value_and_grad(
        functools.partial(_loss, task=task, graph=graph, sites=sites), has_aux=True)
    (loss, (terms, reads)), gradient = differentiate(tables, params, batch_stats, batch)
    squares = dict(total.squares)
    for name, read in reads.items():
        owner = next(other for other in tables if sites[other].table == sites[name].table)
        squares[owner] = count_slots(squares[owner], read._replace(weights=read.weights ** 2),
                                     task.real(batch))
    return Sums(total.loss + loss, total.terms + terms, jax.tree.map(
        lambda sums, new: sums + new.astype(jnp.float32), total.gradient, gradient), squares)


def _owners(sites: dict[Any, MemorySite]) -> dict[Any, MemorySite]:
    """One memory for each value table."""
    found: dict[Any, MemorySite] = {}
    for name, site in sites.items():
        if all(site.table != other.table for other in found.values()):
            found[name] = site
    return found


def _training_batches(
    run: Run, data: Data, first: int, number: int,
) -> Iterable[dict[str, np.ndarray]]:
    """Those of the steps after `first` others, in micro-batches."""
    stream = loader.BatchStream(data, 'train', run.task.examples(data, run.seed),
                                batch_size=run.train.micro_batch, seed=run.seed,
                                buckets=run.task.buckets, **of_this_process())
    parts = run.train.gradient_accumulation_steps
    for place in range(first * parts, (first + number) * parts):
        yield stream.at(place)[0]

"""Programs that are compiled at the side are those that the run takes, and their errors are its."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pkm_jax.mesh import make_mesh
from pkm_jax.training import program as programs_of_runs
from pkm_jax.training.compiling import Programs, shapes_of
from pkm_jax.training.layout import lay_out_here
from pkm_jax.training.loop import prepared
from pkm_jax.training.program import abstract_batch, make_program
from tests.faults.kills import tiny
from tests.training.runs import runs_of

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures('compile_once')]
COMPILED = '/jax/core/compile/backend_compile_duration'


@pytest.fixture
def made(tmp_path):
    config = tiny(tmp_path, 'dense', 200)
    config.compilation_cache = ''
    run, = runs_of(config)
    run = run.with_vocabulary(prepared(run).vocab_size)
    mesh = make_mesh(lay_out_here(run).shards)
    with jax.set_mesh(mesh):
        yield run, make_program(run, run.model, False, mesh), mesh


def zeros(like):
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding), like)


def test_steps_and_evaluation_are_found_compiled(made):
    run, program, mesh = made
    programs = Programs(run, program, mesh, 0, fresh=True)
    state = programs.first_state()
    programs.wait()
    batch, part = (zeros(abstract_batch(run, mesh, rows=rows))
                   for rows in (run.train.batch, run.train.micro_batch))
    totals, seen = zeros(program.totals(part)), []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: seen.append(name) if name == COMPILED else None)
    program.count(state.params, state.batch_stats, part, totals)
    assert not seen
    for all_norms in (False, True):     # log.norms_every is 100
        state, metrics = programs.step(all_norms, shapes_of(batch))(state, batch, np.uint32(0))
        assert ('update_norm' in metrics['norms']) == all_norms
    assert int(state.step) == 2 and not seen


def test_an_error_of_a_trace_is_raised_where_it_is_waited_for(made):
    run, program, mesh = made

    class Fails:
        def lower(self, *_, **__):
            raise KeyError('this')

    programs = Programs(run, program._replace(take_step=Fails()), mesh, 0, fresh=False)
    with pytest.raises(KeyError, match='this'):
        programs.wait()
    programs.close()


def test_of_a_finished_run_nothing_is_made(made):
    run, program, mesh = made
    programs = Programs(run, program, mesh, run.train.steps, fresh=False)
    programs.wait()
    assert not programs._compiled


def test_options_of_a_step_reach_the_compiler(made, monkeypatch):
    run, _, mesh = made
    monkeypatch.setattr(programs_of_runs, 'options_of', lambda *_: {'xla_no_such_option': '1'})
    program = make_program(run, run.model, False, mesh)
    lowered = program.take_step.lower(program.abstract, abstract_batch(run, mesh), np.uint32(0),
                                      all_norms=False)
    with pytest.raises(RuntimeError, match='xla_no_such_option'):
        lowered.compile()

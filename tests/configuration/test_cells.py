"""The cells of an ablation: grids, lists, samples, seeds, shards and budgets."""

import pytest

from configs import ablation_grid, bert_base_pkm
from pkm_jax.configuration.cells import cells_of, shard, with_sources
from pkm_jax.configuration.resolve import runs_of
from pkm_jax.refusal import Refusal
from pkm_jax.training.layout import lay_out


@pytest.fixture
def grid():
    """A run without memory, and what starts from it or from scratch, by two seeds."""
    config = bert_base_pkm.get_config()
    config.workdir = 'runs/grid'
    config.train.steps = 20_000
    config.runs.update(
        pretrain=dict(memory=dict(placement='none', layers=()), train=dict(steps=50_000)),
        scratch={}, pretrained=dict(init_from='pretrain'))
    config.ablation.update(once=('pretrain',), seeds=(0, 1))
    return config


def names(cells):
    return [cell.name for cell in cells]


def test_a_list_of_runs_over_seeds(grid):
    cells = cells_of(grid)
    assert names(cells) == ['pretrain', 'scratch-seed0', 'pretrained-seed0', 'scratch-seed1',
                            'pretrained-seed1']
    last = cells[-1]
    assert last.starts_from == 'pretrain' and last.group == 'pretrained' and last.seed == 1
    run = last.run()
    assert run.seed == 1 and run.init_from == 'runs/grid/pretrain'
    assert run.workdir == 'runs/grid/pretrained-seed1' and run.model.placement == 'add'
    assert cells[0].run().seed == 0 and cells[0].run().model.placement == 'none'
    with pytest.raises(Refusal, match='pkm_jax.ablate takes it'):
        runs_of(grid)


def test_a_grid_over_any_field(grid):
    """Layers are a tuple, the start is a run; the runs that are trained once have no axes."""
    del grid.runs.scratch, grid.runs.pretrained
    grid.runs.memory = {}
    grid.ablation.update(seeds=(3,), axes=(
        ('init_from', ('', 'pretrain')), ('memory.layers', ((4,), (4, 8))),
        ('train.values_learning_rate', (1e-3,))))
    cells = cells_of(grid)
    assert names(cells)[:3] == [
        'pretrain', 'memory-init_from=-layers=4-values_learning_rate=0.001-seed3',
        'memory-init_from=-layers=4+8-values_learning_rate=0.001-seed3']
    assert [cell.starts_from for cell in cells] == ['', '', '', 'pretrain', 'pretrain']
    assert [cell.run().model.memory_layers for cell in cells[1:]] == [(4,), (4, 8)] * 2
    assert cells[1].point['memory.layers'] == (4,) and cells[1].group in cells[1].name


def test_what_starts_from_a_run_of_each_cell(grid):
    """Where it is not trained once, a run has its axes and seeds, and so have those from it."""
    grid.ablation.update(once=(), axes=(('model.width', (384, 768)),))
    cells = {cell.name: cell for cell in cells_of(grid)}
    assert cells['pretrained-width=384-seed1'].starts_from == 'pretrain-width=384-seed1'
    assert cells['pretrain-width=384-seed1'].run().seed == 1


def test_axes_alone_and_fields_of_one_name(grid):
    grid.runs = {}
    grid.ablation.update(once=(), seeds=(0,), axes=(
        ('model.layers', (9, 12)), ('memory.layers', ((4,),)), ('memory.top_k', (8,))))
    assert names(cells_of(grid))[0] == 'model.layers=9-memory.layers=4-top_k=8-seed0'


def test_a_sample_is_part_of_the_grid_and_the_same_each_time(grid):
    grid.runs = {}
    axes = (('memory.top_k', (1, 2, 4, 8)), ('memory.heads', (1, 2, 4, 8)))
    grid.ablation.update(once=(), seeds=(0,), axes=axes)
    every = names(cells_of(grid))
    grid.ablation.sample = 5
    chosen = names(cells_of(grid))
    assert len(chosen) == 5 and chosen == names(cells_of(grid))
    assert chosen == [name for name in every if name in chosen]
    grid.ablation.sample_seed = 1
    assert names(cells_of(grid)) != chosen


@pytest.mark.parametrize('n', [1, 2, 3, 7])
def test_shards_are_disjoint_and_complete(grid, n):
    cells = cells_of(grid)
    parts = [shard(cells, f'{i}/{n}') for i in range(1, n + 1)]
    assert names(sum(parts, [])) == names(cells)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    for part in parts:      # what a machine trains starts from nothing that it has not
        todo = names(with_sources(cells, part))
        assert all(cell.starts_from in ['', *todo] for cell in part)
        assert set(todo) - set(names(part)) <= {'pretrain'}


def test_equal_steps_in_all(grid):
    grid.ablation.budget = 'steps'
    steps = {cell.name: cell.run().train.steps for cell in cells_of(grid)}
    assert steps == {'pretrain': 50_000, 'scratch-seed0': 70_000, 'pretrained-seed0': 20_000,
                     'scratch-seed1': 70_000, 'pretrained-seed1': 20_000}


def test_equal_compute(grid):
    """From scratch all steps are dearer, as all are with memory: there are fewer."""
    grid.ablation.budget = 'compute'
    cells = {cell.name: cell.run() for cell in cells_of(grid)}
    flops = {name: run.with_vocabulary(run.task.vocab_size).flops_per_step * run.train.steps
             for name, run in cells.items()}
    assert flops['scratch-seed0'] == pytest.approx(
        flops['pretrain'] + flops['pretrained-seed0'], rel=1e-4)
    assert 20_000 < cells['scratch-seed0'].train.steps < 70_000


def test_settings_that_cannot_work_are_refused_by_the_run_of_their_cell_alone(grid):
    grid.ablation.update(axes=(('memory.top_k', (8, 600)),), budget='steps', seeds=(0,))
    _, *cells = cells_of(grid)
    with pytest.raises(Refusal, match='memory.top_k = 600'):
        cells[-1].run()
    assert cells[0].run().train.steps == 70_000


@pytest.mark.parametrize('changes, message', [
    ({'axes': (('memory.top', (8,)),)}, 'memory.top: there is no such field: did you mean memory.top_k'),
    ({'axes': (('memory.top_k', 8),)}, "each axis is a field and a tuple of its values"),
    ({'axes': (('memory.top_k', ('many',)),)}, "memory.top_k cannot be 'many'"),
    ({'once': ('pretraining',)}, "'pretraining', which is none of the runs: pretrain, scratch"),
    ({'seeds': (1, 1)}, r'ablation.seeds = \(1, 1\)'),
    ({'axes': (('memory.top_k', (8, 9)),), 'sample': 3}, 'the axes have 2 combinations'),
])
def test_an_ablation_that_cannot_work_is_refused(grid, changes, message):
    grid.ablation.update(changes)
    with pytest.raises(Refusal, match=message):
        cells_of(grid)


def test_a_run_cannot_start_from_a_later_one(grid):
    grid.ablation.once = ()
    grid.runs.scratch = dict(init_from='pretrained')
    with pytest.raises(Refusal, match='scratch-seed0 starts from pretrained-seed0, which comes after'):
        cells_of(grid)


@pytest.mark.parametrize('part', ['0/2', '3/2', '2', 'a/b', '1/0'])
def test_no_such_shard(part):
    with pytest.raises(Refusal, match='it must be i/n'):
        shard([], part)


@pytest.mark.parametrize('arguments, number', [
    ('scale=tiny,budget=compute', 10), ('scale=small,glue=mrpc+cola', 10), ('scale=base', 10),
    ('scale=small,model=causal', 10), ('scale=tiny,part=factors', 16),
    ('scale=base,part=factors,model=causal', 19)])
def test_every_cell_of_the_shipped_grid_is_possible(arguments, number):
    config = ablation_grid.get_config(arguments)
    assert config.ablation.seeds == ((1,) if 'factors' in arguments else (1, 2, 3))
    config.ablation.seeds = (1,)
    cells = cells_of(config)
    for cell in cells:
        lay_out(cell.run(), devices=8)
    assert len(cells) == number
    assert {cell.starts_from for cell in cells} <= {'', 'pretrain', 'pretrain_wide'}


def test_the_shipped_grid_crosses_both_cures_and_has_models_without_memory():
    config = ablation_grid.get_config('scale=small,wide=3000')
    config.ablation.seeds = (1,)
    cells = {cell.name: cell.run() for cell in cells_of(config)}
    crossed = {(run.model.placement, bool(run.init_from)) for name, run in cells.items()
               if name.endswith('-seed1')}
    assert crossed == {(placement, start) for placement in ('replace', 'add', 'none')
                       for start in (False, True)}
    assert cells['pretrain'].tokens_per_step * cells['pretrain'].train.steps >= 600e6
    assert cells['scratch_add-seed1'].tokens_per_step * cells['scratch_add-seed1'].train.steps >= 200e6
    assert cells['pretrain_wide'].model.feed_forward_width == 3000


@pytest.mark.parametrize('wrong', ['scale=large', 'seeds=3', 'wide=x', 'glue=mrpc,model=causal', 'glue=x'])
def test_arguments_of_the_shipped_grid(wrong):
    with pytest.raises(Refusal, match='configs/ablation_grid.py'):
        ablation_grid.get_config(wrong)

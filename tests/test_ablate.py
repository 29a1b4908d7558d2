"""Ablations end to end: killed, failing, split over machines, and a cell by its printed command."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from pkm_jax import ablate
from pkm_jax.checkpoints import store
from pkm_jax.configuration import command_line
from pkm_jax.refusal import ExitStatus, Refusal
from pkm_jax.report.__main__ import main as report
from pkm_jax.report.cells import read_cells
from pkm_jax.training import loop

pytestmark = pytest.mark.usefixtures('compile_once')


@pytest.fixture
def grid(config):
    """`pretrain` without memory, and a memory added to it, by two seeds."""
    config.workdir = str(Path(config.workdir).parent / 'grid')
    config.model.layers = 1
    config.memory.update(layers=(0,), drift_tokens=32)
    config.runs.update(pretrain=dict(memory=dict(placement='none', layers=())),
                       memory=dict(init_from='pretrain'))
    config.ablation.update(once=('pretrain',), seeds=(1, 2))
    return config


def weights(folder):
    return {name: np.asarray(array)
            for name, array in store.read_weights(store.newest(folder)).items()}


def cell(folder, name):
    return json.loads((folder / name / 'cell.json').read_text())


@pytest.fixture
def limited(monkeypatch):
    """Ends training after some batches, as a kill would; returns what has been taken."""
    real = loop.loader.BatchStream.__next__

    def after(batches):
        taken = []

        def next_batch(stream):
            if len(taken) == batches:
                raise KeyboardInterrupt
            taken.append(stream)
            return real(stream)

        monkeypatch.setattr(loop.loader.BatchStream, '__next__', next_batch)
        return taken
    return after


@pytest.mark.slow
def test_a_killed_grid_goes_on_and_skips_what_is_done(grid, limited, tmp_path):
    folder = Path(grid.workdir)
    limited(6 + 4)              # all of `pretrain`, and into the second half of the next
    with pytest.raises(KeyboardInterrupt):
        ablate.run(grid)
    assert cell(folder, 'pretrain')['trained']['steps'] == 6
    assert 'trained' not in cell(folder, 'memory-seed1')
    assert store.newest(folder / 'memory-seed1').name == '3'
    before = (folder / 'pretrain/metrics.jsonl').read_text()

    taken = limited(-1)
    page, failed = ablate.run(grid)
    assert not failed and len(taken) == 3 + 6       # from its checkpoint, and the other seed
    assert (folder / 'pretrain/metrics.jsonl').read_text() == before
    text = page.read_text()
    assert '3 cells: 3 done.' in text and '| memory | 2 |' in text and '| memory | 0 | 2 |' in text
    for name in ('model.csv', 'model.tex', 'memory.csv', 'memory.tex', 'cells.csv', 'loss.png',
                 'top_1_usage.png', 'drift.png', 'gini.png', 'dead.png'):
        assert (page.parent / name).stat().st_size > 100, name
    found = {one.name: one for one in read_cells(folder)}
    assert found['memory-seed1'].in_all('steps') == 12 and found['pretrain'].in_all('steps') == 6
    assert found['memory-seed1'].seconds > 0 and found['memory-seed1'].device_hours > 0

    taken = limited(-1)
    assert ablate.run(grid)[1] == [] and taken == []

    grid.workdir = str(tmp_path / 'straight')
    shutil.copytree(folder / 'pretrain', tmp_path / 'straight/pretrain')
    ablate.run(grid, only='memory-seed1')
    ours, theirs = weights(folder / 'memory-seed1'), weights(tmp_path / 'straight/memory-seed1')
    for name in theirs:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


@pytest.mark.slow
def test_a_failing_cell_is_named_and_the_others_go_on(grid, capsys):
    """One with settings that cannot be, what starts from it, and one with a fault of the program."""
    grid.ablation.seeds = (1,)
    del grid.runs.pretrain, grid.runs.memory
    grid.runs.update({'good': {}, 'bad': {'memory': {'top_k': 7}}, 'after': {'init_from': 'bad'},
                 'wrong': {'train': {'values_optimizer': 'rowwise_adam'}}})
    grid.ablation.once = ()
    page, failed = ablate.run(grid)
    assert failed == ['bad-seed1', 'after-seed1', 'wrong-seed1']
    text = page.read_text()
    assert '4 cells: 1 done, 3 failed.' in text
    assert '**bad-seed1**: memory.top_k = 7' in text
    assert '**after-seed1**: it starts from bad-seed1, which failed' in text
    folder = Path(grid.workdir)
    assert 'Traceback' in (folder / 'bad-seed1/failure.txt').read_text()
    assert 'cell bad-seed1 FAILED' in capsys.readouterr().out

    grid.runs.bad.memory.top_k = 2      # mended: it is tried again
    page, failed = ablate.run(grid)
    assert failed == ['wrong-seed1'] and 'bad-seed1**' not in page.read_text()


@pytest.mark.slow
def test_parts_of_a_grid_on_several_machines_make_one_report(grid, tmp_path):
    """Each in a folder of its own; the run that all start from is repeated."""
    for part in ('1/2', '2/2'):
        grid.workdir = str(tmp_path / part[0])
        ablate.run(grid, part=part)
    first, second = ({one.name for one in (tmp_path / part).iterdir() if (one / 'checkpoints').exists()}
                     for part in '12')
    assert first == {'pretrain', 'memory-seed1'}
    assert second == {'pretrain', 'memory-seed2'}
    for name, array in weights(tmp_path / '1/pretrain').items():
        np.testing.assert_array_equal(array, weights(tmp_path / '2/pretrain')[name])
    for name in second - first:
        shutil.copytree(tmp_path / '2' / name, tmp_path / '1' / name, dirs_exist_ok=True)
    report([str(tmp_path / '1')])
    text = (tmp_path / '1/ablation/report.md').read_text()
    assert '3 cells: 3 done.' in text and '| memory | 0 | 2 |' in text


def test_cells_that_are_not_there_are_refused(grid):
    with pytest.raises(Refusal, match='no cell is chosen, of pretrain, memory-seed1, memory-seed2'):
        ablate.run(grid, only='*-seed9')


def arguments(folder, corpus, cache):
    return [f'--config={command_line.SHIPPED}/ablation_grid.py:scale=tiny', f'--config.workdir={folder}',
            f'--config.data.corpus={corpus}', f'--config.data.cache={cache}',
            '--config.data.vocab_size=120', '--config.train.steps=12', '--config.train.warmup=2',
            '--config.train.batch=16', '--config.log.every=4',
            '--config.log.eval_every=6', '--config.model.layers=1', '--config.memory.layers=(0,)',
            '--config.ablation.refresh_batches=1', '--config.runs.pretrain.train.steps=12',
            '--config.compilation_cache=' + str(jax.config.jax_compilation_cache_dir)]


def start(words, **options):
    environment = {**os.environ, 'JAX_NUM_CPU_DEVICES': '1'}
    return subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True,
                          timeout=300, **options)


@pytest.mark.slow
def test_the_printed_command_of_a_cell_gives_its_numbers_again(corpus, cache, tmp_path):
    """Also the exit status, where a cell fails: here one of a width that its start has not."""
    given = arguments(tmp_path / 'grid', corpus, cache)
    name = 'pretrained_add-seed2'
    result = start(['-m', 'pkm_jax.ablate', *given, '--only=pretrained_[aw]*-seed2',
                    '--config.runs.pretrained_wide.init_from=pretrain'])
    assert result.returncode == ExitStatus.CELLS_FAILED, result.stderr
    assert result.stderr.endswith('1 cell(s) failed: pretrained_wide-seed2\n')
    text = (tmp_path / 'grid/ablation/report.md').read_text()
    command, = (line for line in text.splitlines() if line.endswith(f'--only={name}'))
    python, *words = shlex.split(command)
    result = start(words)
    assert python == 'python' and result.returncode == 0, result.stderr
    ours, theirs = (weights(tmp_path / one / name) for one in ('grid', 'grid_again'))
    assert len(ours) > 20
    for key in theirs:
        np.testing.assert_array_equal(ours[key], theirs[key], err_msg=key)

    def numbers(folder):
        lines = map(json.loads, (folder / name / 'metrics.jsonl').read_text().splitlines())
        return [(line['loss'], line.get('memory')) for line in lines if line['kind'] == 'eval']

    assert numbers(tmp_path / 'grid') == numbers(tmp_path / 'grid_again')
    found, again = (cell(tmp_path / one, name)['refreshed'] for one in ('grid', 'grid_again'))
    assert found == again and found['memories'].keys() == {'0'}

"""The command: what it prints and whether it says that a run fits."""

import re
import subprocess
import sys
import types

import pytest

from pkm_jax import compile_check
from tests.planning.tiny import needs_tpu_compiler, shrunk


@pytest.fixture
def tiny(config):
    return shrunk(config)


@needs_tpu_compiler
def test_what_the_compiler_refuses_does_not_fit(tiny, capsys):
    tiny.memory.update(placement='none', layers=())
    tiny.train.batch = 2 ** 23      # 2 million sequences a chip
    assert not compile_check.run(tiny, 'v5e:2x2')
    text = capsys.readouterr().out
    assert re.search(r'DOES NOT FIT: [\d.]+ GB or more of 16.91 GB, [\d.]+ GB too much\. '
                     r'Try a larger train.gradient_accumulation_steps.* '
                     r'The compiler of the step: RESOURCE_EXHAUSTED', text)
    too_much = float(re.search(r'([\d.]+) GB too much', text)[1])
    assert too_much > 10


def test_gpus_are_estimated(tiny, capsys):
    tiny.memory.shards.update(rows=1, columns=8)
    assert compile_check.run(tiny, 'h200:8')
    text = capsys.readouterr().out
    assert 'run on h200:8: 8 devices as data 1, rows 1, columns 8; compiled for as many CPU' in text
    assert 'estimated: nothing here is compiled' in text
    assert re.search(r'\d all-reduce +\S+ \+\d+ +columns +\d', text) and 'of 105.75 GB' in text
    assert 'chip hours' in text and ' for each' not in text


def test_the_whole_run_has_its_days_and_its_price(tiny, capsys):
    tiny.memory.update(placement='none', layers=())
    tiny.train.update(batch=2 ** 20, steps=10 ** 8)
    compile_check.run(tiny, 'h200:8', price=2.5)
    step, days, hours, money = (float(number.replace(',', '')) for number in re.search(
        r'estimate +([\d.]+) ms.*all 100,000,000 steps by this estimate: ([\d,.]+) days, '
        r'([\d,]+) chip hours, ([\d,]+) at 2.5 for each', capsys.readouterr().out, re.S).groups())
    assert days == pytest.approx(step / 1e3 * 1e8 / 86400, rel=.01)
    assert hours == pytest.approx(days * 24 * 8, rel=.01) and money == pytest.approx(2.5 * hours, rel=.01)


def test_what_cannot_be_planned_is_refused():
    done = subprocess.run(
        [sys.executable, '-m', 'pkm_jax.compile_check', '--config=configs/quickstart.py',
         '--topology=v9:4x4'], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("Not planned: --topology=v9:4x4: 'v9' is none of v5e")


def test_cells_that_differ_in_their_seeds_alone_are_planned_once(tiny, monkeypatch):
    planned = []

    def estimate(run, place):
        planned.append((run.name, run.model.memory.top_k))
        return types.SimpleNamespace(fits=run.model.memory.top_k < 3)

    monkeypatch.setattr(compile_check, 'estimate', estimate)
    monkeypatch.setattr(compile_check, 'text_of', lambda found, name, price: name)
    tiny.ablation.update(seeds=(1, 2), axes=(('memory.top_k', (2, 3)),))
    assert not compile_check.run(tiny, 'h200:8')
    assert planned == [('top_k=2-seed1', 2), ('top_k=3-seed1', 3)]

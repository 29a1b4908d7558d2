"""The main job end to end: a shipped configuration shrunk, a refusal, a process killed for real."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from configs import quickstart
from pkm_jax import pretrain
from pkm_jax.checkpoints import store
from pkm_jax.refusal import Refusal


@pytest.mark.slow
def test_the_quickstart_in_seconds(config, tmp_path, capsys):
    """Its five runs, each with what the shrunken configuration leaves of it, and their report."""
    small = quickstart.get_config()
    for section in ('model', 'data', 'train', 'log'):
        small[section].update(config[section].to_dict())
    small.memory.update(sub_keys=6, heads=2, top_k=3, query_width=8)
    small.runs.pretrain.train.steps = small.train.steps
    small.workdir = str(tmp_path / 'quickstart')
    page = pretrain.run(small).read_text()
    assert '<img' in page
    said = capsys.readouterr().out
    cells = [f'{start}_{placement}' for start in ('scratch', 'pretrained')
             for placement in ('replace', 'add')]
    for number, (name, memories) in enumerate((('pretrain', 0), *((cell, 1) for cell in cells)), 1):
        assert f'run {number} of 5: {name}\n' in said
        folder = tmp_path / 'quickstart' / name
        lines = [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]
        assert lines[-1]['kind'] == 'eval' and len(lines[-1].get('memory', {})) == memories
        assert name in page
    pretrained = store.read_weights(store.newest(tmp_path / 'quickstart' / 'pretrain'))
    weights = {cell: store.read_weights(store.newest(tmp_path / 'quickstart' / cell))
               for cell in cells}
    assert pretrained.keys() < weights['pretrained_add'].keys() == weights['scratch_add'].keys()
    for start in ('scratch', 'pretrained'):
        assert not any('layers/1/feed_forward' in name for name in weights[f'{start}_replace'])


def test_every_run_is_checked_before_the_first_starts(config, tmp_path):
    small = quickstart.get_config()
    small.workdir = str(tmp_path / 'quickstart')
    small.runs.scratch_replace.memory.top_k = 65
    with pytest.raises(Refusal, match='top_k = 65'):
        pretrain.run(small)
    assert not (tmp_path / 'quickstart').exists()


def command(folder: Path, corpus, cache):
    return [sys.executable, '-m', 'pkm_jax.pretrain',
            '--config=configs/ablation.py:init=scratch,placement=add,scale=small',
            f'--config.workdir={folder}', f'--config.data.corpus={corpus}',
            f'--config.data.cache={cache}', '--config.data.vocab_size=120',
            '--config.data.length=16', '--config.data.max_predictions=5',
            '--config.data.validation_fraction=0.1', '--config.train.batch=16',
            '--config.train.steps=300', '--config.log.eval_every=1000',
            '--config.model.dropout=0.1', '--config.log.checkpoint_every=20']


@pytest.mark.slow
def test_a_killed_process_goes_on_to_the_same_bits(corpus, cache, tmp_path):
    environment = {**os.environ, 'JAX_NUM_CPU_DEVICES': '1'}
    straight, killed = tmp_path / 'straight', tmp_path / 'killed'
    subprocess.run(command(straight, corpus, cache), env=environment, check=True)
    process = subprocess.Popen(command(killed, corpus, cache), env=environment)
    deadline = time.monotonic() + 300
    while not (killed / 'checkpoints' / '20').exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert int(store.newest(killed).name) < 300
    subprocess.run(command(killed, corpus, cache), env=environment, check=True)
    ours, theirs = (store.read_weights(store.newest(f)) for f in (killed, straight))
    for name in theirs:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)

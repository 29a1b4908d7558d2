"""Pretraining in processes of its own, as its users start it."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]


def arguments(config, prefix='--config'):
    """The command line that makes a shipped configuration this one.

    None cannot be given there: it is what a field without a value is.
    """
    for name, value in config.items():
        if isinstance(value, dict):
            yield from arguments(value, f'{prefix}.{name}')
        elif value is not None:
            yield f'{prefix}.{name}={tuple(value) if isinstance(value, list) else value}'


def start(config, processes=1):
    """Starts pretraining in so many processes, of 8 devices in all."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    environment = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(ROOT),
                   'JAX_NUM_CPU_DEVICES': str(8 // processes),
                   'JAX_DEFAULT_MATMUL_PRECISION': 'highest'}
    command = [sys.executable, '-m', 'pkm_jax.pretrain', '--config=configs/bert_base_pkm.py',
               *arguments(json.loads(config.to_json()))]
    if processes > 1:
        command += ['--config.distributed.enabled', f'--config.distributed.processes={processes}',
                    f'--config.distributed.coordinator=127.0.0.1:{port}']
    return [subprocess.Popen([*command, f'--config.distributed.process={index}'], cwd=ROOT,
                             env=environment, text=True, stdout=subprocess.PIPE,
                             stderr=subprocess.STDOUT) for index in range(processes)]


def finish(started, status=0):
    """Waits for all to exit with `status`; returns what each printed."""
    try:
        printed = [process.communicate(timeout=300)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    for process, output in zip(started, printed):
        assert process.returncode == status, f'{process.returncode}: {output}'
    return printed


def lines(folder, *kinds):
    """The lines of those kinds of a run's metrics.jsonl, without what differs from run to run."""
    path = folder / 'metrics.jsonl'
    every = map(json.loads, path.read_text().splitlines()) if path.exists() else ()
    return [{name: value for name, value in line.items()
             if name not in ('time', 'steps_per_second', 'examples_per_second',
                             'tokens_per_second')}
            for line in every if line['kind'] in kinds]


def wait_for_step(folder, step, started=()):
    """Waits until a run has written the metrics of a step; one of those `started` may not end."""
    deadline = time.monotonic() + 200
    while not any(line['step'] >= step for line in lines(folder, 'train')):
        ended = [process for process in started if process.poll() is not None]
        if ended or time.monotonic() > deadline:
            for process in started:
                process.kill()
            raise AssertionError(f'{folder} did not reach step {step}: ' + '\n'.join(
                f'{process.returncode}: {process.communicate()[0]}' for process in started))
        time.sleep(.02)

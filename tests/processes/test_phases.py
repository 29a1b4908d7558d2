"""Real runs that are signalled in each of their phases: none hangs, or loses what was written."""

import json
import signal
from pathlib import Path

import pytest

from pkm_jax.checkpoints import store
from pkm_jax.refusal import Refusal
from tests.processes.started import finish, start

SAVES = 'evaluation at step 2:'     # begins to write a checkpoint, in a run that does so each step


def newest(folder):
    try:
        return int(store.newest(folder).name)
    except Refusal:
        return 0


def signal_at(process, words, number):
    """Waits until the process has printed `words`, and sends it a signal; returns what it printed."""
    printed = ''
    while words not in printed:
        line = process.stdout.readline()
        assert line, printed
        printed += line
    process.send_signal(number)
    return printed


@pytest.mark.slow
@pytest.mark.parametrize('words, number, saved', [
    ('preparing the data', signal.SIGUSR1, False),
    ('making the first state', signal.SIGTERM, False),
    ('compiling the programs', signal.SIGHUP, True),
    ('retrieval: ', signal.SIGTERM, True),              # all is compiled: before the first step
    ('step 3/6', signal.SIGUSR1, True),                 # evaluates
    (SAVES, signal.SIGTERM, True),
    ('step 6/6', signal.SIGHUP, True)])                 # in the second before the end
def test_a_run_that_is_signalled_goes_on(config, tmp_path, words, number, saved):
    config.log.update(every=1, eval_every=1 if words == SAVES else 3, eval_batches=9,
                      checkpoint_every=1 if words == SAVES else 3)
    if words == 'preparing the data':
        config.data.cache = str(tmp_path / 'cache')
    folder = Path(config.workdir)
    process, = start(config)
    printed = signal_at(process, words, number)
    printed += process.communicate(timeout=120)[0]
    if saved:
        assert process.returncode == 128 + number, printed
        assert f'stopped after step {newest(folder)} by {number.name}' in printed
    else:
        assert (process.returncode, newest(folder)) == (-number, 0), printed
    finish(start(config))
    assert newest(folder) == 6
    lines = [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]
    assert [line['step'] for line in lines if line['kind'] == 'train'] == [1, 2, 3, 4, 5, 6]

"""A run that is killed at random moments until it is through, and the same run never killed."""

import functools
import json
import math
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

from pkm_jax.checkpoints import store
from pkm_jax.checkpoints.arrays import open_item
from pkm_jax.configs import bert_base_pkm
from pkm_jax.refusal import Refusal
from tests.processes.started import lines, start
from tests.training.events import scalars

STOPS_WITHIN = 150      # seconds: of the other processes, after one of them was killed
WORDS = 'the cat dog sat ran on under a mat tree house and then saw big red small green'.split()


def tiny(folder: Path, updates: str, steps: int) -> ml_collections.ConfigDict:
    """A run with dropout, batch norm, two micro-batches and a memory, of milliseconds a step."""
    config = bert_base_pkm.get_config()
    config.workdir = str(folder / 'run')
    config.compilation_cache = str(folder.parent / 'compiled')
    config.model.update(layers=2, width=16, attention_heads=2, feed_forward_width=32, max_length=16,
                        dropout=.1, attention_dropout=.1, dtype='float32')
    config.memory.update(layers=(1,), sub_keys=6, heads=2, top_k=3, query_width=8, dead_after=2,
                         query_norm='batch', query_dropout=.1, updates=updates)
    config.data.update(corpus=str(_corpus(folder.parent)), cache=str(folder.parent / 'prepared'),
                       vocab_size=120, length=16, max_predictions=3, validation_fraction=.1,
                       workers=0)
    config.train.update(steps=steps, batch=16, warmup=2, gradient_accumulation_steps=2)
    # One that is killed early never comes; one that is killed later is missed.
    config.distributed.update(initialization_timeout=25, heartbeat_timeout=10)
    config.log.update(every=1, eval_every=15, eval_batches=2, checkpoint_every=6)
    return config


def _corpus(folder):
    path, rng = folder / 'text.txt', np.random.default_rng(0)
    if not path.exists():
        path.write_text('\n'.join(' '.join(rng.choice(WORDS, 9)) + f' {n}' for n in range(600)))
    return path


def undisturbed(config: ml_collections.ConfigDict, processes: int) -> float:
    """Trains to the end; the seconds until its first step."""
    began, started = time.monotonic(), start(config, processes)
    _wait(started, lambda: _step(config), math.inf)
    first = time.monotonic() - began
    _stopped(started, 1_800, {0})
    return first


def killed(config: ml_collections.ConfigDict, processes: int, kills: int, seconds: float,
           first_step: float, rng: np.random.Generator) -> dict[str, int]:
    """Trains the same with interruptions, none after so many seconds; how many of each kind there
    were.

    Half of them come at any time before the first step of a start, which takes less than the very
    first did; the others some steps later: SIGKILL to all processes or to one, SIGTERM to all or
    to one.
    """
    counts: dict[str, int] = {}
    end = time.monotonic() + seconds
    while sum(counts.values()) < kills and time.monotonic() < end:
        began, saved = time.time(), _saved(config)
        steps = functools.partial(_has_steps, config, began, saved)
        started = start(config, processes)
        if rng.random() < .5:
            _wait(started, lambda: False, rng.uniform(0, first_step))
        else:
            if _wait(started, steps, 300):
                first_step = min(first_step, time.time() - began)
            later = _step(config) + rng.integers(15)
            _wait(started, lambda: _step(config) >= later, 300)
        if any(one.poll() is not None for one in started):      # it is through, or failed by itself
            _stopped(started, STOPS_WITHIN, {0})
            return counts
        what = rng.choice([signal.SIGKILL, signal.SIGTERM])
        victims = started if rng.random() < .5 else [started[rng.integers(processes)]]
        when = 'after some steps' if steps() else 'before a first step'
        for one in victims:
            one.send_signal(what)
        # Of several processes the others end by themselves, each in its own way.
        _stopped(started, STOPS_WITHIN, None)
        name = f'{signal.Signals(what).name} {when}'
        counts[name] = counts.get(name, 0) + 1
    _stopped(start(config, processes), 1_800, {0})
    return counts


def _wait(started, until, seconds):
    """Until that is so, or so many seconds have passed, or every process has ended; whether it is."""
    deadline = time.monotonic() + seconds
    while (time.monotonic() < deadline and not until()
           and any(one.poll() is None for one in started)):
        time.sleep(.01)
    return until()


def _stopped(started, seconds, allowed):
    """Waits for all processes; a failure shows what one printed."""
    deadline = time.monotonic() + seconds
    try:
        printed = [one.communicate(timeout=max(deadline - time.monotonic(), 1))[0]
                   for one in started]
    finally:
        for one in started:
            one.kill()
    for one, output in zip(started, printed):
        assert allowed is None or one.returncode in allowed, (one.returncode, output)
        assert 'is damaged' not in output, output


def _has_steps(config, began, saved):
    """Whether a start of that time from step `saved` has logged one: first it cuts what was not saved."""
    path = Path(config.workdir) / 'metrics.jsonl'
    return path.exists() and path.stat().st_mtime > began and _step(config) > saved


def _saved(config):
    """The step that a start would go on from."""
    try:
        return int(store.newest(Path(config.workdir)).name)
    except Refusal:         # none is finished
        return 0


def _step(config):
    """The last step that the run has logged."""
    path = Path(config.workdir) / 'metrics.jsonl'
    if not path.exists():
        return 0
    written = reversed(path.read_bytes().split(b'\n')[:-1])
    return json.loads(next((line for line in written if b'"train"' in line), b'{"step": 0}'))['step']


def differences(run: Path, other: Path) -> list[str]:
    """What differs between two finished runs, to the bit: weights, moments, statistics, marks,
    metrics of every step and place of the stream; and what one of them says twice or not at all."""
    found = []
    ours, theirs = _everything(run), _everything(other)
    found += [f'only one has {name}' for name in ours.keys() ^ theirs.keys()]
    found += [name for name in ours.keys() & theirs.keys()
              if np.asarray(ours[name]).tobytes() != np.asarray(theirs[name]).tobytes()]
    kinds = 'start', 'train', 'eval'
    found += [f'metrics: {ours} not {theirs}' for ours, theirs in
              zip(lines(run, *kinds), lines(other, *kinds)) if ours != theirs][:3]
    if len(lines(run, *kinds)) != len(lines(other, *kinds)):
        found.append(f'{len(lines(run, *kinds))} lines of metrics, not {len(lines(other, *kinds))}')
    shown = [(step, value) for tag, step, value in scalars(run / 'tensorboard') if tag == 'train/loss']
    logged = [(line['step'], float(np.float32(line['loss']))) for line in lines(run, 'train')]
    if shown != logged:
        found.append(f'TensorBoard has {len(shown)} losses, metrics.jsonl {len(logged)}')
    return found


def _everything(run) -> dict[str, Any]:
    """Every array of the newest checkpoint, and the progress, by name."""
    checkpoint = store.newest(run)
    arrays = {f'{item}{jax.tree_util.keystr(path)}': array for item in ('model', 'rest')
              for path, array in jax.tree_util.tree_leaves_with_path(open_item(checkpoint / item))}
    progress = json.loads((checkpoint / 'progress' / 'metadata').read_text())
    return arrays | {'place of the stream': np.frombuffer(json.dumps(progress['data']).encode(),
                                                          np.uint8)}


def check(
    updates: str, processes: int, kills: int, seed: int, seconds: float = math.inf,
) -> str:
    """Both runs, and one line on what was done and seen.

    Raises:
      AssertionError: the killed run differs.
    """
    with tempfile.TemporaryDirectory() as folder:
        steps = max((60 if processes == 1 else 8) * kills, 60)  # more than starts take until kills
        straight = tiny(Path(folder) / 'straight', updates, steps)
        broken = tiny(Path(folder) / 'broken', updates, steps)
        straight.log.checkpoint_every = steps
        first_step = undisturbed(straight, processes)
        counts = killed(broken, processes, kills, seconds, first_step,
                        np.random.default_rng(seed))
        found = differences(Path(broken.workdir), Path(straight.workdir))
        assert not found, (updates, processes, seed, found)
    said = ', '.join(f'{number} × {name}' for name, number in sorted(counts.items()))
    return (f'{updates} updates, {processes} process(es): {sum(counts.values())} kills over {steps} '
            f'steps ({said}): equal to the bit')

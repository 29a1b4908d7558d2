"""What a run shows and writes while it trains."""

import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import jax
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.summary_pb2 import Summary
from tqdm import tqdm

from pkm_jax.accelerators import peak_flops
from pkm_jax.training.metrics_file import MetricsFile

FIELDS = ('step', 'tokens', 'time')     # of every line, beside its kind: no metrics


class Stopwatch:
    """Seconds of training, without what happens inside `pause()`."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    def seconds(self) -> float:
        return time.perf_counter() - self._start

    @contextmanager
    def pause(self) -> Iterator[None]:
        before = time.perf_counter()
        yield
        self._start += time.perf_counter() - before


class RunLog:
    """metrics.jsonl and TensorBoard files of a run, and its progress on the terminal.

    A bar where standard error is a terminal, plain lines otherwise. Only the first process writes.
    `known` is the `state` that was saved with the checkpoint of `step`, of a run that goes on
    there; `every` is `log.every`. TensorBoard's file is made anew from metrics.jsonl, so that both
    say the same, however the run before ended.
    """

    def __init__(self, folder: Path, name: str, step: int, steps: int, every: int = 1,
                 known: dict[str, Any] | None = None):
        self.name, self.steps, self._first = name, steps, step
        self._writes = jax.process_index() == 0
        self._watch, self._lap = Stopwatch(), 0.
        if not self._writes:
            return
        self._file = MetricsFile(folder / 'metrics.jsonl', step, every, known)
        self._board = _board(folder / 'tensorboard', self._file.lines)
        self._bar = tqdm(total=steps, initial=step, desc=name, unit='step',
                         dynamic_ncols=True) if sys.stderr.isatty() else None
        for note in self._file.notes:
            self.say(note)

    @property
    def state(self) -> dict[str, Any]:
        """What metrics.jsonl holds, to be saved with a checkpoint; {} in other processes."""
        return self._file.state if self._writes else {}

    def pause(self) -> AbstractContextManager[None]:
        """A context in which time does not count."""
        return self._watch.pause()

    def lap(self) -> float:
        """Seconds of training since the last call."""
        before, self._lap = self._lap, self._watch.seconds()
        return self._lap - before

    def write(self, kind: str, step: int, tokens: int, **values) -> None:
        """Adds one line to metrics.jsonl, and its numbers to TensorBoard."""
        if not self._writes:
            return
        line = {'kind': kind, 'step': step, 'tokens': tokens, 'time': time.time(), **values}
        self._file.append(line)
        self._board.write_event(_event(line))
        self._board.flush()

    def begin(self, **values) -> None:
        """Adds the line of a run's beginning, unless there is one."""
        if self._writes and not any(line['kind'] == 'start' for line in self._file.lines):
            self.write('start', 0, 0, **values)

    def show(self, step: int, loss: float, tokens_per_second: float) -> None:
        """Moves the progress on."""
        if not self._writes:
            return
        left = self._watch.seconds() / max(step - self._first, 1) * (self.steps - step)
        if self._bar is not None:
            self._bar.set_postfix_str(f'loss {loss:.3f}, {tokens_per_second:,.0f} tokens/s')
            self._bar.update(step - self._bar.n)
        else:
            print(f'{self.name}: step {step:,}/{self.steps:,}, loss {loss:.3f}, '
                  f'{tokens_per_second:,.0f} tokens/s, {_clock(left)} left', flush=True)

    def say(self, text: str) -> None:
        """Prints a line beside the progress bar."""
        if self._writes:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def close(self) -> None:
        if self._writes:
            if self._bar is not None:
                self._bar.close()
            self._board.close()
            self._file.close()


def utilisation(flops_per_second: float) -> float | None:
    """Share of the peak of all devices, or None where that is not known."""
    peak = peak_flops(jax.devices()[0].device_kind)
    return flops_per_second / (peak * jax.device_count()) if peak else None


def _board(folder, lines):
    """The writer of TensorBoard's only file in a folder, which has these lines."""
    folder.mkdir(exist_ok=True)
    for before in folder.glob('events.out.tfevents.*'):
        before.unlink()
    board = EventsWriter(str(folder / 'events'))
    for line in lines:
        board.write_event(_event(line))
    board.flush()
    return board


def _event(line):
    numbers = [Summary.Value(tag=f'{line["kind"]}/{path}', simple_value=value)
               for path, value in _numbers(line) if path not in FIELDS]
    return Event(wall_time=line['time'], step=line['step'], summary=Summary(value=numbers))


def _numbers(values, prefix=''):
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _numbers(value, f'{prefix}{name}/')
        elif isinstance(value, (int, float)):
            yield prefix + name, value


def _clock(seconds):
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f'{hours}:{minutes:02}:{seconds:02}' if hours else f'{minutes}:{seconds:02}'

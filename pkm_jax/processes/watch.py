"""A run that makes no progress says where every thread of it stands, and can end by itself."""

import collections
import contextlib
import faulthandler
import os
import statistics
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from pkm_jax.refusal import ExitStatus

LEAST = 60.         # seconds that a step may take, whatever the steps before it took
BEFORE_FIRST = 600.     # the same for the first one, which makes connections and tunes kernels
PEERS = 20          # times the median of the steps before
REMEMBERED = 100    # steps
LEAST_APART = 1800.     # the same for what is no step, of which the first may be the shortest
PERIOD = 1.         # seconds between looks; a step may take this much longer


class _UnderWay(NamedTuple):
    """What a process is at, and since when, in seconds of the monotonic clock."""
    since: float
    what: str = 'a step'
    is_step: bool = True


class Watch:
    """Watches the steps of a run while it is entered, from a thread of its own.

    Where one takes longer than PEERS × the median of those before, and than LEAST, the stacks of
    all threads go to standard error and to FOLDER/stacks-PROCESS.txt, once; with `exits` the
    process then ends with ExitStatus.HUNG. What happens within `apart` is no part of a step: it may
    take PEERS × the longest of its kind before, and LEAST_APART.
    """

    def __init__(self, folder: Path, process: int = 0, exits: bool = False):
        self._path, self._exits = folder / f'stacks-{process}.txt', exits
        self._durations = collections.deque[float](maxlen=REMEMBERED)
        self._longest: dict[str, float] = {}    # by what was done apart
        self._now: _UnderWay | None = None      # None: said already
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name='watch', daemon=True)

    def __enter__(self) -> 'Watch':
        self._now = _UnderWay(time.monotonic())
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def step_done(self) -> None:
        """To be called after every step."""
        now = time.monotonic()
        if self._now is not None:
            self._durations.append(now - self._now.since)
        self._now = _UnderWay(now)

    @contextlib.contextmanager
    def waiting_for(self, what: str) -> Iterator[None]:
        """Names what the step waits for within, where it is not the devices."""
        before = self._now
        self._now = before and before._replace(what=what)
        yield
        self._now = self._now and before

    @contextlib.contextmanager
    def apart(self, what: str) -> Iterator[None]:
        """Time for what is no step, such as 'an evaluation': by a limit of its own."""
        before, start = self._now, time.monotonic()
        self._now = _UnderWay(start, what, is_step=False)
        yield
        took = time.monotonic() - start
        self._longest[what] = max(took, self._longest.get(what, 0.))
        self._now = before and before._replace(since=before.since + took)

    def _limit(self, now: _UnderWay) -> tuple[float, str]:
        """Seconds that it may take, and what its like took before, in words."""
        if not now.is_step:
            longest = self._longest.get(now.what, 0.)
            return (max(LEAST_APART, PEERS * longest),
                    f'the longest before took {longest:.2f} s' if longest else 'the first')
        if not self._durations:
            return BEFORE_FIRST, 'the first'
        median = statistics.median(self._durations)
        return max(LEAST, PEERS * median), f'steps took {median:.2f} s'

    def _watch(self):
        while not self._ended.wait(PERIOD):
            now = self._now
            if now is None:
                continue
            limit, peers = self._limit(now)
            waited = time.monotonic() - now.since
            if waited > limit and self._now is now:
                self._now = None
                self._say(f'No progress for {waited:,.0f} s, in {now.what}; {peers}. The stacks of '
                          f'all threads follow, and are in {self._path}.\n')

    def _say(self, text):
        # Not by print(): what hangs may hold its lock. The disk may be what hangs: it comes last.
        os.write(2, f'\n{text}'.encode())
        faulthandler.dump_traceback(2, all_threads=True)
        if self._exits:     # should the disk take for ever
            faulthandler.dump_traceback_later(PERIOD, exit=True)
        with contextlib.suppress(OSError), self._path.open('a') as file:
            file.write(time.strftime('%Y-%m-%d %H:%M:%S ') + text)
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        if self._exits:
            os._exit(ExitStatus.HUNG)

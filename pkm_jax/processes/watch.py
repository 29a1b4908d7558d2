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

from pkm_jax.refusal import ExitStatus

LEAST = 60.         # seconds that a step may take, whatever the steps before it took
BEFORE_FIRST = 600.     # the same for the first one, which makes connections and tunes kernels
PEERS = 20          # times the median of the steps before
REMEMBERED = 100    # steps
PERIOD = 1.         # seconds between looks; a step may take this much longer


class Watch:
    """Watches the steps of a run while it is entered, from a thread of its own.

    Where one takes longer than PEERS × the median of those before, and than LEAST, the stacks of
    all threads go to standard error and to FOLDER/stacks-PROCESS.txt, once; with `exits` the
    process then ends with ExitStatus.HUNG. Time within `pause` does not count.
    """

    def __init__(self, folder: Path, process: int = 0, exits: bool = False):
        self._path, self._exits = folder / f'stacks-{process}.txt', exits
        self._durations = collections.deque[float](maxlen=REMEMBERED)
        self._what = 'a step'
        self._since: float | None = time.monotonic()    # None: paused, or said already
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name='watch', daemon=True)

    def __enter__(self) -> 'Watch':
        self._since = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def step_done(self) -> None:
        """To be called after every step."""
        now = time.monotonic()
        if self._since is not None:
            self._durations.append(now - self._since)
        self._since = now

    @contextlib.contextmanager
    def waiting_for(self, what: str) -> Iterator[None]:
        """Names what the step waits for within, where it is not the devices."""
        before, self._what = self._what, what
        yield
        self._what = before

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Time for what is no step, and takes what it takes."""
        since, self._since = self._since, None
        start = time.monotonic()
        yield
        self._since = None if since is None else since + time.monotonic() - start

    def limit(self) -> float:
        """Seconds that the step under way may take."""
        if not self._durations:
            return BEFORE_FIRST
        return max(LEAST, PEERS * statistics.median(self._durations))

    def _watch(self):
        while not self._ended.wait(PERIOD):
            since = self._since
            if since is not None and (waited := time.monotonic() - since) > self.limit():
                self._since = None
                self._say(f'No progress for {waited:,.0f} s, in {self._what}'
                          + (f'; steps took {statistics.median(self._durations):.2f} s'
                             if self._durations else ', the first')
                          + f'. The stacks of all threads follow, and are in {self._path}.\n')

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

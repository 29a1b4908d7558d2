"""Processes that do the work of preparing text which needs no order; see `worker.py`."""

import contextlib
import os
import pickle
import subprocess
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pkm_jax.data import worker

SMALL = 8_000_000       # bytes of text that are prepared before processes have started
MOST = 32               # one process reads, packs and writes for all of them
QUOTA = Path('/sys/fs/cgroup/cpu.max')


class Workers:
    """Runs functions of `worker.py` in so many processes, or with 0 in this one, at once.

    Processes of their own rather than those of `multiprocessing`: these would run the caller's
    script again. To be closed.
    """

    def __init__(self, description: str, number: int):
        self._description, self._tokenizer = description, worker.tokenizer_of(description)
        self._processes: list[subprocess.Popen] = []
        self._own = threading.local()       # the process of a thread
        self.number = number
        self._threads = ThreadPoolExecutor(number) if number else None

    def submit(self, name: str, *arguments: Any) -> Future:
        """The result to come of a function.

        `Future.result` raises RuntimeError where its process has ended.
        """
        if self._threads:
            return self._threads.submit(self._ask, name, arguments)
        done: Future = Future()
        done.set_result(getattr(worker, name)(self._tokenizer, *arguments))
        return done

    def _ask(self, name, arguments):
        try:
            if not hasattr(self._own, 'process'):
                self._start()
            _send(self._own.process, (name, arguments))
            return pickle.load(self._own.process.stdout)
        except (EOFError, BrokenPipeError, pickle.UnpicklingError) as error:
            raise RuntimeError('a process that prepares text ended with status '
                               f'{self._own.process.wait()} (-9: often for want of memory)'
                               ) from error

    def _start(self):
        # Each is one of many: libraries are not to start a thread a core in all of them. Ctrl-C
        # is for their parent, which ends them.
        self._own.process = subprocess.Popen(
            [sys.executable, '-P', worker.__file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            process_group=0, env=os.environ | {
                'TOKENIZERS_PARALLELISM': 'false', 'OPENBLAS_NUM_THREADS': '1',
                'PYTHONPATH': os.pathsep.join(
                    place for place in sys.path if isinstance(place, str) and place)})
        self._processes.append(self._own.process)
        _send(self._own.process, self._description)

    def close(self) -> None:
        """Ends the processes; what they have not begun is not done."""
        if self._threads:
            self._threads.shutdown(cancel_futures=True)
        for process in self._processes:
            with contextlib.suppress(BrokenPipeError):      # it has ended, and was not read to
                process.stdin.close()
            process.wait()
            process.stdout.close()


def _send(process, message):
    pickle.dump(message, process.stdin, pickle.HIGHEST_PROTOCOL)
    process.stdin.flush()


def workers_for(size: int | None) -> int:
    """How many prepare a text of so many bytes (None: not known): one a core up to MOST; 0 of a
    small one."""
    return 0 if size is not None and size < SMALL else min(_cores(), MOST)


def _cores() -> int:
    """Those that this process may use, by its affinity and by the quota of its control group."""
    cores = (len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else
             os.cpu_count() or 1)
    try:
        quota, period = map(int, QUOTA.read_text().split())
    except (OSError, ValueError):       # there is none: 'max'
        return cores
    return max(1, min(cores, quota // period))

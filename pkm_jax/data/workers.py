"""Processes that do the work of preparing text which needs no order; see `worker.py`."""

import os
import pickle
import subprocess
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from pkm_jax.data import worker

SMALL = 8_000_000       # bytes of text that are prepared before processes have started


class Workers:
    """Runs functions of `worker.py` in so many processes, or with 0 in threads of this one.

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
        """The result to come of a function; results are to be asked for in the order of the calls.

        `Future.result` raises RuntimeError where a process has ended.
        """
        if self._threads:
            return self._threads.submit(self._ask, name, arguments)
        done: Future = Future()
        done.set_result(getattr(worker, name)(self._tokenizer, *arguments))
        return done

    def _ask(self, name, arguments):
        if not hasattr(self._own, 'process'):
            self._own.process = self._started()
        process = self._own.process
        try:
            _send(process, (name, arguments))
            return pickle.load(process.stdout)
        except (EOFError, BrokenPipeError, pickle.UnpicklingError) as error:
            raise RuntimeError(f'a process that prepares text ended with status {process.wait()} '
                               '(-9: often for want of memory)') from error

    def _started(self):
        # Each is one of many: the tokenizers library is not to start threads in all of them.
        process = subprocess.Popen(
            [sys.executable, '-P', worker.__file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env=os.environ | {'TOKENIZERS_PARALLELISM': 'false',
                              'PYTHONPATH': os.pathsep.join(filter(None, sys.path))})
        self._processes.append(process)
        _send(process, self._description)
        return process

    def close(self) -> None:
        """Ends the processes; what they have not begun is not done."""
        if self._threads:
            self._threads.shutdown(cancel_futures=True)
        for process in self._processes:
            process.stdin.close()
            process.wait()
            process.stdout.close()


def _send(process, message):
    pickle.dump(message, process.stdin, pickle.HIGHEST_PROTOCOL)
    process.stdin.flush()


def workers_for(size: int | None) -> int:
    """How many prepare a text of so many bytes (None: not known): one a core; 0 of a small one."""
    if size is not None and size < SMALL:
        return 0
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1

"""Files that nobody wrote, for every reader of files of others: python -m tests.fuzz --inputs 100000

Valid files are damaged at random, in their bytes and in what those mean (JSON, members of an
archive, what is compressed). A reader may use such a file or refuse it. Everything else is a
finding: another exception, more than 5 seconds, more than 1 GB of memory, a crash, and whatever
runs or writes anything. What was found is kept in --keep, by the number of its input: --only READER
--first NUMBER --inputs 1 gives it again. The exit status is 1 where there is a finding.
"""

import argparse
import json
import multiprocessing
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

from absl import logging

from pkm_jax.refusal import Refusal
from tests.fuzz_readers import readers

SECONDS, BYTES = 5., 10 ** 9
AT_ONCE = 20_000    # inputs of a process
SILENT = 60.        # seconds without a new input after which a process is ended
# What Python does on the way to running or changing something (sys.addaudithook).
FORBIDDEN = ('os.system', 'os.exec', 'os.posix_spawn', 'os.fork', 'subprocess.Popen', 'os.remove',
             'os.rename', 'os.mkdir', 'os.rmdir', 'os.chmod', 'os.link', 'os.symlink', 'socket.',
             'shutil.', 'ctypes.dlopen', 'os.putenv', 'os.kill', 'signal.pthread_kill')


class Watched:
    """Notes what a reader does that no reader may, and ends what takes too long.

    It may write in `folder`, where that is its own.
    """

    def __init__(self, folder: Path | None = None):
        self.seen: list[str] = []
        self._active, self._folder = False, folder
        sys.addaudithook(self._hear)
        signal.signal(signal.SIGALRM, self._too_long)

    def __enter__(self) -> 'Watched':
        self.seen = []
        signal.setitimer(signal.ITIMER_REAL, SECONDS, SECONDS)      # again: a callback may swallow it
        self._active = True
        return self

    def __exit__(self, *_: Any) -> None:
        self._active = False
        signal.setitimer(signal.ITIMER_REAL, 0)

    def _hear(self, event, arguments):
        changes = event.startswith(FORBIDDEN) or event == 'open' and _writes(arguments)
        if self._active and changes and not self._within(event, arguments):
            self.seen.append(f'{event} {arguments!r:.200}')

    def _within(self, event, arguments):
        """Whether files are written, or renamed, in the reader's own folder."""
        places = {'open': arguments[:1], 'os.rename': arguments[:2]}.get(event, ())
        return self._folder and places and all(
            Path(place).is_relative_to(self._folder) for place in places)

    def _too_long(self, *_):
        raise TimeoutError(f'more than {SECONDS} s')


def _writes(arguments):
    _, mode, flags = arguments
    return any(letter in (mode or '') for letter in 'wax+') or flags & 3 if mode else False


def _most_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def try_reader(name: str, first: int, inputs: int, folder: Path, keep: Path) -> dict[str, Any]:
    """Counts of what became of the inputs `first` … of a reader; what was found is kept."""
    logging.set_verbosity(logging.ERROR)
    reader = readers()[name]
    watched = Watched(folder if reader.writes else None)
    for other, content in reader.beside.items():
        (folder / other).write_bytes(content)
    path, counts, found = folder / reader.file, Counter(), []
    path.write_bytes(reader.valid[0])
    reader.read(path)               # what is valid is read, and imports what it needs
    most = _most_memory() + BYTES
    resource.setrlimit(resource.RLIMIT_DATA, (8 * BYTES, resource.RLIM_INFINITY))   # of the machine
    for number in range(first, first + inputs):
        random = Random(f'{name} {number}')
        path.write_bytes(reader.damage(random, random.choice(reader.valid)))
        (folder / 'number').write_text(str(number))
        outcome = 'read'
        try:
            with watched:
                reader.read(path)
        except Refusal:
            outcome = 'refused'
        except BaseException as error:      # whatever else it may be is what is looked for
            outcome = type(error).__name__
            found.append((number, ''.join(traceback.format_exception(error, limit=-4))))
        if _most_memory() > most:
            sys.exit(f'{name}, input {number}: more than {BYTES:,} bytes')
        if watched.seen:
            outcome = 'did what no reader may'
            found.append((number, '\n'.join(watched.seen)))
        counts[outcome] += 1
        if outcome not in ('read', 'refused') and counts[outcome] <= 5:
            keep.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, keep / f'{name.replace(" ", "_")}-{number}-{reader.file}')
            print(f'{name}, input {number}: {found[-1][1]}', file=sys.stderr, flush=True)
    return dict(counts)


def in_process(name: str, first: int, inputs: int, keep: Path) -> dict[str, int]:
    """`try_reader` in a process of its own, begun again after an input that makes it crash."""
    total, end = Counter(), first + inputs
    while first < end:
        with tempfile.TemporaryDirectory(dir='/dev/shm' if Path('/dev/shm').is_dir() else None) as at:
            folder = Path(at) / 'files'
            folder.mkdir()
            # A fork has imported already what readers need.
            child = multiprocessing.get_context('fork').Process(target=_try, args=(
                name, first, min(end - first, AT_ONCE), folder, keep))
            number = folder / 'number'
            number.write_text(str(first))
            child.start()
            while child.is_alive():
                if time.time() - number.stat().st_mtime > SILENT:
                    child.kill()
                child.join(.05)
            if child.exitcode == 0:
                total.update(json.loads((folder.parent / 'counts').read_text()))
                first += min(end - first, AT_ONCE)
                continue
            last = int(number.read_text())
            keep.mkdir(parents=True, exist_ok=True)
            shutil.copy(folder / readers()[name].file, keep / f'{name}-{last}-crash')
            print(f'{name}, input {last}: exit status {child.exitcode}', file=sys.stderr)
            total.update({'crash': 1, 'before a crash': last - first})
            first = last + 1
    return dict(total)


def _try(name, first, inputs, folder, keep):
    counts = try_reader(name, first, inputs, folder, keep)
    (folder.parent / 'counts').write_text(json.dumps(counts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--inputs', type=int, default=29_000, help='of all readers together')
    parser.add_argument('--only', default='', help='one reader')
    parser.add_argument('--first', type=int, default=0, help='number of the first input')
    parser.add_argument('--keep', type=Path, default=Path('runs/fuzz'))
    options = parser.parse_args()
    names = [options.only] if options.only else list(readers())
    bad = 0
    for name in names:
        start = time.monotonic()
        counts = in_process(name, options.first, -(-options.inputs // len(names)), options.keep)
        others = {kind: count for kind, count in counts.items()
                  if kind not in ('read', 'refused', 'before a crash')}
        bad += sum(others.values())
        print(f'{name:37} {sum(counts.values()):>9,} inputs, {counts.get("read", 0):>9,} read, '
              f'{counts.get("refused", 0):>9,} refused, {sum(others.values()):>5,} findings '
              f'{others or ""} in {time.monotonic() - start:,.0f} s', flush=True)
    sys.exit(bool(bad))


if __name__ == '__main__':
    main()

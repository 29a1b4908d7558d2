"""One run at a time in a folder, also where several machines share it."""

import contextlib
import json
import math
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pkm_jax.data.files import make_folder
from pkm_jax.refusal import Refusal

BEAT = 20.          # seconds between signs of life
SILENT = 6 * BEAT   # after which a process that cannot be asked for is taken for dead


@contextlib.contextmanager
def only_run_in(folder: Path, say: Callable[[str], None] = print) -> Iterator[Callable[[], None]]:
    """Holds FOLDER/running.json, which says who runs here and is touched while that process lives.

    That of a dead process is taken over, which is said. A process of this machine, boot and
    container is asked for by its number and start. Of others the age of the file tells, by the
    clock of the file system, whatever the clocks of the machines say.

    Yields a function that raises Refusal where another run has taken over since, as it would if
    this process had been suspended for long. A folder that was made for this, and in which
    nothing was left, is removed again.

    Raises:
      Refusal: another run is under way in the folder; host, process and start are named. The
        folder cannot be made.
    """
    is_new = not Path(folder).exists()
    make_folder(folder, 'workdir')
    path = folder / 'running.json'
    mine = _take(path, say)
    ended = threading.Event()
    beating = threading.Thread(target=_beat, args=(path, mine, ended), daemon=True)
    beating.start()

    def still_ours() -> None:
        found = _read(path)
        if found is not None and found != mine:
            raise Refusal(f'{folder} was taken over by another run ({_who(found)}) while this one '
                          f'showed no sign of life: this one has stopped, and writes nothing.')

    try:
        yield still_ours
    finally:
        ended.set()
        beating.join()
        if _read(path) == mine:
            path.unlink(missing_ok=True)
        if is_new:
            with contextlib.suppress(OSError):      # it is not empty
                folder.rmdir()


class Holder(NamedTuple):
    """The run that holds a folder, as seen by another process, on any machine."""
    host: str
    process: int
    since: float    # seconds since 1970, by the clock of its host; 0: not known
    alive: bool


def holder(folder: Path) -> Holder | None:
    """Who runs in a folder, and whether it lives; None where running.json is not there.

    Nothing is written, so the folder may be mounted for reading. The age of the file is told by the
    clock of this machine.
    """
    path = folder / 'running.json'
    found = _read(path)
    if found is None:
        return None
    silent = _silent_in(path, found, lambda _: time.time())
    return Holder(str(found.get('host', '?')), int(found.get('process', 0)),
                  float(found.get('since', 0.)), silent > 0)


def _take(path: Path, say: Callable[[str], None]) -> dict[str, Any]:
    mine = {'host': socket.gethostname(), 'within': _within(), 'process': os.getpid(),
            'started': _started(os.getpid()), 'time': time.strftime('%Y-%m-%d %H:%M:%S'),
            'since': time.time()}
    while True:
        try:
            with path.open('x') as file:
                file.write(json.dumps(mine))
            return mine
        except FileExistsError:
            pass
        found = _read(path)
        if found is None:       # gone since
            continue
        silent = _silent_in(path, found, _now)
        if silent > 0:
            raise Refusal(f'{path.parent} is in use by another run ({_who(found)}): wait for it, '
                          f'stop it, or choose another --config.workdir.'
                          + (f' If it ended without a word, its place can be taken in '
                             f'{silent:.0f} s.' if silent < math.inf else ''))
        _remove_dead(path, found, say)


def _remove_dead(path, found, say):
    """Removes the file of a dead process if it still is that one, while no other process does."""
    claim = path.with_name(f'{path.name}.claim')
    try:
        claim.open('x').close()
    except FileExistsError:
        if _silent_in(claim, {}, _now):
            time.sleep(.01)     # until the other is through,
        else:                   # which has died within these lines
            claim.unlink(missing_ok=True)
        return
    try:
        if _read(path) == found:
            path.unlink()
            say(f'{path.parent}: the run before ({_who(found)}) ended without a word; its place '
                f'is taken')
    finally:
        claim.unlink(missing_ok=True)


def _who(found: dict[str, Any]) -> str:
    return f'process {found.get("process")} on {found.get("host")}, since {found.get("time")}'


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text())
    except OSError:
        return None
    except ValueError:          # being written, or cut short
        found = {}
    return found if isinstance(found, dict) else {}


def _silent_in(path: Path, found: dict[str, Any], now: Callable[[Path], float]) -> float:
    """Seconds until a run is taken for dead: 0 if it is, infinity if its process was seen.

    `now` gives the time by which the age of the file is told.
    """
    here = found.get('host'), found.get('within')
    if here == (socket.gethostname(), _within()) and found.get('started'):
        return math.inf if _started(found['process']) == found['started'] else 0.
    try:
        return max(0., path.stat().st_mtime + SILENT - now(path.parent))
    except FileNotFoundError:
        return 0.


def _now(folder: Path) -> float:
    """The time of the file system, in seconds."""
    probe = folder / f'running.{socket.gethostname()}-{os.getpid()}'
    probe.touch()
    now = probe.stat().st_mtime
    probe.unlink()
    return now


def _within() -> str:
    """What numbers of processes are unique in: this boot of this machine, and its container."""
    try:
        return (Path('/proc/sys/kernel/random/boot_id').read_text().strip() + ' '
                + os.readlink('/proc/self/ns/pid'))
    except OSError:
        return ''


def _started(process: int) -> str:
    """When a process of this machine began, in ticks since it was booted; '' where unknown.

    One that ended, and that its parent has not waited for, is still listed: unknown as well.
    """
    try:
        state, *others = Path(f'/proc/{process}/stat').read_text().rpartition(')')[2].split()
        return '' if state in 'ZX' else others[18]
    except (OSError, ValueError, IndexError):
        return ''


def _beat(path: Path, mine: dict[str, Any], ended: threading.Event) -> None:
    while not ended.wait(BEAT):
        with contextlib.suppress(OSError):
            if _read(path) == mine:     # of a folder that was removed nothing is made anew
                os.utime(path)

"""One run at a time in a folder, also where several machines share it."""

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from pkm_jax.data.files import make_folder
from pkm_jax.refusal import Refusal

BEAT = 20.          # seconds between signs of life
SILENT = 6 * BEAT   # after which a process on another machine is taken for dead


@contextlib.contextmanager
def only_run_in(folder: Path, say: Callable[[str], None] = print) -> Iterator[None]:
    """Holds FOLDER/running.json, which says who runs here and is touched while that process lives.

    That of a dead process is taken over, which is said. On this machine a process is asked for by
    its number and start, on others the file's age tells.

    Raises:
      Refusal: another run is under way in the folder; host, process and start are named. The
        folder cannot be made.
    """
    make_folder(folder, 'workdir')
    path = folder / 'running.json'
    _take(path, say)
    ended = threading.Event()
    beating = threading.Thread(target=_beat, args=(path, ended), daemon=True)
    beating.start()
    try:
        yield
    finally:
        ended.set()
        beating.join()
        path.unlink(missing_ok=True)


def _take(path: Path, say: Callable[[str], None]) -> None:
    mine = {'host': socket.gethostname(), 'process': os.getpid(), 'started': _started(os.getpid()),
            'time': time.strftime('%Y-%m-%d %H:%M:%S')}
    while True:
        try:
            with path.open('x') as file:
                file.write(json.dumps(mine))
            return
        except FileExistsError:
            pass
        found = _read(path)
        if found is None:       # gone since
            continue
        who = f'process {found.get("process")} on {found.get("host")}, since {found.get("time")}'
        if _lives(path, found):
            raise Refusal(f'{path.parent} is in use by another run ({who}): wait for it, stop it, '
                          f'or choose another --config.workdir.')
        say(f'{path.parent}: the run before ({who}) ended without a word; its place is taken')
        path.unlink(missing_ok=True)


def _read(path: Path) -> dict | None:
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError:          # being written, or cut short
        found = {}
    return found if isinstance(found, dict) else {}


def _lives(path: Path, found: dict) -> bool:
    if found.get('host') == socket.gethostname() and found.get('started'):
        return _started(found['process']) == found['started']
    try:
        return time.time() - path.stat().st_mtime < SILENT
    except FileNotFoundError:
        return False


def _started(process: int) -> str:
    """When a process of this machine began, in ticks since it was booted; '' where unknown."""
    try:
        return Path(f'/proc/{process}/stat').read_text().rpartition(')')[2].split()[19]
    except (OSError, IndexError):
        return ''


def _beat(path: Path, ended: threading.Event) -> None:
    while not ended.wait(BEAT):
        with contextlib.suppress(OSError):
            path.touch()

"""What the files of a finished checkpoint hold, written beside them, and what has become of them.

CHECKSUMS lists every other file of the folder with its size and SHA-256. It is the last file that
is written, once the others are on the disk, before the folder gets its name: a checkpoint that was
to have one (PROMISED in its metadata) and has none is damaged.
"""

import errno
import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
from absl import logging

from pkm_jax.processes import hosts
from pkm_jax.refusal import Refusal

CHECKSUMS = 'checksums.json'
PROMISED = {'checksums': CHECKSUMS}     # in Orbax's metadata of a checkpoint
METADATA = '_CHECKPOINT_METADATA'
# Orbax writes these last: the second one on storage without atomic renames too.
MARKERS = (METADATA, 'commit_success.txt')
THREADS = min(8, os.cpu_count() or 1)
GONE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR)


def write(checkpoint: Path) -> None:
    """Brings the files of a checkpoint to the disk and writes CHECKSUMS, which finishes it."""
    names = sorted(str(path.relative_to(checkpoint)) for path in checkpoint.rglob('*')
                   if path.is_file() and path.name != f'{CHECKSUMS}.part')
    with ThreadPoolExecutor(THREADS) as pool:
        files = dict(zip(names, pool.map(lambda name: _flushed(checkpoint / name), names)))
    unfinished = checkpoint / f'{CHECKSUMS}.part'
    unfinished.write_text(json.dumps({'files': files, 'sha256': _of_list(files)}, indent=0))
    _flushed(unfinished)
    unfinished.replace(checkpoint / CHECKSUMS)


def finished(checkpoint: Path) -> bool:
    """Whether everything of it was written, as far as the presence of files tells."""
    return (all((checkpoint / name).exists() for name in MARKERS)
            and ((checkpoint / CHECKSUMS).exists() or not _promised(checkpoint)))


def damage(checkpoint: Path) -> list[str]:
    """What is wrong with a checkpoint, file by file; the same list in every process.

    Each process reads its share of the files; all of them must call this. A checkpoint that was
    written before there were checksums is not examined, which is logged.

    Raises:
      Refusal: a file is there and cannot be read, which is no damage of the checkpoint.
    """
    problem, files = hosts.all_say(_listed(checkpoint))[0]
    if problem or files is None:
        return [problem] if problem else []
    share = sorted(files)[jax.process_index()::jax.process_count()]
    with ThreadPoolExecutor(THREADS) as pool:
        mine = list(pool.map(lambda name: _compared(checkpoint, name, files[name]), share))
    found = [verdict for said in hosts.all_say(mine) for verdict in said]
    if unreadable := [text for is_damage, text in found if text and not is_damage]:
        raise Refusal(f'The checkpoint {checkpoint} cannot be read: {"; ".join(unreadable[:3])}. '
                      f'Nothing was changed: start again when its storage answers, or rename the '
                      f'folder to go on from the checkpoint before.')
    return sorted(text for _, text in found if text)


def _listed(checkpoint: Path) -> tuple[str, dict[str, Any] | None]:
    """(what is wrong with the list or '', the files in it or None if there is no list)."""
    for name in MARKERS:
        if not (checkpoint / name).exists():
            return f'{name} is missing: it was never finished', None
    try:
        text = (checkpoint / CHECKSUMS).read_text()
    except FileNotFoundError:
        if _promised(checkpoint):
            return f'{CHECKSUMS} is missing', None
        logging.warning('The checkpoint %s has no checksums, as an earlier version wrote it: its '
                        'files are taken as they are.', checkpoint)
        return '', None
    except (OSError, UnicodeDecodeError) as error:
        return f'{CHECKSUMS} cannot be read ({error})', None
    try:
        listed = json.loads(text)
        files = listed['files']
        if listed['sha256'] != _of_list(files):
            return f'{CHECKSUMS} is not what was written', None
    except (ValueError, TypeError, KeyError):
        return f'{CHECKSUMS} is damaged', None
    return '', files


def _promised(checkpoint: Path) -> bool:
    try:
        metadata = json.loads((checkpoint / METADATA).read_text())
        return PROMISED.items() <= (metadata['custom_metadata'] or {}).items()
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return True         # damaged, or of another Orbax: not taken for one of before


def _compared(checkpoint: Path, name: str, written: list) -> tuple[bool, str]:
    """(whether it is damage, what is wrong with a file or '')."""
    try:
        with (checkpoint / name).open('rb') as file:
            size = os.fstat(file.fileno()).st_size
            if size != written[0]:
                return True, f'{name} has {size:,} bytes, not {written[0]:,}'
            if _hash(file) != written[1]:
                return True, f'{name} is not what was written'
    except OSError as error:
        if error.errno in GONE:
            return True, f'{name} is missing'
        return False, f'{name}: {error.strerror}'
    return True, ''


def _flushed(path: Path) -> list:
    """[size, hash] of a file, once the disk has it."""
    with path.open('rb') as file:
        os.fsync(file.fileno())
        return [os.fstat(file.fileno()).st_size, _hash(file)]


def _hash(file) -> str:
    return hashlib.file_digest(file, 'sha256').hexdigest()


def _of_list(files: dict[str, list]) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()

"""Files that people hand in: what is wrong with one is said in one line, with its name."""

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from etils import epath

from pkm_jax.data import encodings
from pkm_jax.refusal import Refusal

_POINTER = b'version https://git-lfs.github.com/spec/'
_HALF = re.compile(r'\\u[dD][89a-fA-F]')      # two of them are one character, in JSON
_REMEMBERED = 'content-hashes.json'


def expand(path: str | os.PathLike) -> str:
    """A path with `~` and `~NAME` as the shell would write them out.

    Raises:
      Refusal: it is an address of another kind than gs://.
    """
    address = re.match(r'(\w+)://', os.fspath(path))
    if address and address[1] != 'gs':
        raise Refusal(f'{path}: only files, folders and gs:// are read. Copy it here, or mount the '
                      'bucket and give its path.')
    return os.path.expanduser(os.fspath(path))


def refuse_broken_link(path: epath.PathLike) -> None:
    """Refuses a link to what is not there.

    Raises:
      Refusal: naming both.
    """
    path = os.fspath(path)
    if os.path.islink(path) and not os.path.exists(path):
        raise Refusal(f'{path} is a link to {os.readlink(path)}, which is not there: mend the '
                      'link, or leave it out')


def make_folder(folder: Path, field: str) -> None:
    """Makes the folder that a field of a configuration names, where it is not there yet.

    Raises:
      Refusal: a file is in its place, or it may not be made; names the field.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Refusal(f'{field} = {str(folder)!r} is no folder and cannot be made one '
                      f'({error.strerror}): name another place') from error


def refuse_pointer(path: epath.PathLike) -> None:
    """Refuses a file that git-lfs left in the place of the real one.

    Raises:
      Refusal: it is such a pointer, or cannot be read.
    """
    try:
        with epath.Path(path).open('rb') as file:
            head = file.read(len(_POINTER))
    except OSError as error:
        raise Refusal(f'{path} cannot be read: {error.strerror or error}.') from error
    if head == _POINTER:
        raise Refusal(f'{path} is a git-lfs pointer, not the file itself: run `git lfs pull` where '
                      'it was cloned, or download the file.')


def read_text(path: epath.PathLike) -> str:
    """The text of a UTF-8 file, local or gs://, without its byte order mark; lines end in '\\n'.

    Raises:
      Refusal: it cannot be read, is a git-lfs pointer, is not UTF-8, or holds zeros, as a file
        does that a crash cut short.
    """
    refuse_pointer(path)
    content = epath.Path(path).read_bytes()
    try:
        text = content.decode('utf-8-sig')
    except UnicodeDecodeError as error:
        line = content[:error.start].count(b'\n') + 1
        if error.reason == 'unexpected end of data':
            raise Refusal(f'{path} is cut short: it ends within a character. Fetch it '
                          'again.') from error
        raise Refusal(f'{path} is not UTF-8 (line {line}{encodings.guess_in_words(content)}): '
                      'save it as UTF-8, or fetch it again.') from error
    if '\0' in text:
        raise Refusal(f'{path} is damaged: it holds zeros. Fetch it again.')
    return text.replace('\r\n', '\n')


def read_json(path: epath.PathLike) -> dict[str, Any]:
    """The JSON object in a file, local or gs://.

    Raises:
      Refusal: as `read_text` does, or it is no JSON object.
    """
    text = read_text(path)
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Refusal(f'{path} is damaged or cut short: not a JSON object ({error}). Fetch it '
                      'again.') from error
    if not isinstance(found, dict):
        raise Refusal(f'{path} is not a JSON object but a {type(found).__name__}: fetch it again.')
    return found


def parse_json(text: str) -> Any:
    """What JSON says.

    Raises:
      ValueError: it is none, or a text in it holds half a character, which no tokenizer takes.
    """
    found = json.loads(text)
    if _HALF.search(text):
        json.dumps(found, ensure_ascii=False).encode()
    return found


class ContentHashes:
    """SHA-256 of files, which are read once: `folder` remembers them.

    A file is read again when its path, size, inode, or time of change of content or inode differ.
    """

    def __init__(self, folder: Path):
        self._path = folder / _REMEMBERED
        try:
            self._known = read_json(self._path)
        except Refusal:             # none yet, or damaged: only time is lost
            self._known = {}

    def of(self, path: epath.PathLike) -> str:
        """The hash of a file, in hexadecimal digits.

        Raises:
          Refusal: it cannot be read.
        """
        path = os.path.abspath(path)
        try:
            stat = os.stat(path)
            state = [stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns]
            known = self._known.get(path)
            if isinstance(known, list) and known[:-1] == state:
                return known[-1]
            with open(path, 'rb') as file:
                found = hashlib.file_digest(file, 'sha256').hexdigest()
        except OSError as error:
            raise Refusal(f'{path} cannot be read: {error.strerror}.') from error
        self._known[path] = [*state, found]
        return found

    def save(self) -> None:
        """Writes what is known now, for the next time; makes the folder."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self._path.with_suffix(f'.part-{os.getpid()}')
        unfinished.write_text(json.dumps(self._known, indent=0))
        unfinished.replace(self._path)

"""The content of an .xz file, read within bounds.

A file names the memory that reading it takes, up to 4 GiB, and Python's `lzma.open` believes it.
"""

import io
import lzma
from typing import Any

MOST_MEMORY = 2 ** 28       # bytes; what `xz -9` writes needs 65 MiB
_CHUNK = 2 ** 16


def open_xz(raw: io.BufferedIOBase) -> io.BufferedReader:
    """What the streams in an open file hold, one after the other.

    Reading raises:
      LZMAError: the file is damaged, or needs more than MOST_MEMORY. EOFError: it is cut short.
    """
    return io.BufferedReader(_Decoded(raw), _CHUNK)


class _Decoded(io.RawIOBase):
    def __init__(self, raw: io.BufferedIOBase):
        self._raw, self._stream = raw, _stream()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast('B')
        while True:
            if self._stream.eof:
                data = self._after_padding(self._stream.unused_data)
                if not data:
                    return 0
                self._stream = _stream()
            else:
                data = self._raw.read(_CHUNK) if self._stream.needs_input else b''
                if not data and self._stream.needs_input:
                    raise EOFError('it ends within a stream')
            content = self._stream.decompress(data, len(view))
            if content:
                view[:len(content)] = content
                return len(content)

    def _after_padding(self, data: bytes) -> bytes:
        """What begins the next stream: between two there may be zeros."""
        while not (data := data.lstrip(b'\0')):
            if not (data := self._raw.read(_CHUNK)):
                break
        return data


def _stream() -> lzma.LZMADecompressor:
    return lzma.LZMADecompressor(memlimit=MOST_MEMORY)

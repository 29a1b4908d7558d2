"""The content of .xz files, within bounds."""

import io
import lzma
import zlib

import pytest

from pkm_jax.data.xz import open_xz

CONTENT = b'text of an archive\n' * 9_000


def test_streams_and_the_zeros_between_them():
    archive = lzma.compress(CONTENT) + bytes(8) + lzma.compress(b'more') + bytes(4)
    assert open_xz(io.BytesIO(archive)).read() == CONTENT + b'more'


def test_what_asks_for_much_memory_is_refused():
    """4 GiB, as its header says, though it holds a few bytes."""
    filters = [{'id': lzma.FILTER_LZMA2, 'dict_size': 2 ** 26}]
    archive = lzma.compress(b'a', filters=filters)
    assert open_xz(io.BytesIO(archive)).read() == b'a'
    place = archive.index(b'\x21\x01') + 2
    assert archive[place] == 28
    header = bytearray(archive[12:24])
    header[place - 12] = 40                         # 4 GiB
    header[8:] = zlib.crc32(header[:8]).to_bytes(4, 'little')
    with pytest.raises(lzma.LZMAError, match='[Mm]emory'):
        open_xz(io.BytesIO(archive[:12] + header + archive[24:])).read()


@pytest.mark.parametrize('cut', [0, 20, -20, -1])
def test_what_is_cut_short_ends_in_an_error(cut):
    archive = lzma.compress(CONTENT)
    with pytest.raises(EOFError):
        open_xz(io.BytesIO(archive[:cut])).read()


def test_what_follows_a_stream_and_is_none_is_an_error():
    with pytest.raises(lzma.LZMAError):
        open_xz(io.BytesIO(lzma.compress(CONTENT) + b'something else')).read()

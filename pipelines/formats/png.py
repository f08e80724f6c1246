"""Writes PNG from rows of pixels, compressed on all cores.

The rows are cut into strips that are compressed independently and joined, as pigz does. So a picture need not be in
memory as a whole, and a large one takes all cores instead of one. Each value is stored as its difference to the mean of
those to the left and above (filter "average"), compressed by run lengths and Huffman codes: for enlarged photographs 6
to 10 % smaller than OpenCV's default, in the same time.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from pipelines.formats.strips import on_all_cores

Pixels = NDArray[np.uint8] | NDArray[np.uint16]

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_RGB, _AVERAGE = 2, 3
"""Codes of the colour type and of the filter."""
_STRIP_BYTES = 2**20
"""Uncompressed bytes per strip; a strip costs 9 bytes and the loss of the run that crosses its start."""
_ZLIB_HEADER, _LAST_BLOCK = b"\x78\x01", b"\x03\x00"
_ADLER = 65521


def encode(
    parts: Iterable[Pixels], width: int, height: int, bits: int, *, icc: bytes = b"", exif: bytes = b""
) -> Iterator[bytes]:
    """The pieces of a PNG file, in order, while `parts` arrive.

    Args:
        parts: RGB levels [rows, width, 3] from top to bottom, uint8 or uint16 by `bits`; `height` rows in all.
        icc: a colour profile.
        exif: a block as `tags.written` gives it.
    """
    yield _SIGNATURE + _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, _RGB, 0, 0, 0))
    if icc:
        yield _chunk(b"iCCP", b"ICC profile\0\0" + zlib.compress(icc))
    if exif:
        yield _chunk(b"eXIf", exif)
    yield _chunk(b"IDAT", _ZLIB_HEADER)
    checksum = 1
    for chunk, size, part_checksum in on_all_cores(_compress, _strips(parts, width * 3 * bits // 8)):
        checksum = _joined(checksum, part_checksum, size)
        yield chunk
    yield _chunk(b"IDAT", _LAST_BLOCK + struct.pack(">I", checksum)) + _chunk(b"IEND", b"")


def _strips(parts: Iterable[Pixels], row_bytes: int) -> Iterator[tuple[Pixels | None, Pixels]]:
    """(the row above, or None at the top, and the rows) of each strip."""
    above: Pixels | None = None
    step = max(1, _STRIP_BYTES // row_bytes)
    for part in parts:
        for first in range(0, len(part), step):
            yield (part[first - 1] if first else above), part[first : first + step]
        above = part[-1].copy()
        del part  # the next one needs memory


def _compress(strip: tuple[Pixels | None, Pixels]) -> tuple[bytes, int, int]:
    """(chunk, bytes before, their Adler-32) of a strip."""
    above, pixels = strip
    rows = _bytes(pixels)
    pixel_bytes = 3 * pixels.itemsize
    filtered = np.empty((rows.shape[0], rows.shape[1] + 1), np.uint8)
    filtered[:, 0] = _AVERAGE
    first = np.zeros_like(rows[:1]) if above is None else _bytes(above[None])
    _filter(filtered[:1, 1:], rows[:1], first, pixel_bytes)
    _filter(filtered[1:, 1:], rows[1:], rows[:-1], pixel_bytes)
    data = filtered.data
    stream = zlib.compressobj(1, zlib.DEFLATED, -zlib.MAX_WBITS, 9, zlib.Z_RLE)
    # A full flush ends on a byte's border, so that the next strip's stream can follow.
    compressed = stream.compress(data) + stream.flush(zlib.Z_FULL_FLUSH)
    return _chunk(b"IDAT", compressed), filtered.size, zlib.adler32(data)


def _bytes(pixels: Pixels) -> NDArray[np.uint8]:
    """[rows, bytes]: 16-bit values with the high byte first."""
    values = np.ascontiguousarray(pixels, pixels.dtype.newbyteorder(">"))
    return values.view(np.uint8).reshape(len(pixels), -1)


def _filter(out: NDArray[np.uint8], here: NDArray[np.uint8], above: NDArray[np.uint8], pixel_bytes: int) -> None:
    """Write the differences of the rows `here` to `out`; `above`: the row above each of them."""
    out[:, :pixel_bytes] = here[:, :pixel_bytes] - above[:, :pixel_bytes] // 2
    left, above = here[:, :-pixel_bytes], above[:, pixel_bytes:]
    mean = (left ^ above) >> 1
    mean += left & above  # (left + above) // 2 without an overflow
    np.subtract(here[:, pixel_bytes:], mean, out=out[:, pixel_bytes:])


def _joined(first: int, second: int, second_size: int) -> int:
    """The Adler-32 of two byte strings in sequence, from theirs."""
    low, high = first & 0xFFFF, first >> 16
    low_2, high_2 = second & 0xFFFF, second >> 16
    return (low + low_2 - 1) % _ADLER | (high + high_2 + second_size * (low - 1)) % _ADLER << 16


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(data, zlib.crc32(kind)))

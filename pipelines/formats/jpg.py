"""Writes JPG from rows of pixels, on all cores.

Pillow compresses strips on their own; each row of blocks ends with a restart marker, after which nothing depends on
what was before. So the strips' data, with the markers numbered anew, is the data of the whole picture.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterable, Iterator
from functools import partial

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipelines.formats.strips import on_all_cores, strips

MAX_SIDE = 65_500
_STRIP_ROWS = 128
"""A multiple of 8, the rows of a block without subsampling of colours."""
_START_OF_FRAME, _START_OF_SCAN = b"\xff\xc0", b"\xff\xda"


def encode(
    parts: Iterable[NDArray[np.uint8]],
    width: int,
    height: int,
    *,
    quality: int = 95,
    icc: bytes = b"",
    exif: bytes = b"",
) -> Iterator[bytes]:
    """The pieces of a JPG file, in order, while `parts` arrive.

    Args:
        parts: RGB levels uint8 [rows, width, 3] from top to bottom; `height` rows in all.
        quality: 1 to 100; colours are not subsampled.
    """
    blocks = 0
    compress = partial(_compressed, quality=quality, icc=icc, exif=exif)
    for data in on_all_cores(compress, strips(parts, _STRIP_ROWS)):
        scan = _scan_start(data)
        if not blocks:
            yield _with_height(data[:scan], height)
        elif data[scan:-2]:
            yield _restart(blocks - 1)
        numbered, blocks = _renumbered(data[scan:-2], blocks)
        yield numbered
    yield b"\xff\xd9"


def _compressed(strip: NDArray[np.uint8], quality: int, icc: bytes, exif: bytes) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(strip)).save(
        out,
        "JPEG",
        quality=quality,
        subsampling=0,
        restart_marker_rows=1,
        icc_profile=icc or None,
        exif=b"Exif\x00\x00" + exif if exif else b"",
    )
    return out.getvalue()


def _segments(data: bytes) -> Iterator[tuple[int, bytes, int]]:
    """(place, marker, length) of each segment before the compressed data."""
    at = 2
    while True:
        marker, length = data[at : at + 2], int.from_bytes(data[at + 2 : at + 4], "big")
        yield at, marker, length
        if marker == _START_OF_SCAN:
            return
        at += 2 + length


def _scan_start(data: bytes) -> int:
    at, _, length = list(_segments(data))[-1]
    return at + 2 + length


def _with_height(head: bytes, height: int) -> bytes:
    at = next(at for at, marker, _ in _segments(head) if marker == _START_OF_FRAME)
    return head[: at + 5] + struct.pack(">H", height) + head[at + 7 :]


def _restart(number: int) -> bytes:
    return bytes((0xFF, 0xD0 + number % 8))


def _renumbered(scan: bytes, first: int) -> tuple[bytes, int]:
    """The data with restart markers counted from `first`, and the number of rows of blocks by its end."""
    values = np.frombuffer(scan, np.uint8).copy()
    # In compressed data 0xFF is followed by 0, unless it starts a marker.
    places = np.flatnonzero((values[:-1] == 0xFF) & (values[1:] >= 0xD0) & (values[1:] <= 0xD7)) + 1
    values[places] = 0xD0 + (first + np.arange(len(places))) % 8
    return values.tobytes(), first + len(places) + 1

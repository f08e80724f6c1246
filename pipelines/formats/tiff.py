"""Writes tiled TIFF from rows of pixels, compressed on all cores; BigTIFF past 4 GB.

No library that we use can write a TIFF whose pixels are not in memory at once. Tiles are compressed as zlib streams
after horizontal differences (compression 8, predictor 2), which every TIFF reader knows.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from pipelines.formats.strips import on_all_cores, strips

Pixels = NDArray[Any]
"""uint8 or uint16."""

TILE_PX = 256
BIG_BYTES = 4_000_000_000
"""Files that may become larger than this have 8-byte addresses."""
_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 16: 8}
"""TIFF's types: bytes per value."""
BYTE, ASCII, SHORT, LONG, RATIONAL, SIGNED_RATIONAL = 1, 2, 3, 4, 5, 10
_UNDEFINED, _LONG_8 = 7, 16
_LETTERS = {BYTE: "B", ASCII: "B", SHORT: "H", LONG: "I", RATIONAL: "I", SIGNED_RATIONAL: "i", _LONG_8: "Q"}
_PAIRS = (RATIONAL, SIGNED_RATIONAL)
_DIRECTORIES = (0x8769, 0x8825)
"""Tags that hold the address of a directory: EXIF and GPS."""


@dataclass(frozen=True)
class Entry:
    """A tag's value: its type, the number of values, and their bytes, the low byte first."""

    kind: int
    count: int
    data: bytes


Directory = dict[int, "Entry | Directory"]
"""Tag -> value, or the directory whose address is the value."""


def write(
    file: BinaryIO, parts: Iterable[Pixels], width: int, height: int, bits: int, *, icc: bytes = b"", exif: bytes = b""
) -> None:
    """Write a TIFF to a file that can seek, while `parts` arrive.

    Args:
        parts: RGB levels [rows, width, 3] from top to bottom, uint8 or uint16 by `bits`; `height` rows in all.
        exif: a block as `tags.written` gives it.
    """
    big = width * height * 3 * (bits // 8) * 1.05 > BIG_BYTES
    file.write(struct.pack("<2sHHHQ", b"II", 43, 8, 0, 0) if big else struct.pack("<2sHI", b"II", 42, 0))
    offsets, sizes = [], []
    at = file.tell()
    for data in on_all_cores(_compress, _tiles(parts)):
        file.write(data)
        offsets.append(at)
        sizes.append(len(data))
        at += len(data)
    address = _LONG_8 if big else LONG
    directory = parsed(exif) if exif else {}
    values: dict[int, tuple[int, list[int]]] = {
        256: (LONG, [width]),
        257: (LONG, [height]),
        258: (SHORT, [bits] * 3),
        259: (SHORT, [8]),
        262: (SHORT, [2]),
        277: (SHORT, [3]),
        284: (SHORT, [1]),
        317: (SHORT, [2]),
        322: (SHORT, [TILE_PX]),
        323: (SHORT, [TILE_PX]),
        324: (address, offsets),
        325: (address, sizes),
    }
    directory |= {tag: entry(kind, numbers) for tag, (kind, numbers) in values.items()}
    if icc:
        directory[34675] = Entry(_UNDEFINED, len(icc), icc)
    file.write(bytes(at % 2))
    first, block = serialised(directory, at + at % 2, big)
    file.write(block)
    file.seek(8 if big else 4)
    file.write(struct.pack("<Q" if big else "<I", first))


def _tiles(parts: Iterable[Pixels]) -> Iterator[Pixels]:
    """The rows, cut into tiles; the last ones are padded with copies of the last row and column."""
    for strip in strips(parts, TILE_PX):
        for left in range(0, strip.shape[1], TILE_PX):
            tile = strip[:, left : left + TILE_PX]
            missing = [TILE_PX - side for side in tile.shape[:2]]
            yield np.pad(tile, ((0, missing[0]), (0, missing[1]), (0, 0)), mode="edge") if any(missing) else tile
        del strip, tile


def _compress(tile: Pixels) -> bytes:
    differences = tile.copy()
    differences[:, 1:] -= tile[:, :-1]
    little = np.ascontiguousarray(differences, differences.dtype.newbyteorder("<"))
    return zlib.compress(little.tobytes(), 3)


def entry(kind: int, numbers: Sequence[int]) -> Entry:
    """A value of one of TIFF's types; of rationals `numbers` are numerator, denominator, numerator, ..."""
    count = len(numbers) // 2 if kind in _PAIRS else len(numbers)
    return Entry(kind, count, struct.pack(f"<{len(numbers)}{_LETTERS[kind]}", *numbers))


def parsed(block: bytes) -> Directory:
    """The directories of an EXIF block, which Pillow writes with the low byte first or last."""
    order = "<" if block[:2] == b"II" else ">"

    def directory(at: int) -> Directory:
        found: Directory = {}
        (count,) = struct.unpack_from(f"{order}H", block, at)
        for place in range(at + 2, at + 2 + 12 * count, 12):
            tag, kind, number = struct.unpack_from(f"{order}HHI", block, place)
            size = _SIZES[kind] * number
            (pointer,) = struct.unpack_from(f"{order}I", block, place + 8)
            if tag in _DIRECTORIES:
                found[tag] = directory(pointer)
                continue
            data = block[place + 8 : place + 8 + size] if size <= 4 else block[pointer : pointer + size]
            found[tag] = Entry(kind, number, _little(data, kind) if order == ">" else data)
        return found

    (first,) = struct.unpack_from(f"{order}I", block, 4)
    return directory(first)


def _little(data: bytes, kind: int) -> bytes:
    """Values with the low byte first."""
    size = 4 if kind in _PAIRS else _SIZES[kind]
    return np.frombuffer(data, np.uint8).reshape(-1, size)[:, ::-1].tobytes()


def serialised(directory: Directory, start: int, big: bool) -> tuple[int, bytes]:
    """(address of the directory, bytes from the even address `start` on: values, then the directory)."""
    inline, head, pointer = (8, "<HHQ", "<Q") if big else (4, "<HHI", "<I")
    blob, entries = b"", b""
    for tag in sorted(directory):
        item = directory[tag]
        if isinstance(item, dict):
            address, block = serialised(item, start + len(blob), big)
            blob += block
            item = entry(_LONG_8 if big else LONG, [address])
        if len(item.data) <= inline:
            value = item.data.ljust(inline, b"\0")
        else:
            value = struct.pack(pointer, start + len(blob))
            blob += item.data + bytes(len(item.data) % 2)
        entries += struct.pack(head, tag, item.kind, item.count) + value
    count = struct.pack("<Q" if big else "<H", len(directory))
    return start + len(blob), blob + count + entries + bytes(inline)

"""Writes little-endian TIFF files: directories of tagged values, and the data that does not fit into their entries."""

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np
import numpy.typing as npt

BYTE, ASCII, SHORT, LONG, RATIONAL, UNDEFINED, SSHORT, SRATIONAL = 1, 2, 3, 4, 5, 7, 8, 10
_PACK = {BYTE: "B", SHORT: "H", LONG: "I", SSHORT: "h"}


@dataclass
class Ifd:
    """One image file directory."""

    entries: dict[int, tuple[int, Sequence[int] | bytes]] = field(default_factory=dict)
    """Tag -> (type, value)."""
    blobs: dict[int, bytes] = field(default_factory=dict)
    """Tag -> data whose place in the file becomes the tag's value."""
    children: dict[int, "Ifd"] = field(default_factory=dict)
    """Tag -> directory whose place in the file becomes the tag's value."""

    def set(self, tag: int, kind: int, *values: int) -> None:
        self.entries[tag] = (kind, values)

    def text(self, tag: int, value: str) -> None:
        self.entries[tag] = (ASCII, value.encode("ascii", "replace") + b"\0")

    def rational(self, tag: int, *values: float, signed: bool = False) -> None:
        pairs: list[int] = []
        for value in values:
            fraction = Fraction(value).limit_denominator(1_000_000)
            pairs += [fraction.numerator, fraction.denominator]
        self.entries[tag] = (SRATIONAL if signed else RATIONAL, pairs)

    def signed_rationals(self, tag: int, matrix: npt.NDArray[np.float64]) -> None:
        """The matrix row by row, rounded to 2**-30."""
        parts = [part for value in matrix.ravel() for part in (round(float(value) * (1 << 30)), 1 << 30)]
        self.entries[tag] = (SRATIONAL, parts)

    def raw(self, tag: int, kind: int, value: bytes) -> None:
        self.entries[tag] = (kind, value)


def serialise(root: Ifd) -> bytes:
    """A little-endian TIFF file: all directories, then their data. Children and blobs become offsets (LONG)."""
    directories: list[Ifd] = []

    def collect(ifd: Ifd) -> None:
        directories.append(ifd)
        for child in ifd.children.values():
            collect(child)

    collect(root)
    position = 8
    starts: dict[int, int] = {}
    for ifd in directories:
        starts[id(ifd)] = position
        # Each blob and child is one entry.
        position += 2 + 12 * (len(ifd.entries) + len(ifd.blobs) + len(ifd.children)) + 4
    head = bytearray(struct.pack("<2sHI", b"II", 42, 8))
    tail = bytearray()
    placed: dict[int, int] = {}
    for ifd in directories:
        table: dict[int, tuple[int, Sequence[int] | bytes]] = dict(ifd.entries)
        for tag, blob in ifd.blobs.items():
            if id(blob) not in placed:  # a blob named by two tags is stored once
                placed[id(blob)] = position + len(tail)
                tail += blob + b"\0" * (-len(blob) % 4)
            table[tag] = (LONG, (placed[id(blob)],))
        for tag, child in ifd.children.items():
            table[tag] = (LONG, (starts[id(child)],))
        head += struct.pack("<H", len(table))
        for tag in sorted(table):
            kind, value = table[tag]
            count, data = _encode(kind, value)
            if len(data) > 4:
                offset = position + len(tail)
                tail += data + b"\0" * (-len(data) % 4)
                data = struct.pack("<I", offset)
            head += struct.pack("<HHI", tag, kind, count) + data.ljust(4, b"\0")
        head += struct.pack("<I", 0)
    return bytes(head + tail)


def _encode(kind: int, value: Sequence[int] | bytes) -> tuple[int, bytes]:
    """An entry's count and its bytes."""
    if isinstance(value, bytes):
        return len(value), value
    if kind in (RATIONAL, SRATIONAL):
        return len(value) // 2, struct.pack(f"<{len(value)}{'i' if kind == SRATIONAL else 'I'}", *value)
    return len(value), struct.pack(f"<{len(value)}{_PACK[kind]}", *value)

"""Black levels that a DNG states as a larger pattern than 2x2, which LibRaw's Python interface cannot give."""

import contextlib
import warnings
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from preprocessing.raw.exif import PROCESS_LOCK

_SUB_IFDS, _PHOTOMETRIC, _WIDTH = 330, 262, 256
_CFA = 32803
_BLACK_LEVEL_REPEAT, _BLACK_LEVEL = 50713, 50714
_MAX_DIRECTORIES = 64
_TOLERANCE = 1.0
"""Counts by which the levels of one colour may differ and still count as one."""


def black_pattern(file: BinaryIO) -> NDArray[np.float64] | None:
    """[rows, cols] black levels as BlackLevelRepeatDim arranges them, from the visible area's top left.

    None if the file is no TIFF, or if its mosaic's directory has no such tags, or damaged ones. Raises ValueError if
    the number of levels is not that of a pattern larger than 2x2: LibRaw would take 0.
    """
    levels, rows, cols = np.empty(0), 0, 0
    # Damaged tags make Pillow warn and raise many kinds of errors.
    with PROCESS_LOCK, warnings.catch_warnings(), contextlib.suppress(Exception):
        warnings.simplefilter("ignore")
        found = max(_mosaics(file), key=lambda ifd: ifd[_WIDTH], default=None)
        if found is None or _BLACK_LEVEL_REPEAT not in found or _BLACK_LEVEL not in found:
            return None
        levels = np.atleast_1d(np.array(found[_BLACK_LEVEL], np.float64))
        rows, cols = (int(value) for value in found[_BLACK_LEVEL_REPEAT])
    if levels.size and levels.size == rows * cols:
        return levels.reshape(rows, cols)
    if rows * cols > 4:
        raise ValueError(f"expected {rows * cols} black levels for its {rows}x{cols} pattern, got {levels.size}")
    return None


def by_place(pattern: NDArray[np.float64]) -> NDArray[np.float64] | None:
    """[2, 2] levels of the 2x2 cell's places, if the pattern has one level for each; else None."""
    whole = np.tile(pattern, (2, 2))  # odd sides, too, end on a whole cell
    places = [whole[row::2, col::2] for row, col in ((0, 0), (0, 1), (1, 0), (1, 1))]
    levels = [(place.min() + place.max()) / 2 for place in places]
    if any(np.abs(place - level).max() > _TOLERANCE / 2 for place, level in zip(places, levels, strict=True)):
        return None
    return np.array(levels).reshape(2, 2)


def _mosaics(file: BinaryIO) -> list[ImageFileDirectory_v2]:
    """The directories that describe a colour filter mosaic."""
    file.seek(0)
    header = file.read(8)
    if header[:4] not in (b"II*\x00", b"MM\x00*"):
        return []
    first = ImageFileDirectory_v2(header)
    waiting, found = [first.next], []
    seen: set[int] = set()
    while waiting and len(seen) < _MAX_DIRECTORIES:
        offset = waiting.pop()
        if not offset or offset in seen:
            continue
        seen.add(offset)
        ifd = ImageFileDirectory_v2(header)
        file.seek(offset)
        ifd.load(file)
        if ifd.get(_PHOTOMETRIC) == _CFA:
            found.append(ifd)
        children = ifd.get(_SUB_IFDS, ())
        waiting += [ifd.next, *(children if isinstance(children, tuple) else (children,))]
    return found

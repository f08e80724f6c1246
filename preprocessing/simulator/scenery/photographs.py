"""Photographs as a scene: an exhibition wall with prints that are never enlarged beyond their resolution.

One photograph stretched over the field of view of a 24 mm frame would be ten times too coarse for the 240 mm frame. So
a print that would be enlarged (at the density of the finest canvas it overlaps) is replaced by 3 x 3 smaller ones.
Prints are large at the edges, which only short focal lengths see, and small in the centre. Thus every focal length sees
real detail of the photographs.
"""

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from preprocessing.simulator.scenery.canvas import FINEST_DENSITY, Box
from preprocessing.simulator.scenery.drawing import Drawing
from preprocessing.simulator.scenery.painter import Painter

SUFFIXES = {".jpg", ".jpeg", ".png"}
MIN_PRINT = 300.0
"""Smallest width of a print, scene units at 1536 px."""
MAX_SIDE_PX = 6000
"""Larger photographs are reduced to this side when they are loaded."""


def find_photographs(folder: Path) -> tuple[list[Path], int]:
    """The readable photographs below a folder, sorted by name, and how many could not be read."""
    readable, unreadable = [], 0
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() not in SUFFIXES or not path.is_file():
            continue
        try:
            with Image.open(path) as image:
                image.draft("RGB", (64, 64))
                image.load()
            readable.append(path)
        except (OSError, UnidentifiedImageError, Image.DecompressionBombError, SyntaxError):
            unreadable += 1
    return readable, unreadable


def fingerprint(path: Path) -> str:
    """16 hex digits of the file's SHA-256, stored with a sequence to identify its photographs."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


@lru_cache(maxsize=3)
def _load(path: Path) -> npt.NDArray[np.uint8]:
    with Image.open(path) as image:
        image.draft("RGB", (MAX_SIDE_PX, MAX_SIDE_PX))
        upright = ImageOps.exif_transpose(image)
        upright.thumbnail((MAX_SIDE_PX, MAX_SIDE_PX))
        return np.asarray(upright.convert("RGB"))


def draw_gallery(drawing: Drawing, boxes: Sequence[Box], photos: Sequence[Path], first: int, unit: float) -> None:
    """Draw the wall with its prints.

    boxes   area of each canvas, finest first
    first   number of the photograph in the middle
    """
    outer = boxes[-1]
    drawing.add(outer, Painter.material, outer, "plaster", (0.86, 0.85, 0.82))
    order = [photos[(first + number) % len(photos)] for number in range(len(photos))]
    sizes = {path: _size(path) for path in set(order[:24])}
    cells: list[Box] = []
    _divide(outer, boxes, max(width for width, _ in sizes.values()), unit, cells)
    # Sorted from the middle outwards, so that the middle print shows photograph `first`.
    cells.sort(key=lambda cell: abs(cell[0] + cell[2]) + abs(cell[1] + cell[3]))
    for number, cell in enumerate(cells):
        _hang(drawing, cell, order[number % min(len(order), 24)])


def _size(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


def _divide(cell: Box, boxes: Sequence[Box], photo_width: int, unit: float, cells: list[Box]) -> None:
    left, top, right, bottom = cell
    width, height = right - left, bottom - top
    level = next(
        (n for n, box in enumerate(boxes) if left < box[2] and right > box[0] and top < box[3] and bottom > box[1]),
        len(boxes) - 1,
    )
    if width * FINEST_DENSITY / 2**level <= photo_width or width / 3 < MIN_PRINT * unit:
        cells.append(cell)
        return
    for row in range(3):
        for column in range(3):
            x, y = left + column * width / 3, top + row * height / 3
            _divide((x, y, x + width / 3, y + height / 3), boxes, photo_width, unit, cells)


def _hang(drawing: Drawing, cell: Box, path: Path) -> None:
    left, top, right, bottom = cell
    gap = 0.018 * (right - left)
    frame = (left + gap, top + gap, right - gap, bottom - gap)
    rim = 0.012 * (right - left)
    inner = (frame[0] + rim, frame[1] + rim, frame[2] - rim, frame[3] - rim)
    cast = (frame[0] + gap / 3, frame[1] + gap / 2, frame[2] + gap / 3, frame[3] + gap / 2)
    drawing.add(cell, Painter.shadow, cast, gap / 2, 0.5)
    drawing.add(frame, Painter.material, frame, "wood", (0.5, 0.46, 0.42))
    drawing.add(inner, _print, inner, path)


def _print(painter: Painter, box: Box, path: Path) -> None:
    picture = _load(path)
    height, width = picture.shape[:2]
    aspect = (box[2] - box[0]) / (box[3] - box[1])
    if width > aspect * height:
        cut = round((width - aspect * height) / 2)
        picture = picture[:, cut : width - cut]
    else:
        cut = round((height - width / aspect) / 2)
        picture = picture[cut : height - cut]
    painter.picture(box, np.ascontiguousarray(picture))

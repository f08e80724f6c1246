"""What a DNG states about its camera's colours, for a DNG that is made from it."""

import contextlib
import math
import warnings
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from PIL.TiffImagePlugin import ImageFileDirectory_v2

from preprocessing.raw.dng import Tag
from preprocessing.raw.exif import PROCESS_LOCK

_MATRICES = (
    *(Tag.COLOR_MATRIX_1, Tag.COLOR_MATRIX_2, Tag.CAMERA_CALIBRATION_1, Tag.CAMERA_CALIBRATION_2),
    *(Tag.FORWARD_MATRIX_1, Tag.FORWARD_MATRIX_2),
)
_ILLUMINANTS = (Tag.CALIBRATION_ILLUMINANT_1, Tag.CALIBRATION_ILLUMINANT_2)
_MAX_NAME = 127
_LAST_ILLUMINANT = 24
"""Of EXIF's LightSource; 255 ("other") needs tags that are not copied."""


@dataclass(frozen=True)
class DngColour:
    """The colour tags of a DNG's first directory that hold for any picture from this camera."""

    numbers: dict[int, tuple[float, ...]] = field(default_factory=dict)
    """Matrices (9 values, row by row), AnalogBalance (3), BaselineExposure (1)."""
    illuminants: dict[int, int] = field(default_factory=dict)
    """CalibrationIlluminant1 and 2, as EXIF's LightSource numbers them."""
    camera: str = ""
    """UniqueCameraModel."""


def dng_colour(file: BinaryIO) -> DngColour:
    """Read them. Empty for a file that is no DNG, that has damaged tags, or whose camera is not described by three
    colours under one or two known lights."""
    # Damaged tags make Pillow warn and raise many kinds of errors.
    with PROCESS_LOCK, warnings.catch_warnings(), contextlib.suppress(Exception):
        warnings.simplefilter("ignore")
        file.seek(0)
        header = file.read(8)
        if header[:4] not in (b"II*\x00", b"MM\x00*"):
            return DngColour()
        ifd = ImageFileDirectory_v2(header)
        file.seek(ifd.next)
        ifd.load(file)
        return _checked(ifd)
    return DngColour()


def _checked(ifd: ImageFileDirectory_v2) -> DngColour:
    numbers = {int(tag): _floats(ifd, tag, 9) for tag in _MATRICES if tag in ifd}
    illuminants = {int(tag): int(ifd[tag]) for tag in _ILLUMINANTS if tag in ifd}
    usable = Tag.DNG_VERSION in ifd and Tag.COLOR_MATRIX_1 in numbers
    if not usable or any(not 0 <= light <= _LAST_ILLUMINANT for light in illuminants.values()):
        return DngColour()
    for tag, count in ((Tag.ANALOG_BALANCE, 3), (Tag.BASELINE_EXPOSURE, 1)):
        if tag in ifd:
            numbers[int(tag)] = _floats(ifd, tag, count)
    return DngColour(numbers, illuminants, str(ifd.get(Tag.UNIQUE_CAMERA_MODEL, ""))[:_MAX_NAME].strip("\0 "))


def _floats(ifd: ImageFileDirectory_v2, tag: int, count: int) -> tuple[float, ...]:
    """Raises ValueError for another number of values, or one that is not finite."""
    found: Any = ifd[tag]
    values = tuple(float(value) for value in (found if isinstance(found, tuple) else (found,)))
    if len(values) != count or not all(map(math.isfinite, values)):
        raise ValueError(f"tag {tag}: expected {count} numbers, got {values}")
    return values

"""The tags and the colour profile of written photographs: EXIF of the source that still holds, and sRGB's profile."""

from __future__ import annotations

import contextlib
import io
import struct
import warnings
from collections.abc import Mapping
from fractions import Fraction
from functools import lru_cache
from typing import Any

from PIL import Image, ImageCms
from PIL.TiffImagePlugin import IFDRational

_EXIF_HEADER = b"Exif\x00\x00"
_EXIF_IFD, _GPS_IFD = 0x8769, 0x8825
_ROOT_TAGS = (0x010E, 0x010F, 0x0110, 0x0132, 0x013B, 0x8298)
"""Description, make, model, date, artist, copyright."""
_EXIF_TAGS = (
    *(0x829A, 0x829D, 0x8822, 0x8827, 0x8830, 0x8831, 0x8832),  # exposure, aperture, program, sensitivity
    *(0x9003, 0x9004, 0x9010, 0x9011, 0x9012, 0x9290, 0x9291, 0x9292),  # dates and time zones
    *(0x9201, 0x9202, 0x9203, 0x9204, 0x9205, 0x9206, 0x9207, 0x9208, 0x9209, 0x920A),  # exposure, light, focal length
    *(0xA402, 0xA403, 0xA406, 0xA432, 0xA433, 0xA434),  # exposure mode, white balance, lens
)
"""Tags of the EXIF directory that are true of the enlarged photograph, too. Maker notes are not: they hold addresses
within the source."""
_DIGITAL_ZOOM, _FOCAL_35MM, _MAX_SHORT = 0xA404, 0xA405, 65_535
_PROFILE_DATE = slice(24, 36)
"""Place of the creation date in an ICC profile: six 16-bit numbers, year to second."""
_MAX_BYTES = 60_000
"""A JPG's segment holds 65,533 bytes."""


def read(head: bytes) -> Image.Exif:
    """The tags in a picture, or in the first bytes of a TIFF-like RAW; empty if there are none or they are damaged."""
    found = Image.Exif()
    with warnings.catch_warnings(), contextlib.suppress(Exception):
        warnings.simplefilter("ignore")
        if head[:4] in (b"II*\x00", b"MM\x00*"):
            found.load(_EXIF_HEADER + head)
        else:
            with Image.open(io.BytesIO(head)) as picture:
                found = picture.getexif()
        for part in (_EXIF_IFD, _GPS_IFD):  # read now, while warnings are off: the head may end within it
            found.get_ifd(part)
    return found


def written(
    source: Image.Exif, width: int, height: int, *, gps: bool = True, scale: int = 1, crop_factor: float = 1.0
) -> bytes:
    """An EXIF block (a small TIFF file, no header before it) for an upright sRGB picture of this size.

    Args:
        gps: whether to keep the place.
        scale: how many times the source's pixels were enlarged, a side.
        crop_factor: the source's diagonal in units of that of the part that was enlarged.
    """
    tags = Image.Exif()
    shot = tags.get_ifd(_EXIF_IFD)
    with contextlib.suppress(Exception):
        more = source.get_ifd(_EXIF_IFD)
        # Some RAW files have the exposure in the first directory.
        shot.update({tag: more.get(tag, source.get(tag)) for tag in _EXIF_TAGS if tag in more or tag in source})
        tags.update({tag: source[tag] for tag in _ROOT_TAGS if tag in source})
        if gps and (place := source.get_ifd(_GPS_IFD)):
            tags.get_ifd(_GPS_IFD).update(place)
        shot |= _zoom_tags(more, scale, crop_factor)
    with contextlib.suppress(Exception):
        block = _block(tags, width, height)
        if len(block) <= _MAX_BYTES:
            return block
    return _block(Image.Exif(), width, height)


def _zoom_tags(source: Mapping[int, Any], scale: int, crop_factor: float) -> dict[int, Any]:
    """DigitalZoomRatio, and FocalLengthIn35mmFilm if the source has it, after the zoom."""
    found: dict[int, Any] = {}
    before = float(source.get(_DIGITAL_ZOOM) or 0)  # 0: no digital zoom
    if scale != 1 or before > 0:
        found[_DIGITAL_ZOOM] = scale * (before if before > 0 else 1.0)
    focal = round(float(source.get(_FOCAL_35MM) or 0) * crop_factor)
    return found | ({_FOCAL_35MM: focal} if 0 < focal <= _MAX_SHORT else {})


def _block(tags: Image.Exif, width: int, height: int) -> bytes:
    tags[0x0112] = 1
    tags[0x0131] = "SDAN"
    shot = tags.get_ifd(_EXIF_IFD)
    shot.update({0x9000: b"0232", 0xA001: 1, 0xA002: width, 0xA003: height})
    # Pillow writes floats as doubles, which EXIF does not have.
    shot.update({tag: _rational(value) for tag, value in shot.items() if isinstance(value, float)})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return tags.tobytes().removeprefix(_EXIF_HEADER)


def _rational(value: float) -> IFDRational:
    fraction = Fraction(value).limit_denominator(1_000_000)
    return IFDRational(fraction.numerator, fraction.denominator)


@lru_cache(maxsize=1)
def srgb_profile() -> bytes:
    """An ICC profile of sRGB. It is dated 1 January 2000, so that the same photograph always gives the same file."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    profile[_PROFILE_DATE] = struct.pack(">6H", 2000, 1, 1, 0, 0, 0)
    return bytes(profile)

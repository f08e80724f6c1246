"""Reads a photograph's EXIF tags: camera, focal length, exposure, orientation.

The tags of a JPG or a TIFF-like RAW are in the file's first bytes, so one short read per frame is enough.
"""

import contextlib
import io
import logging
import math
import threading
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from typing import Any

import exifread
from PIL import Image

_EXIF_IFD, _INTEROP_IFD = 0x8769, 0xA005
PROCESS_LOCK = threading.Lock()
"""Held while warnings are caught or Pillow's settings changed: both are the whole process's, and several threads read
frames."""
_EXIF_HEADER = b"Exif\x00\x00"
_FRAME_HEADERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
"""The JPEG markers SOF0 to SOF15, except three numbers in that range that do not start a frame."""


@dataclass(frozen=True)
class Exif:
    """Tags of one picture. None: the tag is missing, or its value is not a positive number."""

    camera: str | None = None
    """Make and model, e.g. "SONY ILCE-7SM2"."""
    focal_mm: float | None = None
    focal_35mm: float | None = None
    """FocalLengthIn35mmFilm: the focal length that gives the same field of view on 35 mm film."""
    lens: str | None = None
    """LensModel."""
    iso: float | None = None
    exposure_s: float | None = None
    f_number: float | None = None
    orientation: int | None = None
    """EXIF orientation 1-8: how a viewer turns the stored picture."""
    colour_space: int | None = None
    """ColorSpace: 1 sRGB, 2 or 65535 (uncalibrated) another, as a rule Adobe RGB."""
    interoperability: str | None = None
    """InteroperabilityIndex: R98 sRGB, R03 Adobe RGB."""
    size: tuple[int, int] | None = None
    """(height, width) of a JPG, PNG or TIFF as stored."""


def read_exif(data: bytes) -> Exif:
    """The tags in `data`, the first bytes of a JPG or RAW file (64 KB are enough for nearly all files).

    Never raises: damaged tags count as missing, because the picture itself can still be good.
    """
    header = _jpg_exif(data) if data[:2] == b"\xff\xd8" else data
    found = Exif()
    if header[:4] in (b"II*\x00", b"MM\x00*"):
        # Damaged tags make Pillow raise many kinds of errors, and tags beyond `data` make it warn.
        with PROCESS_LOCK, warnings.catch_warnings(), contextlib.suppress(Exception):
            warnings.simplefilter("ignore")
            found = _by_pillow(header)
    if found.focal_mm is None and header:
        with contextlib.suppress(Exception):
            known = {name: value for name, value in asdict(found).items() if value is not None}
            found = replace(_by_exifread(data), **known)
    return replace(found, size=_jpg_size(data)) if data[:2] == b"\xff\xd8" else found


def _jpg_exif(data: bytes) -> bytes:
    """The TIFF block inside a JPG's Exif segment, or b""."""
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] != 0xDA:
        length = int.from_bytes(data[at + 2 : at + 4], "big")
        if data[at + 1] == 0xE1 and data[at + 4 : at + 10] == _EXIF_HEADER:
            return data[at + 10 : at + 2 + length]
        at += 2 + max(length, 2)
    return b""


def _jpg_size(data: bytes) -> tuple[int, int] | None:
    """(height, width) from the frame header; None if `data` ends before it."""
    at = 2
    while at + 9 <= len(data) and data[at] == 0xFF and data[at + 1] != 0xDA:
        if data[at + 1] in _FRAME_HEADERS:
            return int.from_bytes(data[at + 5 : at + 7], "big"), int.from_bytes(data[at + 7 : at + 9], "big")
        at += 2 + max(int.from_bytes(data[at + 2 : at + 4], "big"), 2)
    return None


def _by_pillow(tiff: bytes) -> Exif:
    tags = Image.Exif()
    tags.load(_EXIF_HEADER + tiff)
    more = tags.get_ifd(_EXIF_IFD)
    return _exif(
        {
            "make": tags.get(0x010F),
            "model": tags.get(0x0110),
            "orientation": tags.get(0x0112),
            "focal": more.get(0x920A, tags.get(0x920A)),
            "focal_35mm": more.get(0xA405, tags.get(0xA405)),
            "lens": more.get(0xA434),
            "iso": more.get(0x8827, tags.get(0x8827)),
            "exposure": more.get(0x829A, tags.get(0x829A)),
            "f_number": more.get(0x829D, tags.get(0x829D)),
            "colour_space": more.get(0xA001),
            "interoperability": tags.get_ifd(_INTEROP_IFD).get(1),
        }
    )


def _by_exifread(data: bytes) -> Exif:
    logging.getLogger("exifread").setLevel(logging.CRITICAL)  # it logs damaged tags, which our reports list per frame
    tags = exifread.process_file(io.BytesIO(data), details=False)

    def value(name: str) -> Any:
        return tags[name].values if name in tags else None

    return _exif(
        {
            "make": value("Image Make"),
            "model": value("Image Model"),
            "orientation": value("Image Orientation"),
            "focal": value("EXIF FocalLength"),
            "focal_35mm": value("EXIF FocalLengthIn35mmFilm"),
            "lens": value("EXIF LensModel"),
            "iso": value("EXIF ISOSpeedRatings"),
            "exposure": value("EXIF ExposureTime"),
            "f_number": value("EXIF FNumber"),
            "colour_space": value("EXIF ColorSpace"),
            "interoperability": value("Interoperability InteroperabilityIndex"),
        }
    )


def _exif(tags: Mapping[str, Any]) -> Exif:
    orientation, colour_space = _positive(tags["orientation"]), _positive(tags["colour_space"])
    return Exif(
        camera=camera_name(tags["make"], tags["model"]),
        focal_mm=_positive(tags["focal"]),
        focal_35mm=_positive(tags["focal_35mm"]),
        lens=_text(tags["lens"]),
        iso=_positive(tags["iso"]),
        exposure_s=_positive(tags["exposure"]),
        f_number=_positive(tags["f_number"]),
        orientation=int(orientation) if orientation is not None and orientation in range(1, 9) else None,
        colour_space=int(colour_space) if colour_space is not None else None,
        interoperability=_text(tags["interoperability"]),
    )


def camera_name(make: Any, model: Any) -> str | None:
    """ "SONY", "ILCE-7SM2" -> "SONY ILCE-7SM2"; a model that starts with the make does not repeat it."""
    maker, kind = (_text(text) or "" for text in (make, model))
    if kind.lower().startswith(maker.lower()):
        return kind or None
    return f"{maker} {kind}".strip() or None


def _text(value: Any) -> str | None:
    text = value.decode("latin-1") if isinstance(value, bytes) else str(value or "")
    return text.replace("\x00", " ").strip() or None


def _positive(value: Any) -> float | None:
    if isinstance(value, list | tuple):
        value = value[0] if len(value) else None
    if value is None:
        return None
    try:
        number = float(Fraction(value.num, value.den)) if hasattr(value, "num") else float(value)
    except (TypeError, ValueError, ZeroDivisionError):
        return None
    return number if math.isfinite(number) and number > 0 else None

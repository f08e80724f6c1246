"""Writes linear DNG from rows of pixels: demosaiced light as the camera measures it, with the camera's colour tags.

    IFD0      a preview, the tags of the camera and of its colours, EXIF and GPS
    SubIFD    the picture: photometric interpretation LinearRaw, three 16-bit samples, uncompressed strips
    data      the preview, then the strips, one after another

The size of uncompressed strips is known before the first row, so the directories come first, where readers look, and
the file is written from start to end. DNG allows no compression for 16-bit samples that zlib could do (its lossless
JPEG is another).
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipelines.formats import tiff
from pipelines.formats.tiff import ASCII, BYTE, LONG, RATIONAL, SHORT, SIGNED_RATIONAL, Directory, Entry, entry
from preprocessing.colour import srgb_to_linear
from preprocessing.raw.dng import JPEG, PHOTOMETRIC_LINEAR_RAW, PHOTOMETRIC_YCBCR, UNCOMPRESSED, Tag
from preprocessing.raw.dng_colour import DngColour

WHITE = 65535
"""The level at which the camera clips; black is 0."""
MAX_BYTES = 2**32 - 1
"""Addresses of a TIFF have 4 bytes. Readers of DNG know no BigTIFF: version 1.4, which we write, does not allow it."""
PREVIEW_PX = 1024
"""The preview's longer side."""
_HEAD_BYTES = 2**20
"""More than directories and preview take."""
_STRIP_BYTES = 2**20
_CHUNK_ROWS = 64
"""Rows that are converted at a time."""
_COLOUR_SPACE, _UNCALIBRATED, _SRGB_PREVIEW = 0xA001, 0xFFFF, 2
_PREVIEW_QUALITY = 85


@dataclass(frozen=True)
class Camera:
    """How a camera measures colours."""

    srgb_to_camera: NDArray[np.float64]
    """[3, 3] linear sRGB -> white-balanced camera colours, rows sum to 1 (preprocessing.colour.srgb_to_camera)."""
    gains: NDArray[np.float64]
    """(3,) white-balance gains R, G, B; the smallest is 1, as LibRaw scales them."""
    colour: DngColour
    """Its tags; they hold a ColorMatrix1 that goes with `srgb_to_camera`."""

    def light(self, levels: NDArray[np.uint16]) -> NDArray[np.uint16]:
        """The camera's own light, levels from black 0 to clipping 65535, of sRGB levels [rows, W, 3].

        The inverse of LibRaw's way from balanced camera light to its rendering. No balanced light is above clipping,
        so nothing clips at 65535; what would be below 0 becomes 0.
        """
        matrix = (WHITE * self.srgb_to_camera / self.gains[:, None]).T.astype(np.float32)
        light = np.empty_like(levels)
        for first in range(0, len(levels), _CHUNK_ROWS):
            part = _LINEAR[levels[first : first + _CHUNK_ROWS]] @ matrix
            light[first : first + _CHUNK_ROWS] = np.rint(part, out=part).clip(0, WHITE, out=part)
        return light


def _light_of_levels() -> NDArray[np.float32]:
    """Linear light of each 16-bit level of a zoomed rendering.

    LibRaw cuts its 16-bit values to the upper byte. So byte n stands for the values 256 n to 256 n + 255, and is
    restored as their middle; black and white stay what they are. Without this, the mean of a dark picture would be up
    to 1 % too low.
    """
    levels = [0, 1, 254, 255]
    middles = [0, 256 + 127.5, 254 * 256 + 127.5, 65535]
    return srgb_to_linear(np.interp(np.arange(2**16) / 257, levels, middles) / 65535).astype(np.float32)


_LINEAR = _light_of_levels()


def size_bytes(width: int, height: int) -> int:
    """The size of the file, rounded up."""
    return _HEAD_BYTES + 6 * width * height


def write(
    file: BinaryIO,
    parts: Iterable[NDArray[np.uint16]],
    width: int,
    height: int,
    camera: Camera,
    preview: NDArray[np.uint8],
    *,
    exif: bytes = b"",
) -> None:
    """Write a DNG while `parts` arrive.

    Args:
        parts: `Camera.light` [rows, width, 3] from top to bottom; `height` rows in all, upright.
        preview: the picture in sRGB, small, uint8 [h, w, 3].
        exif: a block as `tags.written` gives it.
    """
    jpg = _jpg(preview)
    root = _root(camera, jpg, preview.shape[:2], exif)
    raw = _raw(width, height)
    root[Tag.SUB_IFDS] = raw
    # The addresses do not change the size of the directories.
    first, block = tiff.serialised(root, 8, big=False)
    start = 8 + len(block) + len(jpg) + len(jpg) % 2
    root[Tag.STRIP_OFFSETS] = entry(LONG, [8 + len(block)])
    raw[Tag.STRIP_OFFSETS] = entry(LONG, [start + at for at in range(0, 6 * width * height, _strip(width))])
    first, block = tiff.serialised(root, 8, big=False)
    file.write(struct.pack("<2sHI", b"II", 42, first) + block + jpg + bytes(len(jpg) % 2))
    for part in parts:
        file.write(np.ascontiguousarray(part, "<u2").data)
        del part  # the next one needs memory


def _strip(width: int) -> int:
    """Bytes of a strip of whole rows."""
    return max(1, _STRIP_BYTES // (6 * width)) * 6 * width


def _raw(width: int, height: int) -> Directory:
    """The picture's directory, with place for the addresses of its strips."""
    strip, total = _strip(width), 6 * width * height
    sizes = [min(strip, total - at) for at in range(0, total, strip)]
    return {
        Tag.NEW_SUBFILE_TYPE: entry(LONG, [0]),
        Tag.IMAGE_WIDTH: entry(LONG, [width]),
        Tag.IMAGE_LENGTH: entry(LONG, [height]),
        Tag.BITS_PER_SAMPLE: entry(SHORT, [16] * 3),
        Tag.COMPRESSION: entry(SHORT, [UNCOMPRESSED]),
        Tag.PHOTOMETRIC: entry(SHORT, [PHOTOMETRIC_LINEAR_RAW]),
        Tag.STRIP_OFFSETS: entry(LONG, [0] * len(sizes)),
        Tag.SAMPLES_PER_PIXEL: entry(SHORT, [3]),
        Tag.ROWS_PER_STRIP: entry(LONG, [strip // (6 * width)]),
        Tag.STRIP_BYTE_COUNTS: entry(LONG, sizes),
        Tag.PLANAR_CONFIGURATION: entry(SHORT, [1]),
        Tag.BLACK_LEVEL_REPEAT: entry(SHORT, [1, 1]),
        Tag.BLACK_LEVEL: entry(SHORT, [0] * 3),
        Tag.WHITE_LEVEL: entry(SHORT, [WHITE] * 3),
        Tag.DEFAULT_CROP_ORIGIN: entry(LONG, [0, 0]),
        Tag.DEFAULT_CROP_SIZE: entry(LONG, [width, height]),
    }


def _root(camera: Camera, jpg: bytes, size: Sequence[int], exif: bytes) -> Directory:
    """The first directory, with place for the address of the preview."""
    directory = tiff.parsed(exif) if exif else {}
    shot = directory.get(Tag.EXIF_IFD)
    if isinstance(shot, dict):
        shot[_COLOUR_SPACE] = entry(SHORT, [_UNCALIBRATED])
    make, model = (_text(directory, tag) for tag in (Tag.MAKE, Tag.MODEL))
    name = camera.colour.camera or f"{make} {model}".strip() or "Unknown"
    directory |= {
        # darktable reads no DNG without these two.
        Tag.MAKE: _ascii(make or name.split()[0]),
        Tag.MODEL: _ascii(model or name),
        Tag.NEW_SUBFILE_TYPE: entry(LONG, [1]),  # a preview
        Tag.IMAGE_WIDTH: entry(LONG, [size[1]]),
        Tag.IMAGE_LENGTH: entry(LONG, [size[0]]),
        Tag.BITS_PER_SAMPLE: entry(SHORT, [8] * 3),
        Tag.COMPRESSION: entry(SHORT, [JPEG]),
        Tag.PHOTOMETRIC: entry(SHORT, [PHOTOMETRIC_YCBCR]),
        Tag.STRIP_OFFSETS: entry(LONG, [0]),
        Tag.SAMPLES_PER_PIXEL: entry(SHORT, [3]),
        Tag.ROWS_PER_STRIP: entry(LONG, [size[0]]),
        Tag.STRIP_BYTE_COUNTS: entry(LONG, [len(jpg)]),
        Tag.PLANAR_CONFIGURATION: entry(SHORT, [1]),
        Tag.YCBCR_SUBSAMPLING: entry(SHORT, [1, 1]),
        Tag.YCBCR_POSITIONING: entry(SHORT, [1]),
        Tag.REFERENCE_BLACK_WHITE: entry(RATIONAL, _rationals([0, 255, 128, 255, 128, 255])),
        Tag.PREVIEW_COLOR_SPACE: entry(LONG, [_SRGB_PREVIEW]),
        Tag.DNG_VERSION: entry(BYTE, [1, 4, 0, 0]),
        Tag.DNG_BACKWARD_VERSION: entry(BYTE, [1, 1, 0, 0]),
        Tag.UNIQUE_CAMERA_MODEL: _ascii(name),
        Tag.AS_SHOT_NEUTRAL: entry(RATIONAL, _rationals(camera.gains.min() / camera.gains)),
        Tag.BASELINE_EXPOSURE: entry(SIGNED_RATIONAL, [0, 1]),
    }
    for tag, values in camera.colour.numbers.items():
        kind = RATIONAL if tag == Tag.ANALOG_BALANCE else SIGNED_RATIONAL
        directory[tag] = entry(kind, _rationals(values))
    directory |= {tag: entry(SHORT, [light]) for tag, light in camera.colour.illuminants.items()}
    return directory


def _rationals(values: Iterable[float]) -> list[int]:
    """Numerator, denominator, numerator, ..."""
    fractions = [Fraction(float(value)).limit_denominator(1_000_000) for value in values]
    return [number for each in fractions for number in each.as_integer_ratio()]


def _ascii(text: str) -> Entry:
    return entry(ASCII, text.encode("ascii", "replace") + b"\0")


def _text(directory: Directory, tag: int) -> str:
    item = directory.get(tag)
    return "" if item is None or isinstance(item, dict) else item.data.decode("ascii", "replace").strip("\0 ")


def _jpg(picture: NDArray[np.uint8]) -> bytes:
    out = io.BytesIO()
    Image.fromarray(picture).save(out, "JPEG", quality=_PREVIEW_QUALITY, subsampling=0)
    return out.getvalue()

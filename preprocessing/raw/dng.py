"""Writes RAW files that LibRaw decodes bit for bit: Adobe DNG, and an uncompressed Sony ARW like the ILCE-7SM2's.

Both are little-endian TIFF files with the same four parts, which is also how cameras lay them out:

    IFD0      the JPEG thumbnail (so that Pillow can open the file), make, model, orientation
    EXIF IFD  focal length, ISO, exposure, aperture
    SubIFD    the Bayer mosaic, uncompressed 16-bit words, with its black and white levels
    data      everything that does not fit in an entry's four bytes

A DNG carries levels and white balance in DNG's own tags; an ARW in Sony's clear (not encrypted) tags 0x7310 and 0x7313.
"""

import io
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from preprocessing.colour import ILCE_7SM2_XYZ_TO_CAMERA

Mosaic = npt.NDArray[np.uint16]

BYTE, ASCII, SHORT, LONG, RATIONAL, UNDEFINED, SSHORT, SRATIONAL = 1, 2, 3, 4, 5, 7, 8, 10
_PACK = {BYTE: "B", SHORT: "H", LONG: "I", SSHORT: "h"}

CFA_CODES = {"RGGB": (0, 1, 1, 2), "GRBG": (1, 0, 2, 1), "GBRG": (1, 2, 0, 1), "BGGR": (2, 1, 1, 0)}

# LibRaw knows Sony's sensors by the stored width and drops unused columns on the right of these: stored -> visible.
SONY_CROPPED_WIDTHS = {3984: 3925, 4288: 4256, 4928: 4920, 5504: 5472, 6048: 6024, 7392: 7362, 8000: 7968, 9600: 9568}
SONY_WHITE = 16383


@dataclass
class _Ifd:
    """One image file directory; `blobs` are filled into tags whose value is where the bytes lie in the file."""

    entries: dict[int, tuple[int, Sequence[int] | bytes]] = field(default_factory=dict)
    blobs: dict[int, bytes] = field(default_factory=dict)
    children: dict[int, "_Ifd"] = field(default_factory=dict)

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

    def raw(self, tag: int, kind: int, value: bytes) -> None:
        self.entries[tag] = (kind, value)


def write_dng(
    path: Path | str,
    mosaic_HW: Mosaic,
    *,
    cfa: str = "RGGB",
    black_level: Sequence[float] = (512.0, 512.0, 512.0, 512.0),
    white_level: int = 16383,
    wb: Sequence[float] = (2.0, 1.0, 1.5),
    make: str = "SDAN",
    model: str = "Simulated",
    focal_mm: float | None = None,
    iso: int = 100,
    exposure_s: float = 0.01,
    f_number: float = 8.0,
    orientation: int = 1,
    thumbnail_jpg: bytes | None = None,
) -> None:
    """Write a Bayer mosaic as a DNG whose decoded `raw_image` equals `mosaic_HW` exactly.

    mosaic_HW    uint16 [H, W] sensor counts; H and W even, at least 32
    cfa          the colours of the top left 2x2, row by row
    black_level  counts for R, G1, G2, B (G1 shares its rows with R); at most 4 decimals survive
    wb           gains that turn grey grey, for R, G, B with green 1
    orientation  EXIF 1-8: how a viewer turns the picture; the mosaic stays in sensor orientation
    thumbnail_jpg  a baseline JPEG; None renders a small one from the mosaic
    Raises ValueError for values that a DNG cannot hold.
    """
    _check(mosaic_HW, cfa, black_level, white_level, wb, orientation)
    raw = _mosaic_ifd(mosaic_HW, cfa, bits=16)
    # BlackLevel is listed by place in the 2x2 cell, our argument by colour.
    raw.set(50713, SHORT, 2, 2)
    raw.rational(50714, *(black_level[_plane(cfa, place)] for place in range(4)))
    raw.set(50717, LONG, white_level)
    raw.set(50710, BYTE, 0, 1, 2)
    raw.set(50711, SHORT, 1)
    root = _root_ifd(mosaic_HW, cfa, thumbnail_jpg, make, model, orientation)
    root.set(50706, BYTE, 1, 4, 0, 0)
    root.set(50707, BYTE, 1, 1, 0, 0)
    root.text(50708, f"{make} {model}")
    root.rational(50721, *ILCE_7SM2_XYZ_TO_CAMERA.ravel().tolist(), signed=True)
    root.rational(50728, *(1.0 / gain for gain in wb))
    root.set(50778, SHORT, 21)  # CalibrationIlluminant1: D65
    root.children[330] = raw
    root.children[34665] = _exif_ifd(focal_mm, iso, exposure_s, f_number)
    Path(path).write_bytes(_serialise(root))


def write_arw(
    path: Path | str,
    mosaic_HW: Mosaic,
    *,
    black_level: Sequence[float] = (512.0, 512.0, 512.0, 512.0),
    wb: Sequence[float] = (2.0, 1.0, 1.5),
    make: str = "SONY",
    model: str = "ILCE-7SM2",
    focal_mm: float | None = None,
    iso: int = 100,
    exposure_s: float = 0.01,
    f_number: float = 8.0,
    orientation: int = 1,
    thumbnail_jpg: bytes | None = None,
) -> None:
    """Write a 14-bit RGGB mosaic as LibRaw expects an uncompressed Sony ARW; arguments as for `write_dng`.

    The white level is the camera's own 16383 (ARW has no tag that LibRaw reads for it), black levels are whole numbers.
    A 4256-wide mosaic is stored 4288 wide, as the real ILCE-7SM2 does, since LibRaw drops the last 32 columns of such
    a file; other widths that LibRaw would crop (`SONY_CROPPED_WIDTHS`) are refused with a ValueError.
    """
    _check(mosaic_HW, "RGGB", black_level, SONY_WHITE, wb, orientation)
    width = mosaic_HW.shape[1]
    if width in SONY_CROPPED_WIDTHS:
        raise ValueError(f"an ARW {width} px wide is cropped by LibRaw; use {width + 2} or {width - 2} px")
    if any(level != int(level) for level in black_level):
        raise ValueError(
            f"black_level={tuple(black_level)}: an ARW holds whole numbers only; round them or write a DNG"
        )
    if width == 4256:
        mosaic_HW = np.pad(mosaic_HW, ((0, 0), (0, 32)), mode="reflect")
    raw = _mosaic_ifd(mosaic_HW, "RGGB", bits=14)
    raw.set(0x7310, SHORT, *(int(level) for level in black_level))
    raw.set(0x7313, SSHORT, *(round(1024 * gain) for gain in (wb[0], wb[1], wb[1], wb[2])))
    root = _root_ifd(mosaic_HW, "RGGB", thumbnail_jpg, make, model, orientation)
    root.children[330] = raw
    root.children[34665] = _exif_ifd(focal_mm, iso, exposure_s, f_number)
    Path(path).write_bytes(_serialise(root))


def bare_dng(
    mosaic_HW: Mosaic,
    cfa: str,
    black_level: Sequence[int],
    white_level: int,
    xyz_to_camera_33: npt.NDArray[np.float64] | None,
) -> bytes:
    """A DNG that says what LibRaw needs for a rendering and no more: counts, levels and the colour matrix.

    black_level  whole counts by place in the 2x2 cell, row by row
    xyz_to_camera_33  its rows are free in scale; None: LibRaw leaves the camera's colours as they are
    Raises np.linalg.LinAlgError for a matrix that cannot be inverted.
    """
    ifd = _mosaic_ifd(mosaic_HW, cfa, bits=16)
    ifd.text(271, "SDAN")
    ifd.text(272, "Negative")
    ifd.set(50706, BYTE, 1, 4, 0, 0)
    ifd.set(50707, BYTE, 1, 1, 0, 0)
    ifd.set(50710, BYTE, 0, 1, 2)
    ifd.set(50711, SHORT, 1)
    ifd.set(50713, SHORT, 2, 2)
    ifd.set(50714, LONG, *black_level)
    ifd.set(50717, LONG, white_level)
    if xyz_to_camera_33 is not None:
        # LibRaw keeps ColorMatrix1 as float32. What that loses stands in CameraCalibration1, a matrix before it: there
        # small off-diagonal values are exact, and the diagonal is 1 because rows are free in scale.
        matrix = xyz_to_camera_33 / np.abs(xyz_to_camera_33).max(axis=1, keepdims=True)
        rounded = matrix.astype(np.float32).astype(np.float64)
        rest = matrix @ np.linalg.inv(rounded)
        ifd.entries[50721] = (SRATIONAL, _fractions(rounded))
        ifd.entries[50723] = (SRATIONAL, _fractions(rest / np.diag(rest)[:, None]))
        ifd.set(50778, SHORT, 21)
    return _serialise(ifd)


def _fractions(matrix_33: npt.NDArray[np.float64]) -> list[int]:
    """Its values as signed rationals, to 2**-30."""
    return [part for value in matrix_33.ravel() for part in (round(float(value) * (1 << 30)), 1 << 30)]


def _check(
    mosaic_HW: Mosaic, cfa: str, black_level: Sequence[float], white_level: int, wb: Sequence[float], orientation: int
) -> None:
    if (
        mosaic_HW.ndim != 2
        or mosaic_HW.dtype != np.uint16
        or min(mosaic_HW.shape) < 32
        or any(side % 2 for side in mosaic_HW.shape)
    ):
        raise ValueError(
            f"mosaic {mosaic_HW.dtype}{mosaic_HW.shape}, expected uint16 [H, W], both even and at least 32"
        )
    if cfa not in CFA_CODES:
        raise ValueError(f"cfa={cfa!r}, expected one of {', '.join(CFA_CODES)}")
    if len(black_level) != 4 or not all(0 <= level < white_level for level in black_level):
        raise ValueError(
            f"black_level={tuple(black_level)}, expected 4 values (R, G1, G2, B) from 0 to below {white_level}"
        )
    if len(wb) != 3 or not all(gain > 0 for gain in wb):
        raise ValueError(f"wb={tuple(wb)}, expected 3 positive gains (R, G, B)")
    if not 1 <= orientation <= 8:
        raise ValueError(f"orientation={orientation}, expected an EXIF orientation from 1 to 8")


def _plane(cfa: str, place: int) -> int:
    """Index in R, G1, G2, B of the place 0-3 (row by row) of the 2x2 cell; G1 is the green beside red."""
    if cfa[place] != "G":
        return 0 if cfa[place] == "R" else 3
    return 1 if "R" in (cfa[:2] if place < 2 else cfa[2:]) else 2


def _mosaic_ifd(mosaic_HW: Mosaic, cfa: str, bits: int) -> _Ifd:
    height, width = mosaic_HW.shape
    data = np.ascontiguousarray(mosaic_HW, dtype="<u2").tobytes()
    ifd = _Ifd()
    ifd.set(254, LONG, 0)
    ifd.set(256, LONG, width)
    ifd.set(257, LONG, height)
    ifd.set(258, SHORT, bits)
    ifd.set(259, SHORT, 1)
    ifd.set(262, SHORT, 32803)
    ifd.blobs[273] = data
    ifd.set(277, SHORT, 1)
    ifd.set(278, LONG, height)
    ifd.set(279, LONG, len(data))
    ifd.set(284, SHORT, 1)
    ifd.set(33421, SHORT, 2, 2)
    ifd.set(33422, BYTE, *CFA_CODES[cfa])
    return ifd


def _root_ifd(mosaic_HW: Mosaic, cfa: str, thumbnail: bytes | None, make: str, model: str, orientation: int) -> _Ifd:
    thumbnail = thumbnail if thumbnail is not None else _render_thumbnail(mosaic_HW, cfa)
    with Image.open(io.BytesIO(thumbnail)) as image:
        width, height = image.size
    ifd = _Ifd()
    ifd.set(254, LONG, 1)
    ifd.set(256, LONG, width)
    ifd.set(257, LONG, height)
    ifd.set(258, SHORT, 8, 8, 8)
    ifd.set(259, SHORT, 7)
    ifd.set(262, SHORT, 6)
    ifd.text(271, make)
    ifd.text(272, model)
    ifd.blobs[273] = thumbnail
    ifd.set(274, SHORT, orientation)
    ifd.set(277, SHORT, 3)
    ifd.set(278, LONG, height)
    ifd.set(279, LONG, len(thumbnail))
    # Sony's own place for the preview; DNG readers ignore it.
    ifd.blobs[513] = thumbnail
    ifd.set(514, LONG, len(thumbnail))
    ifd.text(305, "SDAN simulator")
    return ifd


def _exif_ifd(focal_mm: float | None, iso: int, exposure_s: float, f_number: float) -> _Ifd:
    ifd = _Ifd()
    ifd.rational(33434, exposure_s)
    ifd.rational(33437, f_number)
    ifd.set(34855, SHORT, iso)
    ifd.raw(36864, UNDEFINED, b"0230")
    if focal_mm is not None:
        ifd.rational(37386, focal_mm)
    return ifd


def _render_thumbnail(mosaic_HW: Mosaic, cfa: str) -> bytes:
    """A small picture of the mosaic, only so that file browsers have something to show."""
    step = 2 * max(1, mosaic_HW.shape[1] // 640)
    planes = {cfa[place]: mosaic_HW[place // 2 :: step, place % 2 :: step] for place in range(4)}
    rgb_HW3 = np.stack([planes[colour] for colour in "RGB"], axis=-1).astype(np.float32)
    low, high = np.percentile(rgb_HW3, (0.5, 99.5), axis=(0, 1))
    rgb_HW3 = np.clip((rgb_HW3 - low) / np.maximum(high - low, 1), 0, 1) ** (1 / 2.2)
    buffer = io.BytesIO()
    Image.fromarray((255 * rgb_HW3).astype(np.uint8)).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def _encode(kind: int, value: Sequence[int] | bytes) -> tuple[int, bytes]:
    """An entry's count and bytes."""
    if isinstance(value, bytes):
        return len(value), value
    if kind in (RATIONAL, SRATIONAL):
        return len(value) // 2, struct.pack(f"<{len(value)}{'i' if kind == SRATIONAL else 'I'}", *value)
    return len(value), struct.pack(f"<{len(value)}{_PACK[kind]}", *value)


def _serialise(root: _Ifd) -> bytes:
    """Lay out the directories first, then their data: children and blobs become offsets (LONG)."""
    directories: list[_Ifd] = []

    def collect(ifd: _Ifd) -> None:
        directories.append(ifd)
        for child in ifd.children.values():
            collect(child)

    collect(root)
    position = 8
    starts: dict[int, int] = {}
    for ifd in directories:
        starts[id(ifd)] = position
        # Blobs and children are one LONG each.
        position += 2 + 12 * (len(ifd.entries) + len(ifd.blobs) + len(ifd.children)) + 4
    head = bytearray(struct.pack("<2sHI", b"II", 42, 8))
    tail = bytearray()
    placed: dict[int, int] = {}
    for ifd in directories:
        table: dict[int, tuple[int, Sequence[int] | bytes]] = dict(ifd.entries)
        for tag, blob in ifd.blobs.items():
            if id(blob) not in placed:  # the thumbnail is named twice but stored once
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

"""Writes RAW files that LibRaw decodes bit for bit: Adobe DNG, and uncompressed Sony ARW like the ILCE-7SM2's.

Both are little-endian TIFF files (tiff.py) with the same four parts, as cameras lay them out:

    IFD0      the JPEG thumbnail (so that Pillow can open the file), make, model, orientation
    EXIF IFD  focal length, ISO, exposure, aperture
    SubIFD    the Bayer mosaic, uncompressed 16-bit words, with its black and white levels
    data      everything that does not fit in an entry's four bytes

A DNG has its levels and white balance in standard tags; an ARW has them in Sony's unencrypted tags.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from preprocessing.colour import ILCE_7SM2_XYZ_TO_CAMERA
from preprocessing.raw.tiff import BYTE, LONG, SHORT, SSHORT, UNDEFINED, Ifd, serialise

Mosaic = npt.NDArray[np.uint16]

UNCOMPRESSED, JPEG = 1, 7
PHOTOMETRIC_YCBCR, _PHOTOMETRIC_CFA, PHOTOMETRIC_LINEAR_RAW = 6, 32803, 34892
D65 = 21

CFA_CODES = {"RGGB": (0, 1, 1, 2), "GRBG": (1, 0, 2, 1), "GBRG": (1, 2, 0, 1), "BGGR": (2, 1, 1, 0)}

SONY_CROPPED_WIDTHS = {3984: 3925, 4288: 4256, 4928: 4920, 5504: 5472, 6048: 6024, 7392: 7362, 8000: 7968, 9600: 9568}
"""Stored -> visible width. LibRaw recognises Sony sensors by these stored widths and drops the columns on the right."""
SONY_WHITE_LEVEL = 16383


class Tag(IntEnum):
    """TIFF, EXIF, DNG and Sony tags that are written here."""

    NEW_SUBFILE_TYPE = 254
    IMAGE_WIDTH = 256
    IMAGE_LENGTH = 257
    BITS_PER_SAMPLE = 258
    COMPRESSION = 259
    PHOTOMETRIC = 262
    MAKE = 271
    MODEL = 272
    STRIP_OFFSETS = 273
    ORIENTATION = 274
    SAMPLES_PER_PIXEL = 277
    ROWS_PER_STRIP = 278
    STRIP_BYTE_COUNTS = 279
    PLANAR_CONFIGURATION = 284
    SOFTWARE = 305
    SUB_IFDS = 330
    JPEG_OFFSET = 513
    JPEG_BYTE_COUNT = 514
    YCBCR_SUBSAMPLING = 530
    YCBCR_POSITIONING = 531
    REFERENCE_BLACK_WHITE = 532
    SONY_BLACK_LEVEL = 0x7310
    SONY_WHITE_BALANCE = 0x7313
    CFA_REPEAT = 33421
    CFA_PATTERN = 33422
    EXPOSURE_TIME = 33434
    F_NUMBER = 33437
    EXIF_IFD = 34665
    ISO = 34855
    EXIF_VERSION = 36864
    FOCAL_LENGTH = 37386
    DNG_VERSION = 50706
    DNG_BACKWARD_VERSION = 50707
    UNIQUE_CAMERA_MODEL = 50708
    CFA_PLANE_COLOR = 50710
    CFA_LAYOUT = 50711
    BLACK_LEVEL_REPEAT = 50713
    BLACK_LEVEL = 50714
    WHITE_LEVEL = 50717
    DEFAULT_CROP_ORIGIN = 50719
    DEFAULT_CROP_SIZE = 50720
    COLOR_MATRIX_1 = 50721
    COLOR_MATRIX_2 = 50722
    CAMERA_CALIBRATION_1 = 50723
    CAMERA_CALIBRATION_2 = 50724
    ANALOG_BALANCE = 50727
    AS_SHOT_NEUTRAL = 50728
    BASELINE_EXPOSURE = 50730
    CALIBRATION_ILLUMINANT_1 = 50778
    CALIBRATION_ILLUMINANT_2 = 50779
    FORWARD_MATRIX_1 = 50964
    FORWARD_MATRIX_2 = 50965
    PREVIEW_COLOR_SPACE = 50970


def cfa_channels(cfa: str) -> list[int]:
    """Index in R, G1, G2, B of each place of the 2x2 cell, row by row; G1 is the green in red's row."""
    red_row = cfa.index("R") // 2
    return [{"R": 0, "B": 3}.get(colour, 1 if place // 2 == red_row else 2) for place, colour in enumerate(cfa)]


@dataclass(frozen=True)
class ShotTags:
    """How the written frame was taken: its EXIF tags and preview."""

    focal_mm: float | None = None
    iso: int = 100
    exposure_s: float = 0.01
    f_number: float = 8.0
    orientation: int = 1
    """EXIF 1-8: how a viewer turns the picture; the mosaic stays in sensor orientation."""
    thumbnail_jpg: bytes | None = None
    """A baseline JPEG; None: a small one is rendered from the mosaic."""


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
    shot: ShotTags = ShotTags(),
    xyz_to_camera_33: npt.NDArray[np.float64] = ILCE_7SM2_XYZ_TO_CAMERA,
) -> None:
    """Write a Bayer mosaic as a DNG whose decoded `raw_image` equals `mosaic_HW` exactly.

    mosaic_HW    uint16 [H, W] sensor counts; H and W even, at least 32
    cfa          colours of the top left 2x2, row by row
    black_level  counts for R, G1, G2, B (G1 is in red's rows), kept to 4 decimals
    wb           white-balance gains for R, G, B with green 1
    Raises ValueError for values that a DNG cannot hold.
    """
    _check(mosaic_HW, cfa, black_level, white_level, wb, shot.orientation)
    raw = _mosaic_ifd(mosaic_HW, cfa, bits=16)
    # The tag lists black levels by place in the 2x2 cell, our argument by colour.
    raw.set(Tag.BLACK_LEVEL_REPEAT, SHORT, 2, 2)
    raw.rational(Tag.BLACK_LEVEL, *(black_level[channel] for channel in cfa_channels(cfa)))
    raw.set(Tag.WHITE_LEVEL, LONG, white_level)
    raw.set(Tag.CFA_PLANE_COLOR, BYTE, 0, 1, 2)
    raw.set(Tag.CFA_LAYOUT, SHORT, 1)
    root = _root_ifd(mosaic_HW, cfa, shot.thumbnail_jpg, make, model, shot.orientation)
    root.set(Tag.DNG_VERSION, BYTE, 1, 4, 0, 0)
    root.set(Tag.DNG_BACKWARD_VERSION, BYTE, 1, 1, 0, 0)
    root.text(Tag.UNIQUE_CAMERA_MODEL, f"{make} {model}")
    root.rational(Tag.COLOR_MATRIX_1, *xyz_to_camera_33.ravel().tolist(), signed=True)
    root.rational(Tag.AS_SHOT_NEUTRAL, *(1.0 / gain for gain in wb))
    root.set(Tag.CALIBRATION_ILLUMINANT_1, SHORT, D65)
    root.children[Tag.SUB_IFDS] = raw
    root.children[Tag.EXIF_IFD] = _exif_ifd(shot)
    Path(path).write_bytes(serialise(root))


def write_arw(
    path: Path | str,
    mosaic_HW: Mosaic,
    *,
    black_level: Sequence[float] = (512.0, 512.0, 512.0, 512.0),
    wb: Sequence[float] = (2.0, 1.0, 1.5),
    make: str = "SONY",
    model: str = "ILCE-7SM2",
    shot: ShotTags = ShotTags(),
) -> None:
    """Write a 14-bit RGGB mosaic as LibRaw expects an uncompressed Sony ARW; arguments as for `write_dng`.

    The white level is 16383, as LibRaw assumes for this camera. Black levels are whole numbers. A 4256-wide mosaic is
    stored 4288 wide, like the real ILCE-7SM2's, because LibRaw drops the last 32 columns of such a file.
    Raises ValueError for other widths that LibRaw would crop (`SONY_CROPPED_WIDTHS`).
    """
    _check(mosaic_HW, "RGGB", black_level, SONY_WHITE_LEVEL, wb, shot.orientation)
    width = mosaic_HW.shape[1]
    if width in SONY_CROPPED_WIDTHS:
        raise ValueError(
            f"mosaic: expected a width that LibRaw does not crop, got {width}; use {width - 2} or {width + 2}"
        )
    if any(level != int(level) for level in black_level):
        raise ValueError(f"black_level: expected whole numbers, got {tuple(black_level)}; round them or write a DNG")
    if width == 4256:
        mosaic_HW = np.pad(mosaic_HW, ((0, 0), (0, 32)), mode="reflect")
    raw = _mosaic_ifd(mosaic_HW, "RGGB", bits=14)
    raw.set(Tag.SONY_BLACK_LEVEL, SHORT, *(int(level) for level in black_level))
    raw.set(Tag.SONY_WHITE_BALANCE, SSHORT, *(round(1024 * gain) for gain in (wb[0], wb[1], wb[1], wb[2])))
    root = _root_ifd(mosaic_HW, "RGGB", shot.thumbnail_jpg, make, model, shot.orientation)
    root.children[Tag.SUB_IFDS] = raw
    root.children[Tag.EXIF_IFD] = _exif_ifd(shot)
    Path(path).write_bytes(serialise(root))


def bare_dng(
    mosaic_HW: Mosaic,
    cfa: str,
    black_level: Sequence[int],
    white_level: int,
    xyz_to_camera_33: npt.NDArray[np.float64] | None,
) -> bytes:
    """A DNG with only what LibRaw needs for a rendering: counts, levels and the colour matrix.

    black_level  whole counts by place in the 2x2 cell, row by row
    xyz_to_camera_33  rows at any scale; with None LibRaw does not convert the camera's colours
    Raises np.linalg.LinAlgError for a matrix that cannot be inverted.
    """
    ifd = _mosaic_ifd(mosaic_HW, cfa, bits=16)
    ifd.text(Tag.MAKE, "SDAN")
    ifd.text(Tag.MODEL, "Negative")
    ifd.set(Tag.DNG_VERSION, BYTE, 1, 4, 0, 0)
    ifd.set(Tag.DNG_BACKWARD_VERSION, BYTE, 1, 1, 0, 0)
    ifd.set(Tag.CFA_PLANE_COLOR, BYTE, 0, 1, 2)
    ifd.set(Tag.CFA_LAYOUT, SHORT, 1)
    ifd.set(Tag.BLACK_LEVEL_REPEAT, SHORT, 2, 2)
    ifd.set(Tag.BLACK_LEVEL, LONG, *black_level)
    ifd.set(Tag.WHITE_LEVEL, LONG, white_level)
    if xyz_to_camera_33 is not None:
        # LibRaw reads ColorMatrix1 as float32 and multiplies it from the left by CameraCalibration1,
        # which here corrects that rounding. Near the identity, small off-diagonal values keep their precision.
        matrix = xyz_to_camera_33 / np.abs(xyz_to_camera_33).max(axis=1, keepdims=True)
        rounded = matrix.astype(np.float32).astype(np.float64)
        rest = matrix @ np.linalg.inv(rounded)
        ifd.signed_rationals(Tag.COLOR_MATRIX_1, rounded)
        ifd.signed_rationals(Tag.CAMERA_CALIBRATION_1, rest / np.diag(rest)[:, None])
        ifd.set(Tag.CALIBRATION_ILLUMINANT_1, SHORT, D65)
    return serialise(ifd)


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
            f"mosaic: expected uint16 [H, W], both even and at least 32, got {mosaic_HW.dtype}{list(mosaic_HW.shape)}"
        )
    if cfa not in CFA_CODES:
        raise ValueError(f"cfa: expected one of {', '.join(CFA_CODES)}, got {cfa!r}")
    if len(black_level) != 4 or not all(0 <= level < white_level for level in black_level):
        raise ValueError(
            f"black_level: expected 4 values (R, G1, G2, B) from 0 to below {white_level}, got {tuple(black_level)}"
        )
    if len(wb) != 3 or not all(gain > 0 for gain in wb):
        raise ValueError(f"wb: expected 3 positive gains (R, G, B), got {tuple(wb)}")
    if not 1 <= orientation <= 8:
        raise ValueError(f"orientation: expected an EXIF orientation from 1 to 8, got {orientation}")


def _mosaic_ifd(mosaic_HW: Mosaic, cfa: str, bits: int) -> Ifd:
    height, width = mosaic_HW.shape
    data = np.ascontiguousarray(mosaic_HW, dtype="<u2").tobytes()
    ifd = Ifd()
    ifd.set(Tag.NEW_SUBFILE_TYPE, LONG, 0)
    ifd.set(Tag.IMAGE_WIDTH, LONG, width)
    ifd.set(Tag.IMAGE_LENGTH, LONG, height)
    ifd.set(Tag.BITS_PER_SAMPLE, SHORT, bits)
    ifd.set(Tag.COMPRESSION, SHORT, UNCOMPRESSED)
    ifd.set(Tag.PHOTOMETRIC, SHORT, _PHOTOMETRIC_CFA)
    ifd.blobs[Tag.STRIP_OFFSETS] = data
    ifd.set(Tag.SAMPLES_PER_PIXEL, SHORT, 1)
    ifd.set(Tag.ROWS_PER_STRIP, LONG, height)
    ifd.set(Tag.STRIP_BYTE_COUNTS, LONG, len(data))
    ifd.set(Tag.PLANAR_CONFIGURATION, SHORT, 1)
    ifd.set(Tag.CFA_REPEAT, SHORT, 2, 2)
    ifd.set(Tag.CFA_PATTERN, BYTE, *CFA_CODES[cfa])
    return ifd


def _root_ifd(mosaic_HW: Mosaic, cfa: str, thumbnail: bytes | None, make: str, model: str, orientation: int) -> Ifd:
    thumbnail = thumbnail if thumbnail is not None else _render_thumbnail(mosaic_HW, cfa)
    with Image.open(io.BytesIO(thumbnail)) as image:
        width, height = image.size
    ifd = Ifd()
    ifd.set(Tag.NEW_SUBFILE_TYPE, LONG, 1)  # a preview
    ifd.set(Tag.IMAGE_WIDTH, LONG, width)
    ifd.set(Tag.IMAGE_LENGTH, LONG, height)
    ifd.set(Tag.BITS_PER_SAMPLE, SHORT, 8, 8, 8)
    ifd.set(Tag.COMPRESSION, SHORT, JPEG)
    ifd.set(Tag.PHOTOMETRIC, SHORT, PHOTOMETRIC_YCBCR)
    ifd.text(Tag.MAKE, make)
    ifd.text(Tag.MODEL, model)
    ifd.blobs[Tag.STRIP_OFFSETS] = thumbnail
    ifd.set(Tag.ORIENTATION, SHORT, orientation)
    ifd.set(Tag.SAMPLES_PER_PIXEL, SHORT, 3)
    ifd.set(Tag.ROWS_PER_STRIP, LONG, height)
    ifd.set(Tag.STRIP_BYTE_COUNTS, LONG, len(thumbnail))
    # Sony readers look for the preview here; DNG readers ignore these tags.
    ifd.blobs[Tag.JPEG_OFFSET] = thumbnail
    ifd.set(Tag.JPEG_BYTE_COUNT, LONG, len(thumbnail))
    ifd.text(Tag.SOFTWARE, "SDAN simulator")
    return ifd


def _exif_ifd(shot: ShotTags) -> Ifd:
    ifd = Ifd()
    ifd.rational(Tag.EXPOSURE_TIME, shot.exposure_s)
    ifd.rational(Tag.F_NUMBER, shot.f_number)
    ifd.set(Tag.ISO, SHORT, shot.iso)
    ifd.raw(Tag.EXIF_VERSION, UNDEFINED, b"0230")
    if shot.focal_mm is not None:
        ifd.rational(Tag.FOCAL_LENGTH, shot.focal_mm)
    return ifd


def _render_thumbnail(mosaic_HW: Mosaic, cfa: str) -> bytes:
    """A small JPEG of the mosaic for file browsers."""
    step = 2 * max(1, mosaic_HW.shape[1] // 640)
    planes = {cfa[place]: mosaic_HW[place // 2 :: step, place % 2 :: step] for place in range(4)}
    rgb_HW3 = np.stack([planes[colour] for colour in "RGB"], axis=-1).astype(np.float32)
    low, high = np.percentile(rgb_HW3, (0.5, 99.5), axis=(0, 1))
    rgb_HW3 = np.clip((rgb_HW3 - low) / np.maximum(high - low, 1), 0, 1) ** (1 / 2.2)
    buffer = io.BytesIO()
    Image.fromarray((255 * rgb_HW3).astype(np.uint8)).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()

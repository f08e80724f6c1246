"""Decode a Bayer RAW file: sensor counts with the phase always RGGB, levels, white balance, and LibRaw's one rendering.

Training and users share this decoder and this rendering, so what the network saw is what it is given.
Shapes: h, w are packed pixels (one RGGB block each); the mosaic and the rendering are 2h x 2w.
"""

import contextlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import rawpy
from numpy.typing import NDArray

from preprocessing.raw.exif import read_exif
from preprocessing.raw.rendering import Negative, xyz_to_camera_of

_LEAST_CROP = 0.8
"""A part of the visible area smaller than this is no border crop: a mode, or a tag that means something else."""
_NOT_BAYER = "SDAN needs the plain counts of a 2x2 Bayer sensor"
_PLACES = ((0, 0), (0, 1), (1, 0), (1, 1))
_DNG_VERSION = 50706
_MAX_PIXELS = 400_000_000
_MAX_PIXELS_PER_BYTE = 32
"""Sensor noise does not compress further than to a quarter of a bit per pixel: a file that declares more is damaged."""


class RawError(ValueError):
    """A RAW file that cannot be used; the message is one line that says why."""


@dataclass(frozen=True)
class RawImage:
    """One decoded RAW frame in the sensor's orientation. Per-channel values are in the order R, G1, G2, B.

    Its area is the visible one without the first row and/or column where the sensor starts on another colour, so that
    the phase is always RGGB.
    """

    negative: Negative
    """The counts of LibRaw's visible area, and what rendering them takes."""
    origin: tuple[int, int]
    """(row, col) of this area's first pixel in LibRaw's visible area, mosaic pixels: 0 or 1 each."""
    frame: tuple[int, int, int, int]
    """(top, left, height, width) in LibRaw's visible area of what the camera holds to be the picture: the crop that the
    file names, about whose centre the camera's JPG lies, else the whole visible area."""
    flip: int
    """LibRaw's sizes.flip: how a viewer turns the picture; see `upright`."""
    camera: str
    """Make and model, "unknown" when the file does not say."""
    iso: float | None
    exposure_s: float | None
    focal_mm: float | None

    @property
    def size(self) -> tuple[int, int]:
        """(h, w) of the area, packed pixels."""
        (height, width), (top, left) = self.visible_size, self.origin
        return (height - top) // 2, (width - left) // 2

    @property
    def visible_size(self) -> tuple[int, int]:
        """(height, width) of LibRaw's visible area, mosaic pixels."""
        return self.negative.mosaic_HW.shape[0], self.negative.mosaic_HW.shape[1]

    @property
    def black_level(self) -> NDArray[np.float32]:
        """(4,) counts."""
        return self.negative.black_level

    @property
    def white_level(self) -> float:
        """Counts at which the sensor clips."""
        return self.negative.white_level

    @property
    def wb(self) -> NDArray[np.float32]:
        """(4,) gains of the file's white balance, green = 1."""
        return self.negative.wb

    @property
    def packed(self) -> NDArray[np.uint16]:
        """[4, h, w] sensor counts of the whole area, not normalised; made anew at each call."""
        return self.counts(0, 0, *self.size)

    @property
    def rendering(self) -> NDArray[np.uint8]:
        """[2h, 2w, 3] LibRaw's rendering of the whole area, sRGB in [0, 255]; made anew at each call."""
        return self.render(0, 0, *self.size)

    def counts(self, top: int, left: int, height: int, width: int) -> NDArray[np.uint16]:
        """[4, height, width] of a window, packed pixels."""
        first_row, first_col = self.origin[0] + 2 * top, self.origin[1] + 2 * left
        mosaic = self.negative.mosaic_HW[first_row : first_row + 2 * height, first_col : first_col + 2 * width]
        return np.stack([mosaic[r::2, c::2] for r, c in _PLACES])

    def render(self, top: int, left: int, height: int, width: int) -> NDArray[np.uint8]:
        """[2 height, 2 width, 3] of a window, packed pixels: that part of `rendering`, and only that is computed."""
        return self.negative.render(self.origin[0] + 2 * top, self.origin[1] + 2 * left, 2 * height, 2 * width)


def load(source: str | Path | bytes, *, name: str | None = None) -> RawImage:
    """Decode the RAW file `source` (a local path, or the file's bytes; `name` then stands for it in messages).

    Raises RawError, one line, for a missing, unknown, truncated or corrupt file and for sensors that are not Bayer
    (X-Trans, monochrome, Foveon) or no longer are (linear DNG).
    """
    with _opened(source, name) as (raw, label):
        return _decode(raw, label, _head(source))


def render(source: str | Path | bytes, *, name: str | None = None) -> NDArray[np.uint8]:
    """LibRaw's rendering of the camera's frame alone: uint8 [H, W, 3], sensor's orientation.

    The picture of a RAW that has no camera JPG beside it. Raises RawError as `load` does.
    """
    image = load(source, name=name)
    return image.negative.render(*image.frame)


def upright(image_HWC: NDArray[Any], flip: int) -> NDArray[Any]:
    """`image_HWC` turned for the viewer. `flip` is LibRaw's: 2 rows reversed, 1 columns reversed, then 4 transposed
    (3 = half turn, 5 = quarter turn left, 6 = quarter turn right)."""
    turned = image_HWC[::-1] if flip & 2 else image_HWC
    turned = turned[:, ::-1] if flip & 1 else turned
    return np.ascontiguousarray(turned.swapaxes(0, 1) if flip & 4 else turned)


@contextlib.contextmanager
def _opened(source: str | Path | bytes, name: str | None) -> Iterator[tuple[Any, str]]:
    """(the open rawpy.RawPy, the file's name for messages); LibRaw's errors become RawError."""
    label = name or ("RAW data" if isinstance(source, bytes) else str(source))
    if not isinstance(source, bytes) and not Path(source).is_file():
        raise RawError(f"{label}: no such file")
    try:
        opened = rawpy.imread(io.BytesIO(source) if isinstance(source, bytes) else str(source))
    except (rawpy.LibRawError, OSError) as error:
        raise RawError(f"{label}: cannot be read as RAW ({_reason(error)}); copy it again or exclude it") from error
    with opened as raw:
        try:
            _require_plausible_size(raw, label, source)
            yield raw, label
        except rawpy.LibRawError as error:
            raise RawError(f"{label}: damaged RAW ({_reason(error)}); copy it again or exclude it") from error


def _decode(raw: Any, label: str, head: bytes) -> RawImage:
    _require_bayer(raw, label)
    colours = raw.raw_colors_visible[:2, :2]
    names = bytes(raw.color_desc)
    origin = _rggb_origin(colours, names, label)
    mosaic = raw.raw_image_visible
    height, width = ((length - start) // 2 * 2 for length, start in zip(mosaic.shape, origin, strict=True))
    if min(height, width) < 2:
        raise RawError(f"{label}: visible area {mosaic.shape[1]}x{mosaic.shape[0]}, expected at least 4x4 pixels")
    _require_complete(mosaic[origin[0] : origin[0] + height, origin[1] : origin[1] + width], label)
    # Which of LibRaw's channels (0 R, 1 G, 2 B, 3 G2) stands at R, G1, G2, B of the block that starts at the origin.
    channels = [int(colours[(origin[0] + r) % 2, (origin[1] + c) % 2]) for r, c in _PLACES]
    black = _per_channel(raw.black_level_per_channel)[channels]
    white = float(raw.white_level)
    if not white > black.max():
        raise RawError(f"{label}: white level {white:g}, expected above the black level {black.max():g}")
    tags = read_exif(head)
    return RawImage(
        negative=Negative(
            mosaic_HW=mosaic.copy(),
            cfa="".join(chr(names[index]) for index in colours.ravel()),
            black_level=black,
            white_level=white,
            wb=_white_balance(raw, label)[channels],
            xyz_to_camera=_colour_matrix(raw, head, label),
        ),
        origin=origin,
        frame=_frame(raw.sizes),
        flip=int(raw.sizes.flip),
        camera=tags.camera or "unknown",
        iso=float(raw.other.iso_speed) or tags.iso,
        exposure_s=float(raw.other.shutter_speed) or tags.exposure_s,
        focal_mm=float(raw.other.focal_length) or tags.focal_mm,
    )


def _require_plausible_size(raw: Any, label: str, source: str | Path | bytes) -> None:
    """Before anything is allocated by what the header says."""
    width, height = raw.sizes.raw_width, raw.sizes.raw_height
    size = len(source) if isinstance(source, bytes) else Path(source).stat().st_size
    if width * height > min(_MAX_PIXELS, _MAX_PIXELS_PER_BYTE * size):
        raise RawError(f"{label}: declares {width}x{height} pixels in {size} bytes; copy it again or exclude it")


def _frame(sizes: Any) -> tuple[int, int, int, int]:
    """The camera's own crop (DNG's DefaultCrop and its like) where LibRaw tells a sane one."""
    top, left = sizes.crop_top_margin - sizes.top_margin, sizes.crop_left_margin - sizes.left_margin
    height, width = sizes.crop_height, sizes.crop_width
    inside = top >= 0 and left >= 0 and top + height <= sizes.height and left + width <= sizes.width
    if not inside or min(height / sizes.height, width / sizes.width) < _LEAST_CROP:
        return 0, 0, int(sizes.height), int(sizes.width)
    return int(top), int(left), int(height), int(width)


def _require_bayer(raw: Any, label: str) -> None:
    if raw.raw_type != rawpy.RawType.Flat or raw.raw_image is None:
        raise RawError(f"{label}: already demosaiced or layered (linear DNG, Foveon); {_NOT_BAYER}")
    try:
        pattern = raw.raw_pattern
    except NotImplementedError as error:  # rawpy's, for a number of LibRaw's that stands for no pattern
        raise RawError(f"{label}: colour pattern unknown ({error}); {_NOT_BAYER}") from error
    if pattern is None or raw.num_colors == 1:
        raise RawError(f"{label}: monochrome sensor; {_NOT_BAYER}")
    if pattern.shape != (2, 2):
        kind = "X-Trans" if pattern.shape == (6, 6) else f"{pattern.shape[0]}x{pattern.shape[1]}"
        raise RawError(f"{label}: {kind} colour pattern; {_NOT_BAYER}")
    if raw.sizes.pixel_aspect != 1.0 or (raw.sizes.iheight, raw.sizes.iwidth) != (raw.sizes.height, raw.sizes.width):
        raise RawError(f"{label}: sensor pixels are not square or not upright; {_NOT_BAYER}")


def _rggb_origin(colours: NDArray[Any], names: bytes, label: str) -> tuple[int, int]:
    letters = np.array([[chr(names[index]) for index in row] for row in colours])
    for row, col in _PLACES:
        if "".join(np.roll(letters, (-row, -col), (0, 1)).ravel()) == "RGGB":
            return row, col
    raise RawError(f"{label}: colour pattern {''.join(letters.ravel())}; {_NOT_BAYER}")


def _require_complete(mosaic: NDArray[Any], label: str) -> None:
    """LibRaw fills what a half-written file lacks with zeros and says nothing; no live sensor row is all zero."""
    if mosaic[-2:].any():
        return
    filled = np.flatnonzero(mosaic.any(axis=1))
    last = int(filled[-1]) + 1 if filled.size else 0
    raise RawError(f"{label}: data stops at row {last} of {len(mosaic)} (half-written?); copy it again or exclude it")


def _per_channel(values: Any) -> NDArray[np.float32]:
    """LibRaw's R, G, B, G2 as float32 (4,); its 0 for a G2 that the file does not give stands for "as G1"."""
    levels = np.zeros(4, np.float32)
    levels[: len(values)] = values[:4]
    if levels[3] == 0:
        levels[3] = levels[1]
    return levels


def _white_balance(raw: Any, label: str) -> NDArray[np.float32]:
    """(4,) gains R, G, B, G2 with green = 1: the camera's own; daylight from the colour matrix where it stored none."""
    for source in (raw.camera_whitebalance, raw.daylight_whitebalance):
        gains = _per_channel(source)
        if np.isfinite(gains).all() and (gains > 0).all():
            return (gains / gains[1]).astype(np.float32)
    raise RawError(f"{label}: no white balance in the file, expected gains for red, green and blue; exclude it")


def _colour_matrix(raw: Any, head: bytes, label: str) -> NDArray[np.float64] | None:
    """XYZ -> camera [3, 3] as LibRaw uses it: a DNG's own, else the one in LibRaw's table; None where neither is."""
    own, table = np.asarray(raw.color_matrix, np.float64)[:, :3], np.asarray(raw.rgb_xyz_matrix, np.float64)[:3]
    use_own = own.any() and _is_dng(head)
    if not use_own and not table.any():
        return None
    with contextlib.suppress(np.linalg.LinAlgError):
        matrix = xyz_to_camera_of(own) if use_own else table
        if np.isfinite(np.linalg.inv(matrix)).all():
            return matrix
    raise RawError(f"{label}: the colour matrix cannot be inverted; copy the file again or exclude it")


def _is_dng(head: bytes) -> bool:
    """Whether the file's first directory has the tag DNGVersion."""
    order: Literal["little", "big"] = "little" if head[:2] == b"II" else "big"
    first = int.from_bytes(head[4:8], order)
    count = int.from_bytes(head[first : first + 2], order)
    entries = range(first + 2, first + 2 + 12 * count, 12)
    return any(int.from_bytes(head[at : at + 2], order) == _DNG_VERSION for at in entries)


def _head(source: str | Path | bytes) -> bytes:
    """The file's first megabyte, which holds its tags."""
    if isinstance(source, bytes):
        return source[: 1 << 20]
    with Path(source).open("rb") as file:
        return file.read(1 << 20)


def _reason(error: Exception) -> str:
    if isinstance(error, rawpy.LibRawIOError):
        return "the file ends early"
    text = error.args[0] if error.args else error
    return (text.decode(errors="replace") if isinstance(text, bytes) else str(text)).strip() or type(error).__name__

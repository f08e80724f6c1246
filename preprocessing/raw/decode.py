"""Decodes a Bayer RAW file: sensor counts in RGGB order, levels, white balance, and LibRaw's rendering.

Training and users share this decoder and this rendering, so a user's RAW is processed exactly like training RAW.
Shapes: h, w are packed pixels (one 2x2 RGGB block each); the mosaic and the rendering are 2h x 2w.

Where each value is read from the file:
    black levels, white level       _black_levels (dng_levels.py), _white_level
    white balance, colour matrix    _white_balance (white_balance.py), _colour_matrix
    colour pattern (RGGB phase)     rggb_origin (checks.py)
    the camera's crop               _camera_crop
    camera, ISO, exposure, focal    _read_image, from LibRaw or else from EXIF (exif.py)
"""

import contextlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import rawpy
from numpy.typing import NDArray

from preprocessing.colour import RenderingCurve, srgb_to_camera
from preprocessing.raw.checks import (
    BLOCK,
    COPY_OR_EXCLUDE,
    RawError,
    require_bayer,
    require_complete,
    require_plausible_size,
    rggb_origin,
    whole_blocks,
)
from preprocessing.raw.dng_levels import black_pattern, by_place
from preprocessing.raw.exif import read_exif
from preprocessing.raw.rendering import SensorData, xyz_to_camera_from_libraw
from preprocessing.raw.white_balance import gains_from_preview

__all__ = ["RawError", "RawImage", "declared_size", "load", "render", "upright"]

WbSource = Literal["camera", "preview", "daylight"]
MatrixSource = Literal["file", "libraw", "none"]

_LIGHT_PX = 1000
"""Least number of mosaic rows that are enough to compare with a preview."""
_MIN_CROP = 0.8
"""A crop that the file declares must keep at least this share of each side. A smaller one (a crop mode, or a misread
tag) is ignored."""
_DNG_VERSION = 50706


@dataclass(frozen=True)
class RawImage:
    """One decoded RAW frame in the sensor's orientation. Per-channel values are in the order R, G1, G2, B.

    Its area is LibRaw's visible area. If that starts on another colour than red, its first row, first column or both
    are dropped, so that the phase is always RGGB.
    """

    sensor: SensorData
    """The counts of LibRaw's whole visible area with their levels, white balance and colour matrix."""
    origin: tuple[int, int]
    """(row, col) of this area's first pixel in LibRaw's visible area, mosaic pixels, each 0 or 1."""
    camera_crop: tuple[int, int, int, int]
    """(top, left, height, width): the crop that the file declares (DNG: DefaultCrop), in coordinates of LibRaw's
    visible area; the whole area if none is declared. The camera's JPG has the same centre."""
    flip: int
    """LibRaw's sizes.flip: how a viewer turns the picture; see `upright`."""
    camera: str
    """Make and model, or "unknown"."""
    iso: float | None
    exposure_s: float | None
    focal_mm: float | None
    wb_source: WbSource = "camera"
    """camera: gains in the file; preview: estimated from the embedded preview; daylight: LibRaw's for this camera, or
    none at all if it is unknown."""
    matrix_source: MatrixSource = "file"
    """file: in the DNG; libraw: LibRaw's for this camera; none: colours stay as the sensor measured them."""

    @property
    def remarks(self) -> tuple[str, ...]:
        """What a user should know about the colours, one line each; () if the file states them."""
        found = []
        if self.wb_source != "camera":
            used = {"preview": "estimated from the embedded preview", "daylight": "that of daylight is used"}
            found.append(f"no white balance in the file; {used[self.wb_source]}")
        if self.matrix_source == "none":
            found.append("no colour matrix for this camera; colours stay as the sensor measured them, too grey")
        return tuple(found)

    @property
    def size(self) -> tuple[int, int]:
        """(h, w) of the area, packed pixels."""
        (height, width), (top, left) = self.visible_size, self.origin
        return (height - top) // 2, (width - left) // 2

    @property
    def visible_size(self) -> tuple[int, int]:
        """(height, width) of LibRaw's visible area, mosaic pixels."""
        return self.sensor.mosaic_HW.shape[0], self.sensor.mosaic_HW.shape[1]

    @property
    def black_level(self) -> NDArray[np.float32]:
        """(4,) counts."""
        return self.sensor.black_level

    @property
    def white_level(self) -> float:
        """Counts at which the sensor clips."""
        return self.sensor.white_level

    @property
    def wb(self) -> NDArray[np.float32]:
        """(4,) gains of the file's white balance, green = 1."""
        return self.sensor.wb

    @property
    def packed(self) -> NDArray[np.uint16]:
        """[4, h, w] sensor counts of the whole area, not normalised; computed on each access."""
        return self.counts(0, 0, *self.size)

    @property
    def rendering(self) -> NDArray[np.uint8]:
        """[2h, 2w, 3] LibRaw's rendering of the whole area, sRGB in [0, 255]; computed on each access."""
        return self.render(0, 0, *self.size)

    def counts(self, top: int, left: int, height: int, width: int) -> NDArray[np.uint16]:
        """[4, height, width] counts of a window given in packed pixels."""
        first_row, first_col = self.origin[0] + 2 * top, self.origin[1] + 2 * left
        mosaic = self.sensor.mosaic_HW[first_row : first_row + 2 * height, first_col : first_col + 2 * width]
        return np.stack([mosaic[row::2, col::2] for row, col in BLOCK])

    def render(self, top: int, left: int, height: int, width: int) -> NDArray[np.uint8]:
        """[2 height, 2 width, 3] rendering of a window given in packed pixels. It equals that part of `rendering`, but
        only the window is computed."""
        return self.sensor.render(self.origin[0] + 2 * top, self.origin[1] + 2 * left, 2 * height, 2 * width)


def load(source: str | Path | bytes, *, name: str | None = None, curve: RenderingCurve = "srgb") -> RawImage:
    """Decode a RAW file, given as a local path or as its bytes.

    Args:
        name: for messages.
        curve: encodes the rendering. A model takes renderings with the curve of its training
            (SDANConfig.rendering_curve).

    Raises RawError, one line, for a missing, unknown, truncated or corrupt file and for data that is not a Bayer mosaic
    (X-Trans, monochrome, Foveon, linear DNG).
    """
    with _opened(source, name) as (raw, label):
        try:
            with _stream(source) as file:
                levels = black_pattern(file)
        except ValueError as error:
            raise RawError(f"{label}: {error}; {COPY_OR_EXCLUDE}") from error
        return _read_image(raw, label, _first_megabyte(source), curve, levels)


def declared_size(source: str | Path | bytes, *, name: str | None = None) -> tuple[int, int]:
    """(height, width) of LibRaw's visible area, from the file's head: nothing is decoded. Raises RawError."""
    with _opened(source, name) as (raw, _):
        return int(raw.sizes.height), int(raw.sizes.width)


def embedded_jpg(source: str | Path | bytes, *, name: str | None = None) -> tuple[bytes | None, int]:
    """(the preview in a RAW file, None if there is no JPG; how a viewer turns the RAW, as `upright` takes it).

    Raises RawError.
    """
    with _opened(source, name) as (raw, _):
        return _preview(raw), int(raw.sizes.flip)


def render(source: str | Path | bytes, *, name: str | None = None, curve: RenderingCurve = "srgb") -> NDArray[np.uint8]:
    """LibRaw's rendering of the camera's crop: uint8 [H, W, 3], sensor's orientation.

    Used as the picture of a RAW without a camera JPG. Raises RawError as `load` does.
    """
    image = load(source, name=name, curve=curve)
    return image.sensor.render(*image.camera_crop)


def upright(image_HWC: NDArray[Any], flip: int) -> NDArray[Any]:
    """`image_HWC` turned for the viewer. `flip` is LibRaw's bit mask: 2 reverses the rows, 1 the columns, then 4
    transposes (3 = half turn, 5 = quarter turn left, 6 = quarter turn right)."""
    turned = image_HWC[::-1] if flip & 2 else image_HWC
    turned = turned[:, ::-1] if flip & 1 else turned
    return np.ascontiguousarray(turned.swapaxes(0, 1) if flip & 4 else turned)


@contextlib.contextmanager
def _opened(source: str | Path | bytes, name: str | None) -> Iterator[tuple[Any, str]]:
    """Yield (the open rawpy.RawPy, the file's name for messages); LibRaw's errors become RawError."""
    label = name or ("RAW data" if isinstance(source, bytes) else str(source))
    if not isinstance(source, bytes) and not Path(source).is_file():
        raise RawError(f"{label}: expected a RAW file, got none; check the path")
    try:
        opened = rawpy.imread(io.BytesIO(source) if isinstance(source, bytes) else str(source))
    except (rawpy.LibRawError, OSError) as error:
        raise RawError(f"{label}: expected a RAW file, got {_reason(error)}; {COPY_OR_EXCLUDE}") from error
    with opened as raw:
        try:
            require_plausible_size(raw, label, source)
            yield raw, label
        except rawpy.LibRawError as error:
            raise RawError(f"{label}: expected intact RAW data, got {_reason(error)}; {COPY_OR_EXCLUDE}") from error


def _read_image(
    raw: Any, label: str, head: bytes, curve: RenderingCurve, levels: NDArray[np.float64] | None
) -> RawImage:
    """Everything that is read from the file. `head`: its first megabyte, for the tags; `levels`: its black levels."""
    require_bayer(raw, label)
    pattern = raw.raw_colors_visible[:2, :2]
    colour_names = bytes(raw.color_desc)
    origin = rggb_origin(pattern, colour_names, label)
    mosaic = raw.raw_image_visible
    blocks = whole_blocks(mosaic, origin, label)
    require_complete(blocks, label)
    # LibRaw's channel numbers (0 R, 1 G, 2 B, 3 G2) in our order R, G1, G2, B.
    channels = [int(pattern[(origin[0] + row) % 2, (origin[1] + col) % 2]) for row, col in BLOCK]
    black_levels = _black_levels(raw, channels, origin, levels, label)
    white_level = _white_level(raw, black_levels, label)
    tags = read_exif(head)
    matrix, matrix_source = _colour_matrix(raw, head, label)
    wb, wb_source = _white_balance(raw, channels, _Light(blocks, black_levels, white_level), matrix, label)
    return RawImage(
        sensor=SensorData(
            mosaic_HW=mosaic.copy(),
            cfa="".join(chr(colour_names[channel]) for channel in pattern.ravel()),
            black_level=black_levels,
            white_level=white_level,
            wb=wb,
            xyz_to_camera=matrix,
            curve=curve,
        ),
        origin=origin,
        camera_crop=_camera_crop(raw.sizes),
        flip=int(raw.sizes.flip),
        camera=tags.camera or "unknown",
        iso=float(raw.other.iso_speed) or tags.iso,
        exposure_s=float(raw.other.shutter_speed) or tags.exposure_s,
        focal_mm=float(raw.other.focal_length) or tags.focal_mm,
        wb_source=wb_source,
        matrix_source=matrix_source,
    )


def _black_levels(
    raw: Any, channels: list[int], origin: tuple[int, int], levels: NDArray[np.float64] | None, label: str
) -> NDArray[np.float32]:
    """(4,) counts, R G1 G2 B. LibRaw's, except for a DNG's pattern larger than 2x2, of which LibRaw gives the least."""
    if levels is None or max(levels.shape) <= 2:
        return _per_channel(raw.black_level_per_channel)[channels]
    places = by_place(levels)
    if places is None:
        pattern = f"{levels.shape[0]}x{levels.shape[1]} levels from {levels.min():g} to {levels.max():g}"
        raise RawError(f"{label}: expected one black level per colour, got {pattern}; exclude it")
    return np.array([places[(origin[0] + row) % 2, (origin[1] + col) % 2] for row, col in BLOCK], np.float32)


def _white_level(raw: Any, black_levels: NDArray[np.float32], label: str) -> float:
    """Counts at which the sensor clips."""
    white_level = float(raw.white_level)
    if not white_level > black_levels.max():
        raise RawError(
            f"{label}: expected a white level above the black level {black_levels.max():g}, got {white_level:g}; "
            f"{COPY_OR_EXCLUDE}"
        )
    return white_level


@dataclass(frozen=True)
class _Light:
    """The sensor's counts, whole RGGB blocks, with their levels."""

    mosaic_HW: NDArray[np.uint16]
    black_level: NDArray[np.float32]
    white_level: float

    def share(self) -> NDArray[np.float32]:
        """[4, h, w] R G1 G2 B from black 0 to white 1, of every block or, in a large picture, of some."""
        step = 2 * max(1, min(self.mosaic_HW.shape) // _LIGHT_PX)
        counts_4HW = np.stack([self.mosaic_HW[row::step, col::step] for row, col in BLOCK])
        span = (self.white_level - self.black_level).astype(np.float32)
        light = (counts_4HW - self.black_level[:, None, None]) / span[:, None, None]
        return np.asarray(np.clip(light, 0, 1), np.float32)


def _white_balance(
    raw: Any, channels: list[int], light: _Light, matrix: NDArray[np.float64] | None, label: str
) -> tuple[NDArray[np.float32], WbSource]:
    """((4,) gains R G1 G2 B with green = 1, where they are from): the camera's, else by the preview, else daylight."""
    gains = _gains(raw.camera_whitebalance)
    if gains is not None:
        return gains[channels], "camera"
    preview = _preview(raw)
    found = gains_from_preview(preview, light.share(), srgb_to_camera(matrix)) if preview else None
    if found is not None:
        return found, "preview"
    gains = _gains(raw.daylight_whitebalance)
    if gains is None:
        raise RawError(f"{label}: expected white-balance gains for red, green and blue, got none; exclude it")
    return gains[channels], "daylight"


def _gains(values: Any) -> NDArray[np.float32] | None:
    """(4,) in LibRaw's order with green 1; None if one is missing."""
    gains = _per_channel(values)
    known = np.isfinite(gains).all() and (gains > 0).all()
    return (gains / gains[1]).astype(np.float32) if known else None


def _preview(raw: Any) -> bytes | None:
    """The embedded JPG; None if there is none."""
    with contextlib.suppress(rawpy.LibRawError, OSError, ValueError):
        thumbnail = raw.extract_thumb()
        return bytes(thumbnail.data) if thumbnail.format == rawpy.ThumbFormat.JPEG else None
    return None


def _per_channel(values: Any) -> NDArray[np.float32]:
    """LibRaw's R, G, B, G2 as float32 (4,). LibRaw gives 0 for a G2 that the file does not state; use G's value."""
    levels = np.zeros(4, np.float32)
    levels[: len(values)] = values[:4]
    if levels[3] == 0:
        levels[3] = levels[1]
    return levels


def _colour_matrix(raw: Any, head: bytes, label: str) -> tuple[NDArray[np.float64] | None, MatrixSource]:
    """(XYZ -> camera [3, 3] as LibRaw uses it, its source): the one in a DNG, else LibRaw's for this camera."""
    in_file, in_libraw = np.asarray(raw.color_matrix, np.float64)[:, :3], np.asarray(raw.rgb_xyz_matrix, np.float64)[:3]
    use_file = in_file.any() and _is_dng(head)
    if not use_file and not in_libraw.any():
        return None, "none"
    with contextlib.suppress(np.linalg.LinAlgError):
        matrix = xyz_to_camera_from_libraw(in_file) if use_file else in_libraw
        if np.isfinite(np.linalg.inv(matrix)).all():
            return matrix, "file" if use_file else "libraw"
    raise RawError(f"{label}: expected an invertible colour matrix, got a singular one; {COPY_OR_EXCLUDE}")


def _camera_crop(sizes: Any) -> tuple[int, int, int, int]:
    """(top, left, height, width) of the camera's crop (DNG: DefaultCrop); the whole visible area if implausible."""
    top, left = sizes.crop_top_margin - sizes.top_margin, sizes.crop_left_margin - sizes.left_margin
    height, width = sizes.crop_height, sizes.crop_width
    inside = top >= 0 and left >= 0 and top + height <= sizes.height and left + width <= sizes.width
    if not inside or min(height / sizes.height, width / sizes.width) < _MIN_CROP:
        return 0, 0, int(sizes.height), int(sizes.width)
    return int(top), int(left), int(height), int(width)


def _is_dng(head: bytes) -> bool:
    """Whether the file's first directory has the tag DNGVersion."""
    order: Literal["little", "big"] = "little" if head[:2] == b"II" else "big"
    first = int.from_bytes(head[4:8], order)
    count = int.from_bytes(head[first : first + 2], order)
    entries = range(first + 2, first + 2 + 12 * count, 12)
    return any(int.from_bytes(head[at : at + 2], order) == _DNG_VERSION for at in entries)


@contextlib.contextmanager
def _stream(source: str | Path | bytes) -> Iterator[BinaryIO]:
    with io.BytesIO(source) if isinstance(source, bytes) else Path(source).open("rb") as file:
        yield file


def _first_megabyte(source: str | Path | bytes) -> bytes:
    """The part of the file that holds its tags."""
    if isinstance(source, bytes):
        return source[: 1 << 20]
    with Path(source).open("rb") as file:
        return file.read(1 << 20)


def _reason(error: Exception) -> str:
    if isinstance(error, rawpy.LibRawIOError):
        return "the file ends early"
    text = error.args[0] if error.args else error
    return (text.decode(errors="replace") if isinstance(text, bytes) else str(text)).strip() or type(error).__name__

"""Decode a Bayer RAW file: sensor counts with the phase always RGGB, levels, white balance, and LibRaw's one rendering.

Training and users share this decoder and this rendering, so what the network saw is what it is given.
Shapes: h, w are packed pixels (one RGGB block each); the mosaic and the rendering are 2h x 2w.
"""

import contextlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import rawpy
from numpy.typing import NDArray

from preprocessing.exif import read_exif

RENDER_OPTIONS = MappingProxyType(
    {
        "demosaic_algorithm": rawpy.DemosaicAlgorithm.AHD,
        "output_color": rawpy.ColorSpace.sRGB,
        "output_bps": 8,
        "gamma": (2.222, 4.5),
        "no_auto_bright": True,
        "bright": 1.0,
        "highlight_mode": rawpy.HighlightMode.Clip,
        "adjust_maximum_thr": 0.0,
        "user_flip": 0,
    }
)
"""LibRaw's options for the rendering: AHD demosaic, sRGB primaries, BT.709 curve, 8 bit, the file's own white balance
(given as user_wb), no automatic brightening, the file's white level and not the picture's maximum
(adjust_maximum_thr=0: else one bright pixel changes the whole rendering), the sensor's orientation (user_flip=0)."""

_NOT_BAYER = "SDAN needs the plain counts of a 2x2 Bayer sensor"


class RawError(ValueError):
    """A RAW file that cannot be used; the message is one line that says why."""


@dataclass(frozen=True)
class RawImage:
    """One decoded RAW frame in the sensor's orientation. Per-channel values are in the order R, G1, G2, B."""

    packed: NDArray[np.uint16]
    """[4, h, w] sensor counts, not normalised. Phase RGGB: the first row and/or column is dropped where the sensor
    starts on another colour."""
    black_level: NDArray[np.float32]
    """(4,) counts."""
    white_level: float
    """Counts at which the sensor clips."""
    wb: NDArray[np.float32]
    """(4,) gains of the file's white balance, green = 1."""
    rendering: NDArray[np.uint8]
    """[2h, 2w, 3] LibRaw's rendering of the same area, sRGB in [0, 255]."""
    origin: tuple[int, int]
    """(row, col) of this area's first pixel in LibRaw's visible area, mosaic pixels: 0 or 1 each."""
    visible_size: tuple[int, int]
    """(height, width) of LibRaw's visible area, mosaic pixels."""
    flip: int
    """LibRaw's sizes.flip: how a viewer turns the picture; see `upright`."""
    camera: str
    """Make and model, "unknown" when the file does not say."""
    iso: float | None
    exposure_s: float | None
    focal_mm: float | None


def load(source: str | Path | bytes, *, name: str | None = None) -> RawImage:
    """Decode the RAW file `source` (a local path, or the file's bytes; `name` then stands for it in messages).

    Raises RawError, one line, for a missing, unknown, truncated or corrupt file and for sensors that are not Bayer
    (X-Trans, monochrome, Foveon) or no longer are (linear DNG).
    """
    with _opened(source, name) as (raw, label):
        return _decode(raw, label, _head(source))


def render(source: str | Path | bytes, *, name: str | None = None) -> NDArray[np.uint8]:
    """LibRaw's rendering alone, of the whole visible area: uint8 [H, W, 3], sensor's orientation.

    The picture of a RAW that has no camera JPG beside it. Raises RawError as `load` does.
    """
    with _opened(source, name) as (raw, label):
        _require_bayer(raw, label)
        _require_complete(raw.raw_image_visible, label)
        return _render(raw, _white_balance(raw, label), label)


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
            yield raw, label
        except rawpy.LibRawError as error:
            raise RawError(f"{label}: damaged RAW ({_reason(error)}); copy it again or exclude it") from error


def _decode(raw: Any, label: str, head: bytes) -> RawImage:
    _require_bayer(raw, label)
    colours = raw.raw_colors_visible[:2, :2]
    origin = _rggb_origin(colours, bytes(raw.color_desc), label)
    mosaic = raw.raw_image_visible
    height, width = ((length - start) // 2 * 2 for length, start in zip(mosaic.shape, origin, strict=True))
    if min(height, width) < 2:
        raise RawError(f"{label}: visible area {mosaic.shape[1]}x{mosaic.shape[0]}, expected at least 4x4 pixels")
    rows, cols = slice(origin[0], origin[0] + height), slice(origin[1], origin[1] + width)
    mosaic = mosaic[rows, cols]
    _require_complete(mosaic, label)
    # Which of LibRaw's channels (0 R, 1 G, 2 B, 3 G2) stands at R, G1, G2, B of the block that starts at the origin.
    channels = [int(colours[(origin[0] + r) % 2, (origin[1] + c) % 2]) for r, c in ((0, 0), (0, 1), (1, 0), (1, 1))]
    black = _per_channel(raw.black_level_per_channel)[channels]
    white = float(raw.white_level)
    if not white > black.max():
        raise RawError(f"{label}: white level {white:g}, expected above the black level {black.max():g}")
    gains = _white_balance(raw, label)
    tags = read_exif(head)
    flip = int(raw.sizes.flip)  # before rendering, which sets it to its own user_flip
    return RawImage(
        packed=np.stack([mosaic[r::2, c::2] for r, c in ((0, 0), (0, 1), (1, 0), (1, 1))]),
        black_level=black,
        white_level=white,
        wb=gains[channels],
        rendering=_render(raw, gains, label)[rows, cols],
        origin=origin,
        visible_size=(int(raw.sizes.height), int(raw.sizes.width)),
        flip=flip,
        camera=tags.camera or "unknown",
        iso=float(raw.other.iso_speed) or tags.iso,
        exposure_s=float(raw.other.shutter_speed) or tags.exposure_s,
        focal_mm=float(raw.other.focal_length) or tags.focal_mm,
    )


def _require_bayer(raw: Any, label: str) -> None:
    if raw.raw_type != rawpy.RawType.Flat or raw.raw_image is None:
        raise RawError(f"{label}: already demosaiced or layered (linear DNG, Foveon); {_NOT_BAYER}")
    pattern = raw.raw_pattern
    if pattern is None or raw.num_colors == 1:
        raise RawError(f"{label}: monochrome sensor; {_NOT_BAYER}")
    if pattern.shape != (2, 2):
        kind = "X-Trans" if pattern.shape == (6, 6) else f"{pattern.shape[0]}x{pattern.shape[1]}"
        raise RawError(f"{label}: {kind} colour pattern; {_NOT_BAYER}")
    if raw.sizes.pixel_aspect != 1.0 or (raw.sizes.iheight, raw.sizes.iwidth) != (raw.sizes.height, raw.sizes.width):
        raise RawError(f"{label}: sensor pixels are not square or not upright; {_NOT_BAYER}")


def _rggb_origin(colours: NDArray[Any], names: bytes, label: str) -> tuple[int, int]:
    letters = np.array([[chr(names[index]) for index in row] for row in colours])
    for row, col in ((0, 0), (0, 1), (1, 0), (1, 1)):
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


def _render(raw: Any, gains: NDArray[np.float32], label: str) -> NDArray[np.uint8]:
    rendering = raw.postprocess(user_wb=[float(gain) for gain in gains], **RENDER_OPTIONS)
    expected = (raw.sizes.height, raw.sizes.width, 3)
    if rendering.shape != expected:
        raise RawError(f"{label}: rendering has shape {rendering.shape}, expected {expected}; {_NOT_BAYER}")
    return rendering


def _head(source: str | Path | bytes) -> bytes:
    if isinstance(source, bytes):
        return source
    with Path(source).open("rb") as file:
        return file.read(1 << 20)


def _reason(error: Exception) -> str:
    if isinstance(error, rawpy.LibRawIOError):
        return "the file ends early"
    text = error.args[0] if error.args else error
    return (text.decode(errors="replace") if isinstance(text, bytes) else str(text)).strip() or type(error).__name__

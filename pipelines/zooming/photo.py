"""Reads a photograph as a model's input.

RAW is decoded and rendered as in training. For a RAW model, a picture (JPG, PNG, ...) is converted to a synthetic
mosaic from its linearised pixels; an RGB model takes it directly.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from pipelines.formats import tags
from pipelines.formats.dng import Camera
from pipelines.zooming.like_camera import COMPARED_PX, camera_look
from pipelines.zooming.negative import camera_of
from pipelines.zooming.request import DEFAULTS, Output, ZoomError, available_memory, kind_of_photo, shown
from preprocessing.photometry.look import Look
from preprocessing.raw import decode
from preprocessing.raw.dng import cfa_channels
from preprocessing.raw.hot_pixels import without_defects
from preprocessing.raw.picture import declared_size, read_picture
from sdan import SDANConfig, raw_input

Window = tuple[int, int, int, int]
"""(top, left, height, width), pixels."""

_MARGIN_PX = 32
"""Pixels around a crop that the network sees, too."""
_BASE_BYTES, _BYTES_PER_PIXEL, _DECODED_BYTES = 700_000_000, 60, 16
"""Peak memory: torch with a model; per pixel that the network gets; per pixel that is only decoded. Measured for whole
photographs of 20 MP: JPG and PNG 64 bytes a pixel for packed input, 37 for RGB input; RAW 38."""
_HEAD_BYTES = 1 << 20


class TooLittleMemory(ZoomError):
    """A photograph that needs more memory than is free now."""


@dataclass(frozen=True)
class Photo:
    """A photograph as the network's input, upright."""

    raw: Tensor
    """[4, h, w] packed RAW in [0, 1]; for a model of RGB input the rendering itself."""
    rendering: Tensor
    """[3, 2h, 2w] in [0, 1], with the model's rendering curve; sRGB if input is rgb."""
    from_raw: bool
    window: Window
    """The part of `rendering` to enlarge; the rest is padding, or what lies around a crop."""
    notes: tuple[str, ...] = ()
    """What was done to it besides decoding."""
    grey: bool = False
    exif: Image.Exif = field(default_factory=Image.Exif)
    crop_factor: float = 1.0
    """The photograph's diagonal in units of that of the part to enlarge."""
    camera: Camera | None = None
    """Of RAW that is written as a DNG."""
    look: Look | None = None
    """Of the camera's JPG, if it is asked for."""

    def reduced(self, longest_px: int) -> NDArray[np.uint8]:
        """The window's rendering [h, w, 3], reduced to `longest_px` on its longer side if that is longer."""
        top, left, height, width = self.window
        planes = self.rendering[:, top : top + height, left : left + width].numpy()
        small = [_reduced(plane, longest_px) for plane in planes]
        return np.rint(255 * np.stack(small, axis=-1)).clip(0, 255).astype(np.uint8)


def _reduced(picture: NDArray[Any], longest_px: int) -> NDArray[Any]:
    height, width = picture.shape[:2]
    shrink = min(1.0, longest_px / max(height, width))
    size = max(1, round(shrink * width)), max(1, round(shrink * height))
    return np.asarray(cv2.resize(picture, size, interpolation=cv2.INTER_AREA))


def read_photo(path: Path, network: SDANConfig, output: Output = DEFAULTS) -> Photo:
    """Read RAW, JPG, PNG, TIFF, WebP or AVIF for a model of this config.

    Raises:
        ZoomError, RawError, PictureError: no such file, not a picture, not a Bayer RAW, or a crop outside the
            photograph.
        TooLittleMemory: more pixels than there is memory for (checked before it is taken).
    """
    if kind_of_photo(path) == "picture":
        return _from_picture(path, network, output)
    if network.is_rgb:
        raise ZoomError(
            f"{shown(path)}: expected a JPG or PNG for a model with RGB input, got RAW; pass the camera's JPG"
        )
    return _from_raw(path, network, output)


def _from_raw(path: Path, network: SDANConfig, output: Output) -> Photo:
    # LibRaw cannot open a name that is not UTF-8.
    source = path if _is_utf_8(path) else path.read_bytes()
    size = decode.declared_size(source, name=shown(path))
    _require_memory(path, size, output, turned=True)
    image = _repaired(decode.load(source, name=shown(path), curve=network.rendering_curve))
    crop_top, crop_left, crop_height, crop_width = image.camera_crop
    top, left = max(crop_top, 0), max(crop_left, 0)
    height = min(crop_top + crop_height, image.visible_size[0]) - top
    width = min(crop_left + crop_width, image.visible_size[1]) - left
    inner = _crop_as_stored(path, output, (height, width), image.flip)
    around, window = _around((top + inner[0], left + inner[1], *inner[2:]), image.visible_size)
    part, window = _turned(image, around, window)
    raw, rendering = raw_input.from_photo(part)
    with path.open("rb") as file:
        exif = tags.read(file.read(_HEAD_BYTES))
    photo = Photo(
        raw,
        rendering,
        True,
        window,
        image.remarks,
        exif=_completed(exif, image),
        crop_factor=math.hypot(height, width) / math.hypot(*inner[2:]),
        camera=camera_of(path, image) if output.format == "dng" else None,
    )
    if not output.like_camera:
        return photo
    if output.crop is None:
        small = photo.reduced(COMPARED_PX)
    else:  # a part may lack the tones to compare
        small = _reduced(decode.upright(image.sensor.render(top, left, height, width), image.flip), COMPARED_PX)
    return replace(photo, look=camera_look(path, source, small, network.rendering_curve))


def _repaired(image: decode.RawImage) -> decode.RawImage:
    """The RAW without hot and dead pixels."""
    sensor = image.sensor
    gains = sensor.wb[cfa_channels(sensor.cfa)].reshape(2, 2)
    mosaic, _ = without_defects(sensor.mosaic_HW, float(sensor.black_level.mean()), sensor.white_level, gains)
    return replace(image, sensor=replace(sensor, mosaic_HW=mosaic))


@dataclass(frozen=True)
class _Part:
    """A part of a RAW as `raw_input.from_photo` takes it, upright, of whole RGGB cells."""

    packed: NDArray[np.uint16]
    rendering: NDArray[np.uint8]
    black_level: NDArray[np.float32]
    white_level: float
    wb: NDArray[np.float32]


def _turned(image: decode.RawImage, around: Window, window: Window) -> tuple[_Part, Window]:
    """(the RAW within `around`, upright, and the place of `window` in it).

    Where the upright part does not start and end with whole cells, the RAW is continued by reflection about its outer
    pixels, which keeps the colours' places, and the rendering by its outer pixels, as bicubic enlargement does. Turning
    the input and not the output lets the output be written row by row.

    Args:
        around: even start, in LibRaw's visible area.
        window: in `around`.
    """
    top, left, height, width = around
    mosaic = image.sensor.mosaic_HW[top : top + height, left : left + width]
    place, (red_row, red_col) = window, image.origin
    if image.flip & 2:
        place, red_row = (height - place[0] - place[2], *place[1:]), (height - 1 - red_row) % 2
    if image.flip & 1:
        place, red_col = (place[0], width - place[1] - place[3], *place[2:]), (width - 1 - red_col) % 2
    channels = [0, 1, 2, 3]
    if image.flip & 4:
        place, (red_row, red_col) = (place[1], place[0], place[3], place[2]), (red_col, red_row)
        channels = [0, 2, 1, 3]  # the other green lies in the rows of red
        height, width = width, height
    cells = ((red_row, (height + red_row) % 2), (red_col, (width + red_col) % 2))
    mosaic = np.pad(decode.upright(mosaic, image.flip), cells, mode="reflect")
    rendering = decode.upright(image.sensor.render(*around), image.flip)
    part = _Part(
        np.stack([mosaic[row::2, col::2] for row in (0, 1) for col in (0, 1)]),
        np.pad(rendering, (*cells, (0, 0)), mode="edge"),
        image.black_level[channels],
        image.white_level,
        image.wb[channels],
    )
    return part, (place[0] + red_row, place[1] + red_col, *place[2:])


def _completed(exif: Image.Exif, image: decode.RawImage) -> Image.Exif:
    """The tags, with those that LibRaw found where the file has none that we can read."""
    shot = exif.get_ifd(0x8769)
    for tag, value in ((0x829A, image.exposure_s), (0x8827, image.iso and round(image.iso)), (0x920A, image.focal_mm)):
        if value and tag not in shot and tag not in exif:
            shot[tag] = value
    if 0x0110 not in exif and image.camera != "unknown":
        exif[0x0110] = image.camera
    return exif


def _from_picture(path: Path, network: SDANConfig, output: Output) -> Photo:
    data = path.read_bytes()
    size = declared_size(data, shown(path))
    _require_memory(path, size, output, turned=False)
    picture = read_picture(data, shown(path))
    pixels = picture.upright_HWC
    around, window = _around(_crop_as_stored(path, output, pixels.shape[:2], 0), pixels.shape[:2])
    top, left, height, width = around
    part: NDArray[Any] = pixels[top : top + height, left : left + width]
    if network.input != "rgb":  # whole cells of 2x2 pixels
        part = np.pad(part, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    levels = np.float32(np.iinfo(part.dtype).max)
    rendering = torch.from_numpy(np.divide(part, levels, dtype=np.float32)).permute(2, 0, 1).contiguous()
    crop_factor = math.hypot(*pixels.shape[:2]) / math.hypot(*window[2:])
    photo = Photo(rendering, rendering, False, window, picture.notes, picture.grey, tags.read(data), crop_factor)
    if network.is_rgb:
        return photo
    mosaic = raw_input.mosaic_from_srgb(rendering[None])[0]
    return replace(photo, raw=mosaic, rendering=raw_input.rendering_from_srgb(rendering, network.rendering_curve))


def _crop_as_stored(path: Path, output: Output, size: tuple[int, ...], flip: int) -> Window:
    """The asked crop in the stored orientation; all of it if none is asked. `size`: (height, width) as stored."""
    height, width = size
    if output.crop is None:
        return 0, 0, height, width
    left, top, wide, high = output.crop
    shown_height, shown_width = (width, height) if flip & 4 else (height, width)
    if left + wide > shown_width or top + high > shown_height:
        asked = ",".join(map(str, output.crop))
        raise ZoomError(
            f"{shown(path)}: expected a crop within {shown_width}x{shown_height} pixels, got --crop {asked}; change it"
        )
    if flip & 4:
        top, left, high, wide = left, top, wide, high
    left = width - left - wide if flip & 1 else left
    top = height - top - high if flip & 2 else top
    return top, left, high, wide


def _around(wanted: tuple[int, ...], size: tuple[int, ...]) -> tuple[Window, Window]:
    """(window with a margin, from even to even pixels where `size` allows; the wanted one's place in it)."""
    ranges = []
    for start, length, side in zip(wanted[:2], wanted[2:], size, strict=True):
        first = max(start - _MARGIN_PX, 0) // 2 * 2
        last = min((start + length + _MARGIN_PX + 1) // 2 * 2, side)
        ranges.append((first, last - first))
    (top, height), (left, width) = ranges
    return (top, left, height, width), (wanted[0] - top, wanted[1] - left, wanted[2], wanted[3])


def _require_memory(path: Path, size: tuple[int, int], output: Output, *, turned: bool) -> None:
    height, width = size
    pixels = height * width if output.crop is None else output.crop[2] * output.crop[3]
    need = _BASE_BYTES + _DECODED_BYTES * height * width + _BYTES_PER_PIXEL * pixels
    if turned:  # a few times the size of the RAW for its rendering
        need += _DECODED_BYTES * pixels
    have = available_memory()
    if have is not None and need > have:
        raise TooLittleMemory(
            f"{shown(path)}: expected {need / 1e9:.1f} GB of free memory for {width}x{height} pixels, "
            f"got {have / 1e9:.1f} GB; use --crop or reduce it"
        )


def _is_utf_8(path: Path) -> bool:
    try:
        os.fsencode(path).decode()
    except UnicodeDecodeError:
        return False
    return True

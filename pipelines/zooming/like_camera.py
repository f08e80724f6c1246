"""`sdan zoom --like-camera`: how the camera showed a RAW, from the JPG beside it or inside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from pipelines.zooming.request import ZoomError, shown
from preprocessing.colour import RenderingCurve
from preprocessing.photometry.look import Look, measure_look
from preprocessing.raw.decode import embedded_jpg, upright
from preprocessing.raw.picture import Picture, PictureError, read_picture
from preprocessing.registration.same_scene import MIN_SCORE, scene_score
from preprocessing.registration.shift import luminance

COMPARED_PX = 1024
"""Longer side at which JPG and rendering are compared: low frequencies, where sharpening and a lens's correction in the
JPG matter least."""
_MAX_ASPECT_CHANGE = 0.03
"""A JPG of another shape shows another area."""
_JPG = (".jpg", ".jpeg")


def camera_look(path: Path, source: Path | bytes, rendering_HW3: NDArray[np.uint8], curve: RenderingCurve) -> Look:
    """The look of the camera's JPG against the rendering.

    Args:
        path: the RAW's. A JPG of the same name beside it goes before the preview inside.
        source: its path or bytes, as the decoder takes it.
        rendering_HW3: of the whole photograph, upright, `COMPARED_PX` on its longer side.
        curve: the rendering's.

    Raises:
        ZoomError: no such JPG, one that shows another picture, or one without flat, unclipped areas to compare.
    """
    preview, flip = embedded_jpg(source, name=shown(path))
    beside = sorted(other for other in path.parent.glob("*") if _is_twin(other, path))
    data = beside[0].read_bytes() if beside else preview
    label = shown(beside[0]) if beside else f"{shown(path)}, its preview"
    if data is None:
        raise ZoomError(
            f"{shown(path)}: expected the camera's JPG beside it or a preview inside, got none; leave out --like-camera"
        )
    try:
        picture = read_picture(data, label, kinds=("JPG",))
    except PictureError as error:
        raise ZoomError(f"{error}; or leave out --like-camera") from error
    found = [jpg for turned in _turned(picture, flip) if (jpg := _same_picture(turned, rendering_HW3)) is not None]
    if not found:
        raise ZoomError(f"{label}: expected the same picture as the RAW, got another one; leave out --like-camera")
    look = measure_look(found[0], rendering_HW3, curve)
    if look is None:
        raise ZoomError(f"{label}: expected areas whose tones can be compared, got none; leave out --like-camera")
    return look


def _is_twin(other: Path, raw: Path) -> bool:
    return other.suffix.lower() in _JPG and other.stem.lower() == raw.stem.lower() and other.is_file()


def _turned(picture: Picture, flip: int) -> list[NDArray[Any]]:
    """The picture as its tags turn it and, without tags, as the RAW's do: many previews have none."""
    tagged = picture.upright_HWC
    return [tagged] if picture.orientation else [upright(picture.pixels_HWC, flip), tagged]


def _same_picture(jpg: NDArray[Any], rendering: NDArray[np.uint8]) -> NDArray[np.uint8] | None:
    """The JPG on the rendering's grid; None if it shows something else."""
    height, width = rendering.shape[:2]
    if abs(jpg.shape[1] / jpg.shape[0] * height / width - 1) > _MAX_ASPECT_CHANGE:
        return None
    resized = np.asarray(cv2.resize(jpg, (width, height), interpolation=cv2.INTER_AREA), np.uint8)
    return resized if scene_score(luminance(resized), luminance(rendering)) >= MIN_SCORE else None

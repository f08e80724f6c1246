"""White balance of a RAW file that does not state it: from the embedded preview, which the camera balanced."""

import io

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from preprocessing.colour import SRGB_BYTE_TO_LINEAR

_GRID = (36, 24)
"""(columns, rows) of the blocks in which preview and counts are compared."""
_NEUTRAL_SHARE = 0.25
"""The share of blocks, the least coloured ones, that gives the gains: tone curves leave grey grey."""
_MIN_BLOCKS = 8
_DARK, _BRIGHT = 0.01, 0.8
"""Linear light outside this range is too dark or too close to clipping."""
_MAX_ASPECT_CHANGE = 0.1
"""A preview of another shape shows another area."""
_GAIN_LIMITS = (0.2, 8.0)


def gains_from_preview(
    preview_jpg: bytes, light_4HW: NDArray[np.floating], srgb_to_camera_33: NDArray[np.float64]
) -> NDArray[np.float32] | None:
    """(4,) gains R, G1, G2, B with green 1; None if the preview is no picture of this frame or has no grey parts.

    Args:
        light_4HW: counts from black 0 to white 1, R G1 G2 B, in sensor orientation like the preview.
        srgb_to_camera_33: linear sRGB -> white-balanced camera colours (colour.srgb_to_camera).
    """
    try:
        with Image.open(io.BytesIO(preview_jpg), formats=("JPEG",)) as picture:
            preview = np.asarray(picture.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    height, width = light_4HW.shape[1:]
    if abs(preview.shape[1] / preview.shape[0] * height / width - 1) > _MAX_ASPECT_CHANGE or min(height, width) < 24:
        return None
    camera = np.stack([light_4HW[0], (light_4HW[1] + light_4HW[2]) / 2, light_4HW[3]], -1).astype(np.float32)
    counts = cv2.resize(camera, _GRID, interpolation=cv2.INTER_AREA).reshape(-1, 3)
    brightest = cv2.resize(camera.max(2), _GRID, interpolation=cv2.INTER_AREA).ravel()
    shown = cv2.resize(cv2.LUT(preview, SRGB_BYTE_TO_LINEAR), _GRID, interpolation=cv2.INTER_AREA).reshape(-1, 3)
    used = (brightest < _BRIGHT) & (counts.min(1) > 1e-4) & (shown.min(1) > _DARK) & (shown.max(1) < _BRIGHT)
    if used.sum() < _MIN_BLOCKS:
        return None
    counts, shown = counts[used], shown[used]
    colourful = (shown.max(1) - shown.min(1)) / shown.max(1)
    grey = colourful <= np.quantile(colourful, max(_NEUTRAL_SHARE, _MIN_BLOCKS / len(colourful)))
    ratio = (shown[grey] @ srgb_to_camera_33.T) / counts[grey]
    red, green, blue = np.median(ratio / ratio[:, 1:2], axis=0)
    if not all(_GAIN_LIMITS[0] < gain < _GAIN_LIMITS[1] for gain in (red, blue)):
        return None
    return np.array([red, green, green, blue], np.float32)

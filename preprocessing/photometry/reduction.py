"""Small versions of a picture, as programs make them that resize pictures: input and target for RGB networks.

A picture from the web or from a photo library has often been reduced: its edges are sharper, and its noise lower, than
a camera's JPG of that size has them. A network that has only seen cameras' JPGs does not know such pictures.
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

FILTERS = ("area", "bicubic", "lanczos", "linear")
"""The filters of common programs. linear does not average, so it aliases."""
BLUR = 0.5
"""Standard deviation of the largest blur before the reduction, in pixels of the small picture: a soft lens."""
SHARP_SHARE = 0.3
"""Share of pictures without blur."""
JPG_SHARE = 0.4
"""Share of small pictures that are then stored as JPG."""
JPG_QUALITY = (70, 98)


def reduced(picture_3HW: NDArray[np.uint8], scale: int, random: np.random.Generator) -> NDArray[np.uint8]:
    """The picture at 1/scale of its size, uint8 [3, H / scale, W / scale].

    Blur, filter and compression are drawn from `random`, always with the same number of draws.

    Args:
        picture_3HW: uint8 [3, H, W]; H and W are multiples of `scale`.
    """
    blurred, stored = random.random() >= SHARP_SHARE, random.random() < JPG_SHARE
    blur_px = scale * random.uniform(0.05, BLUR)
    name = FILTERS[int(random.integers(len(FILTERS)))]
    quality = int(random.integers(JPG_QUALITY[0], JPG_QUALITY[1] + 1))
    picture = np.ascontiguousarray(picture_3HW.transpose(1, 2, 0))
    if blurred:
        picture = np.asarray(cv2.GaussianBlur(picture, (0, 0), blur_px), np.uint8)
    small = _resized(picture, scale, name)
    if stored:
        _, buffer = cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, quality])
        small = np.asarray(cv2.imdecode(buffer, cv2.IMREAD_COLOR), np.uint8)
    return np.ascontiguousarray(small.transpose(2, 0, 1))


def _resized(picture_HW3: NDArray[np.uint8], scale: int, name: str) -> NDArray[np.uint8]:
    size = (picture_HW3.shape[1] // scale, picture_HW3.shape[0] // scale)
    if name in ("area", "linear"):
        how = cv2.INTER_AREA if name == "area" else cv2.INTER_LINEAR
        return np.asarray(cv2.resize(picture_HW3, size, interpolation=how), np.uint8)
    pillow = Image.Resampling.BICUBIC if name == "bicubic" else Image.Resampling.LANCZOS
    return np.asarray(Image.fromarray(picture_HW3).resize(size, pillow))

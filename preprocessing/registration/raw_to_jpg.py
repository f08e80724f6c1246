"""Registers a long-focal JPG to the short-focal RAW.

The short frame's JPG is not used: the camera may have corrected its distortion, its demosaicing and sharpening move
edges slightly, and the map that training needs starts at the mosaic.
"""

import numpy as np
from numpy.typing import NDArray

from preprocessing.colour import linear_to_gamma, srgb_to_camera
from preprocessing.raw.decode import RawImage
from preprocessing.registration.affine import Map, compose, footprint, translation
from preprocessing.registration.block_motion import mean_over_neighbours
from preprocessing.registration.lens import LensMap
from preprocessing.registration.register import MAX_SHIFT, RegistrationError, register
from preprocessing.registration.shift import Plane


def register_raw(raw: RawImage, long_HWC: NDArray[np.uint8], nominal: Map) -> LensMap:
    """The map from the LR mosaic (LibRaw's visible area) to the long picture's stored pixels.

    nominal: the same map from the focal lengths alone. Raises RegistrationError.
    """
    height, width = long_HWC.shape[:2]
    left, top, right, bottom = footprint(nominal, (height, width))
    reach = MAX_SHIFT * max(right - left, bottom - top)
    (row0, col0), (rows, cols) = raw.origin, raw.size
    first_col, first_row = max(0, int((left - reach - col0) // 2)), max(0, int((top - reach - row0) // 2))
    end_col, end_row = min(cols, int((right + reach - col0) // 2)), min(rows, int((bottom + reach - row0) // 2))
    if end_col <= first_col or end_row <= first_row:
        raise RegistrationError("shared area: expected overlapping pictures, got no overlap")
    counts = raw.counts(first_row, first_col, end_row - first_row, end_col - first_col)
    to_visible = translation(col0 + 2 * first_col, row0 + 2 * first_row)
    found = register(
        mosaic_luminance(counts, raw),
        long_HWC,
        compose(nominal, to_visible),
        camera_matrix=srgb_to_camera(raw.sensor.xyz_to_camera),
    )
    return found.after(translation(-to_visible[0, 2], -to_visible[1, 2]))


def mosaic_luminance(counts_4HW: NDArray[np.uint16], raw: RawImage) -> Plane:
    """[2H, 2W] in [0, 255] of packed counts: (R + 2 G + B) / 4 around each pixel, of any colour."""
    _, height, width = counts_4HW.shape
    span = raw.white_level - raw.black_level
    light = (counts_4HW - raw.black_level[:, None, None]) * (raw.wb / span)[:, None, None]
    mosaic = light.reshape(2, 2, height, width).transpose(2, 0, 3, 1).reshape(2 * height, 2 * width)
    return linear_to_gamma(np.clip(mean_over_neighbours(mosaic.astype(np.float32)), 0, 1))

"""The "aligned" target of an evaluation: the long-focal picture, registered to the input and resampled on its grid.

It is never registered to a model's output, so all models are judged against the same picture.
"""

import cv2
import numpy as np
from numpy.typing import NDArray

from preprocessing.registration.affine import apply, compose, scaling
from preprocessing.registration.register import RegistrationError, register
from preprocessing.registration.shift import luminance

_EDGE_PX = 2
"""Target pixels within this distance of the source's border are invalid: their Lanczos window reaches outside."""


def align_to(
    hr_3HW: NDArray[np.uint8], lr_3HW: NDArray[np.uint8], scale: int
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Register `hr` to `lr` and resample it on the grid of `lr` enlarged by `scale` (s).

    Args:
        hr_3HW: uint8 [3, s h, s w], the target as shot.
        lr_3HW: uint8 [3, h, w], the camera JPG of the input's frame.

    Returns:
        (uint8 [3, s h, s w], bool [s h, s w]): the target in the input's view, and where it is valid. If the two cannot
        be registered, `hr` unchanged and False everywhere.
    """
    target = np.ascontiguousarray(hr_3HW.transpose(1, 2, 0))
    height, width = target.shape[:2]
    try:
        found = register(
            luminance(np.ascontiguousarray(lr_3HW.transpose(1, 2, 0))),
            target,
            scaling(scale),
            lens=False,
        )
    except RegistrationError:
        return hr_3HW, np.zeros((height, width), np.bool_)
    mapping = compose(found.affine, scaling(1 / scale))
    y, x = np.mgrid[:height, :width] + 0.5
    points = apply(mapping, np.stack((x.ravel(), y.ravel()), axis=1)).reshape(height, width, 2) - 0.5
    map_x, map_y = points[..., 0].astype(np.float32), points[..., 1].astype(np.float32)
    aligned = cv2.remap(target, map_x, map_y, cv2.INTER_LANCZOS4, borderMode=cv2.BORDER_REPLICATE)
    inside = (points >= _EDGE_PX) & (points <= np.array([width, height]) - 1 - _EDGE_PX)
    valid: NDArray[np.bool_] = np.logical_and(inside[..., 0], inside[..., 1])
    return np.ascontiguousarray(aligned.transpose(2, 0, 1), np.uint8), valid

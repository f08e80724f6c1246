"""Tells pairs of one scene from pairs that show different things, without registering them."""

import cv2
import numpy as np

from preprocessing.registration.register import MAX_SHIFT
from preprocessing.registration.shift import Plane

_SIDES_PX = (32, 64, 128)
"""Shorter sides at which the pictures are compared. Coarse ones tolerate rotation and a wrong focal length, fine ones
have more detail to tell scenes apart."""
_FLAT = 0.2
"""Standard deviation of local detail below which a picture counts as flat: about half a level of 255."""
MIN_SCORE = 0.65
"""Below this score, and if registration fails too, a pair counts as two different scenes. Simulated pairs of all
presets score 0.89 or more, pairs of two scenes, turned pictures and wrong focal lengths 0.57 or less."""


def scene_score(first: Plane, second: Plane) -> float:
    """How well two luminance planes [H, W] of nominally the same area match: about 1 for the same scene.

    The best normalised cross-correlation of local contrast over shifts of up to `MAX_SHIFT` of the longer side, and
    over several resolutions. Exposure, tone curve and vignetting do not affect it. NaN if both pictures are flat, or
    too small to compare.
    """
    scores = [score for side in _SIDES_PX if np.isfinite(score := _score_at(first, second, side))]
    return max(scores) if scores else float("nan")


def _score_at(first: Plane, second: Plane, side_px: int) -> float:
    height, width = first.shape
    shrink = side_px / min(height, width)
    if shrink > 1:
        return float("nan")
    size = (round(width * shrink), round(height * shrink))
    details = [_detail(cv2.resize(plane, size, interpolation=cv2.INTER_AREA), side_px / 8) for plane in (first, second)]
    reach = min(int(np.ceil(MAX_SHIFT * max(size))), min(size) // 3)
    template = np.ascontiguousarray(details[1][reach:-reach, reach:-reach])
    contrast = sorted((float(details[0].std()), float(template.std())))
    if contrast[1] < _FLAT:
        return float("nan")
    if contrast[0] < 1e-3 * _FLAT:
        return 0.0  # OpenCV calls a constant picture a perfect match
    return float(cv2.matchTemplate(details[0], template, cv2.TM_CCOEFF_NORMED).max())


def _detail(plane: np.ndarray, neighbourhood_px: float) -> Plane:
    """The plane minus its local mean, divided by its local contrast."""
    high = plane - cv2.GaussianBlur(plane, (0, 0), neighbourhood_px)
    contrast = np.sqrt(cv2.GaussianBlur(high * high, (0, 0), neighbourhood_px))
    return np.asarray(high / (contrast + 2.0), np.float32)

"""Compares two pictures of the same size: luminance, local contrast, correlation, and the shift between them."""

from functools import lru_cache

import cv2
import numpy as np
from numpy.typing import NDArray

Plane = NDArray[np.float32]

_NEIGHBOURHOOD_PX = 8.0
_WINDOW_PX = (49, 49)
"""Three standard deviations on each side; OpenCV's default is four."""
_MIN_OVERLAP_PX = 8
"""Smallest side of the area that two shifted tiles share."""
_MIN_CORRELATION = 0.25
_CONVERGED_PX = 2e-2


def luminance(image_HWC: NDArray[np.uint8]) -> Plane:
    """[H, W] float32 in [0, 255] of an RGB picture."""
    return np.asarray(cv2.cvtColor(image_HWC, cv2.COLOR_RGB2GRAY), np.float32)


def local_detail(plane: Plane) -> Plane:
    """The plane minus its local mean, divided by its local contrast, so that exposure and vignetting cancel."""
    high = plane - cv2.GaussianBlur(plane, _WINDOW_PX, _NEIGHBOURHOOD_PX)
    contrast = np.sqrt(cv2.GaussianBlur(high * high, _WINDOW_PX, _NEIGHBOURHOOD_PX))
    return np.asarray(high / (contrast + 2.0), np.float32)  # + 2 of 255 keeps noise small


def correlation(a: NDArray[np.floating], b: NDArray[np.floating]) -> float:
    """Pearson's correlation of two equal-sized planes; NaN where either is flat."""
    x, y = a - a.mean(dtype=np.float64).astype(a.dtype), b - b.mean(dtype=np.float64).astype(b.dtype)
    norm = float(np.sqrt(np.vdot(x, x) * np.vdot(y, y)))
    return float(np.vdot(x, y) / norm) if norm > 1e-6 * x.size else float("nan")


def measure_shift(reference: Plane, moving: Plane) -> tuple[float, float]:
    """(dy, dx) in pixels such that `moving` at p + shift shows what `reference` shows at p; (NaN, NaN) if unmeasurable.

    Both planes come from `local_detail`. Phase correlation finds shifts up to a quarter of the side; Gauss-Newton steps
    refine them to about 0.05 px.
    """
    dy, dx = _phase_shift(reference, moving)
    if not np.isfinite(dy):
        return dy, dx
    found = np.array([dx, dy])
    for _ in range(6):
        fixed, warped = _overlap(reference, moving, found)
        if min(fixed.shape) < _MIN_OVERLAP_PX:
            return float("nan"), float("nan")
        gain, bias = _gain(fixed, warped)
        residual = (fixed - gain * warped - bias).ravel()
        jacobian = gain * np.stack([gradient.ravel() for gradient in _gradients(warped)])
        normal = (jacobian @ jacobian.T).astype(np.float64)
        step = np.linalg.solve(normal + (1e-9 * np.trace(normal) + 1e-30) * np.eye(2), jacobian @ residual)
        found = found + np.clip(step, -1, 1)
        if np.abs(step).max() < _CONVERGED_PX:
            break
    fixed, warped = _overlap(reference, moving, found)
    score = correlation(fixed, warped) if min(fixed.shape) >= _MIN_OVERLAP_PX else float("nan")
    if not score >= _MIN_CORRELATION or np.abs(found - [dx, dy]).max() > 2:
        return float("nan"), float("nan")
    return float(found[1]), float(found[0])


def _overlap(reference: Plane, moving: Plane, shift_xy: NDArray[np.float64]) -> tuple[Plane, Plane]:
    """The part of `reference` that the shifted `moving` covers, and `moving` resampled there (separable bicubic)."""
    height, width = reference.shape
    (col, row), (right, down) = np.floor(shift_xy).astype(int), shift_xy - np.floor(shift_xy)
    top, left = max(0, 1 - row), max(0, 1 - col)
    bottom, end = min(height, height - 2 - row), min(width, width - 2 - col)
    if bottom <= top or end <= left:
        return reference[:0, :0], reference[:0, :0]
    source = moving[top + row - 1 : bottom + row + 2, left + col - 1 : end + col + 2]
    shifted = cv2.sepFilter2D(source, cv2.CV_32F, _cubic(float(right)), _cubic(float(down)), anchor=(1, 1))
    return reference[top:bottom, left:end], np.asarray(shifted[1:-2, 1:-2], np.float32)


def _cubic(fraction: float) -> NDArray[np.float32]:
    """Weights of the pixels at -1, 0, 1, 2 for the value at `fraction`: Keys' cubic with a = -0.5, which reproduces
    ramps (OpenCV's a = -0.75 is up to 0.05 px off)."""
    x = np.abs(np.array([-1, 0, 1, 2]) - fraction)
    a = -0.5
    near, far = ((a + 2) * x - (a + 3)) * x * x + 1, ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return np.where(x <= 1, near, far).astype(np.float32)


def _phase_shift(reference: Plane, moving: Plane) -> tuple[float, float]:
    height, width = reference.shape
    (dx, dy), response = cv2.phaseCorrelate(reference, moving, _hanning(height, width))
    if response <= 0 or not np.isfinite((dx, dy)).all():
        return float("nan"), float("nan")
    return float(dy), float(dx)


@lru_cache(maxsize=8)
def _hanning(height: int, width: int) -> Plane:
    return np.asarray(cv2.createHanningWindow((width, height), cv2.CV_32F), np.float32)


def _gradients(plane: Plane) -> tuple[Plane, Plane]:
    """(d/dx, d/dy)"""
    x = cv2.Sobel(plane, cv2.CV_32F, 1, 0, ksize=3, scale=1 / 8)
    y = cv2.Sobel(plane, cv2.CV_32F, 0, 1, ksize=3, scale=1 / 8)
    return np.asarray(x, np.float32), np.asarray(y, np.float32)


def _gain(a: Plane, b: Plane) -> tuple[float, float]:
    """(gain, bias) of the least-squares fit a = gain b + bias."""
    mean_a, mean_b = float(a.mean()), float(b.mean())
    about = b - mean_b
    gain = float(np.vdot(a, about)) / max(float(np.vdot(about, about)), 1e-9 * about.size)
    gain = float(np.clip(gain, 0.2, 5.0))  # far from the match the gain is near 0, which would stop the steps
    return gain, mean_a - gain * mean_b

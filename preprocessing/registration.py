"""Register two pictures of one scene: a coarse-to-fine affine that exposure, colour and vignetting do not disturb, the
shift that is left, and the correlation.

Pictures here are luminance, float32 [H, W], on one grid: the camera JPG of the short focal length, and the long one
brought to the same resolution by the focal lengths. Maps as in geometry.py.
"""

from functools import lru_cache

import cv2
import numpy as np
from numpy.typing import NDArray

from preprocessing.geometry import Map, compose, translation

Plane = NDArray[np.float32]

_NEIGHBOURHOOD_PX = 8.0
_MIN_SIDE_PX = 32
_MAX_STEPS = 40
_CONVERGED_PX = 1e-3
_OUTLIER = 2.5
"""Smoothed residuals above so many medians count as another motion. They vary little, so the limit can be close."""
_MIN_TILE_CORRELATION = 0.25
_MIN_OVERLAP_PX = 8
"""Least side of what two tiles share when one is shifted."""
MIN_CORRELATION = 0.4
"""Below this correlation of local detail two pictures are not held to show the same thing."""
MAX_SCALE_CHANGE = 0.08
"""Largest departure of the affine's linear part from the identity (EXIF focal lengths are rounded, lenses breathe)."""
MAX_SHIFT = 0.15
"""Largest shift at the centre, as a part of the picture's longer side."""


class RegistrationError(ValueError):
    """Two pictures could not be registered; the message is one line that says why."""


def luminance(image_HWC: NDArray[np.uint8]) -> Plane:
    """[H, W] float32 in [0, 255] of an RGB picture."""
    return cv2.cvtColor(image_HWC, cv2.COLOR_RGB2GRAY).astype(np.float32)


def local_detail(plane: Plane) -> Plane:
    """What stands out from its neighbourhood, in units of its contrast there: free of exposure and vignetting."""
    high = plane - cv2.GaussianBlur(plane, (0, 0), _NEIGHBOURHOOD_PX)
    contrast = np.sqrt(cv2.GaussianBlur(high * high, (0, 0), _NEIGHBOURHOOD_PX))
    return np.asarray(high / (contrast + 2.0), np.float32)  # 2 of 255: do not raise noise to the rank of detail


def correlation(a: NDArray[np.floating], b: NDArray[np.floating]) -> float:
    """Pearson's correlation of two equal-sized planes; NaN where either is flat."""
    x, y = a.astype(np.float64) - a.mean(dtype=np.float64), b.astype(np.float64) - b.mean(dtype=np.float64)
    norm = float(np.sqrt((x * x).sum() * (y * y).sum()))
    return float((x * y).sum() / norm) if norm > 1e-6 * x.size else float("nan")


def measure_shift(reference: Plane, moving: Plane) -> tuple[float, float]:
    """(dy, dx) in pixels: what `reference` shows at p, `moving` shows at p + shift. (NaN, NaN) where not measurable.

    Both as `local_detail` returns them. Phase correlation finds shifts up to a quarter of the side, Gauss-Newton steps
    make them good to about 0.05 px.
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
        if np.abs(step).max() < 5e-3:
            break
    fixed, warped = _overlap(reference, moving, found)
    alike = correlation(fixed, warped) if min(fixed.shape) >= _MIN_OVERLAP_PX else float("nan")
    if not alike >= _MIN_TILE_CORRELATION or np.abs(found - [dx, dy]).max() > 2:
        return float("nan"), float("nan")
    return float(found[1]), float(found[0])


def _overlap(reference: Plane, moving: Plane, shift_xy: NDArray[np.float64]) -> tuple[Plane, Plane]:
    """The part of `reference` that a shifted `moving` covers, and `moving` there (bicubic, by rows and columns)."""
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
    """Weights of the pixels at -1, 0, 1, 2 for the value at `fraction` (Keys' cubic, a = -0.75 as OpenCV has it)."""
    x = np.abs(np.array([-1, 0, 1, 2]) - fraction)
    a = -0.75
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


def register(reference: Plane, moving: Plane) -> Map:
    """The affine near the identity at which `moving` shows what `reference` shows: moving(map(p)) ~ reference(p).

    Phase correlation finds the shift; Gauss-Newton steps on local detail refine all six parameters from coarse to fine,
    with weights that leave out what moves on its own (foreground parallax). Raises RegistrationError when the pictures
    do not correlate or the affine is not one that a zoom lens and a hand could make.
    """
    if min(reference.shape) < _MIN_SIDE_PX:
        raise RegistrationError(
            f"shared area {reference.shape[1]}x{reference.shape[0]} px, expected at least {_MIN_SIDE_PX}"
        )
    fixed, floating = local_detail(reference), local_detail(moving)
    dy, dx = measure_shift(fixed, floating)
    mapping = translation(dx, dy) if np.isfinite(dx) else translation(0, 0)
    for level in reversed(range(_levels(reference.shape))):
        mapping = _refine(_shrink(fixed, level), _shrink(floating, level), mapping, 0.5**level)
    score = _aligned_correlation(fixed, floating, mapping)
    if not score >= MIN_CORRELATION:
        raise RegistrationError(f"correlation {score:.2f} after registration, expected at least {MIN_CORRELATION}")
    _require_plausible(mapping, reference.shape)
    return mapping


def _levels(shape: tuple[int, ...]) -> int:
    return int(np.clip(np.log2(min(shape) / 96) + 1, 1, 4))


def _shrink(plane: Plane, level: int) -> Plane:
    for _ in range(level):
        plane = np.asarray(cv2.pyrDown(plane), np.float32)
    return plane


def _refine(fixed: Plane, floating: Plane, mapping: Map, factor: float) -> Map:
    """Gauss-Newton for the affine between two planes that are `factor` times the full size (the map is full size)."""
    height, width = fixed.shape
    # cv2.pyrDown keeps pixel 2i: coarse pixel centres lie on fine pixel centres, so coordinates here are pixel indices.
    y, x = np.mgrid[:height, :width].astype(np.float32)
    scale = np.float32(2 / max(height, width))
    unit_x, unit_y = (x - width / 2) * scale, (y - height / 2) * scale
    local = _index_map(mapping, factor)
    for _ in range(_MAX_STEPS):
        warped = _warp(floating, local, (height, width))
        inside = _inside(local, (height, width))
        if inside.mean() < 0.25:
            raise RegistrationError("the pictures hardly overlap")
        grad_x, grad_y = _gradients(warped)
        gain, bias = _gain(fixed[inside], warped[inside])
        residual = np.asarray(fixed - gain * warped - bias, np.float32)
        weight = _robust_weight(residual, inside)
        columns = [gain * g * u for g in (grad_x, grad_y) for u in (unit_x, unit_y, np.float32(1))]
        jacobian = np.stack([column.ravel() for column in columns])
        weighted = jacobian * weight.ravel()
        normal = (weighted @ jacobian.T).astype(np.float64)
        right = (weighted @ residual.ravel()).astype(np.float64)
        try:
            step = np.linalg.solve(normal + 1e-9 * np.trace(normal) * np.eye(6), right)
        except np.linalg.LinAlgError as error:
            raise RegistrationError("no detail to register by") from error
        local = compose(local, _step_map(step, scale, (height, width)))
        if np.abs(step).sum() < _CONVERGED_PX:
            break
    return _full_map(local, factor)


def _step_map(step: NDArray[np.float64], scale: np.float32, size: tuple[int, int]) -> Map:
    """The small affine p -> p + step(p), of parameters on unit coordinates about the centre."""
    linear = np.array([[step[0], step[1]], [step[3], step[4]]]) * float(scale)
    centre = np.array([size[1] / 2, size[0] / 2])
    offset = np.array([step[2], step[5]]) - linear @ centre
    return np.concatenate([np.eye(2) + linear, offset[:, None]], axis=1)


def _index_map(mapping: Map, factor: float) -> Map:
    """A full-size map on continuous coordinates as one on pixel indices of planes shrunk by pyrDown."""
    to_index = translation(-0.5, -0.5)
    local = compose(to_index, compose(mapping, translation(0.5, 0.5)))
    return np.concatenate([local[:, :2], local[:, 2:] * factor], axis=1)


def _full_map(local: Map, factor: float) -> Map:
    full = np.concatenate([local[:, :2], local[:, 2:] / factor], axis=1)
    return compose(translation(0.5, 0.5), compose(full, translation(-0.5, -0.5)))


def _warp(plane: Plane, local: Map, size: tuple[int, int]) -> Plane:
    y, x = np.mgrid[: size[0], : size[1]].astype(np.float64)
    map_x = (local[0, 0] * x + local[0, 1] * y + local[0, 2]).astype(np.float32)
    map_y = (local[1, 0] * x + local[1, 1] * y + local[1, 2]).astype(np.float32)
    return np.asarray(cv2.remap(plane, map_x, map_y, cv2.INTER_CUBIC, borderMode=cv2.BORDER_CONSTANT), np.float32)


def _inside(local: Map, size: tuple[int, int]) -> NDArray[np.bool_]:
    """Where `_warp` by `local` sees nothing of the border."""
    ones = np.ones(size, np.float32)
    return np.asarray(_warp(ones, local, size) > 0.999)


def _gradients(plane: Plane) -> tuple[Plane, Plane]:
    """(d/dx, d/dy)"""
    x = cv2.Sobel(plane, cv2.CV_32F, 1, 0, ksize=3, scale=1 / 8)
    y = cv2.Sobel(plane, cv2.CV_32F, 0, 1, ksize=3, scale=1 / 8)
    return np.asarray(x, np.float32), np.asarray(y, np.float32)


def _gain(a: Plane, b: Plane) -> tuple[float, float]:
    """(gain, bias) by which b comes closest to a."""
    mean_a, mean_b = float(a.mean()), float(b.mean())
    gain = float(((a - mean_a) * (b - mean_b)).mean()) / max(float(((b - mean_b) ** 2).mean()), 1e-9)
    gain = float(np.clip(gain, 0.2, 5.0))  # before the pictures meet the fit is near 0 and would stop the steps
    return gain, mean_a - gain * mean_b


def _robust_weight(residual: Plane, inside: NDArray[np.bool_]) -> Plane:
    """Tukey's biweight on the residual, smoothed, so that whole regions that move on their own drop out."""
    size = cv2.GaussianBlur(np.abs(residual), (0, 0), 2.0)
    limit = _OUTLIER * max(float(np.median(size[inside])), 1e-3)
    return np.asarray(np.where(inside & (size < limit), (1 - (size / limit) ** 2) ** 2, 0), np.float32)


def _aligned_correlation(fixed: Plane, floating: Plane, mapping: Map) -> float:
    local = _index_map(mapping, 1.0)
    size = (fixed.shape[0], fixed.shape[1])
    inside = _inside(local, size)
    if inside.mean() < 0.25:
        return float("nan")
    return correlation(fixed[inside], _warp(floating, local, size)[inside])


def _require_plausible(mapping: Map, shape: tuple[int, ...]) -> None:
    height, width = shape
    change = float(np.abs(np.linalg.svd(mapping[:, :2] - np.eye(2), compute_uv=False)).max())
    shift = mapping @ np.array([width / 2, height / 2, 1]) - np.array([width / 2, height / 2])
    if change > MAX_SCALE_CHANGE or np.abs(shift).max() > MAX_SHIFT * max(height, width):
        raise RegistrationError(
            f"found a change of {change:.3f} in scale or angle and a shift of {np.abs(shift).max():.0f} px, "
            f"expected at most {MAX_SCALE_CHANGE} and {MAX_SHIFT * max(height, width):.0f} px"
        )

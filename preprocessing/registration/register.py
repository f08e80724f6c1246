"""Register two pictures of one scene: the map that a zoom lens and a hand made, found coarse to fine, undisturbed by
exposure, colour and vignetting; the shift that is left, and the correlation.

Maps as in geometry.py.
"""

from dataclasses import replace
from functools import lru_cache

import cv2
import numpy as np
from numpy.typing import NDArray

from preprocessing.registration.affine import Map, apply, compose, invert, translation
from preprocessing.registration.block_motion import Blocks, Fit, LongLight, LongPicture, fine_detail, fit
from preprocessing.registration.lens import LensMap

Plane = NDArray[np.float32]

_NEIGHBOURHOOD_PX = 8.0
_WINDOW_PX = (49, 49)
"""Three standard deviations each way; OpenCV would take four."""
_MIN_SIDE_PX = 32
_MIN_OVERLAP_PX = 8
"""Least side of what two tiles share when one is shifted."""
_COARSEST_PX = 60
"""The shorter side at the coarsest level, at least."""
_MAX_LEVELS = 5
_BLOCK_PX = 16
_MIN_BLOCKS = 12
_MAX_STEPS = 8
_CONVERGED_PX = 3e-3
_MIN_TILE_CORRELATION = 0.25
MIN_CORRELATION = 0.4
"""Below this correlation of fine detail two pictures are not held to show the same thing."""
MAX_ERROR_PX = 0.25
"""Largest standard error of the map, short-focal pixels."""
MAX_SCALE_CHANGE = 0.08
"""Largest departure of the affine's linear part from the identity (EXIF focal lengths are rounded, lenses breathe)."""
MAX_SHIFT = 0.15
"""Largest shift at the centre, as a part of the picture's longer side."""


class RegistrationError(ValueError):
    """Two pictures could not be registered; the message is one line that says why."""


def luminance(image_HWC: NDArray[np.uint8]) -> Plane:
    """[H, W] float32 in [0, 255] of an RGB picture."""
    return np.asarray(cv2.cvtColor(image_HWC, cv2.COLOR_RGB2GRAY), np.float32)


def local_detail(plane: Plane) -> Plane:
    """What stands out from its neighbourhood, in units of its contrast there: free of exposure and vignetting."""
    high = plane - cv2.GaussianBlur(plane, _WINDOW_PX, _NEIGHBOURHOOD_PX)
    contrast = np.sqrt(cv2.GaussianBlur(high * high, _WINDOW_PX, _NEIGHBOURHOOD_PX))
    return np.asarray(high / (contrast + 2.0), np.float32)  # 2 of 255: do not raise noise to the rank of detail


def correlation(a: NDArray[np.floating], b: NDArray[np.floating]) -> float:
    """Pearson's correlation of two equal-sized planes; NaN where either is flat."""
    x, y = a - a.mean(dtype=np.float64).astype(a.dtype), b - b.mean(dtype=np.float64).astype(b.dtype)
    norm = float(np.sqrt(np.vdot(x, x) * np.vdot(y, y)))
    return float(np.vdot(x, y) / norm) if norm > 1e-6 * x.size else float("nan")


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
        if np.abs(step).max() < 2e-2:  # the next would be far smaller
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
    """Weights of the pixels at -1, 0, 1, 2 for the value at `fraction`: Keys' cubic with a = -0.5, which keeps ramps
    (OpenCV's -0.75 is up to 0.05 px off)."""
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


def register(
    reference: Plane,
    moving_HWC: NDArray[np.uint8],
    nominal: Map,
    *,
    sensor: NDArray[np.float64] | None = None,
    lens: bool = True,
) -> LensMap:
    """The map near `nominal` at which `moving` shows what `reference` shows: moving(map(p)) ~ reference(p).

    A correlation of the coarsest pictures finds the shift; steps on the shifts of blocks refine affine, tilt and radial
    distortion from coarse to fine, each block by how well it knows, without those that move on their own.

    Args:
        reference: [H, W] in [0, 255], luminance of the short focal length, at its own density.
        moving_HWC: [H, W, 3] the long one, at its own density; all of the frame where `lens`.
        nominal: reference -> moving, a similarity, from the focal lengths.
        sensor: [3, 3] linear sRGB -> white-balanced sensor colours, where `reference` is an RGGB mosaic's luminance
            (alignment.py); None for that of a camera JPG.
        lens: whether there is more than an affine to find; needs the frame's centre in the middle of `moving_HWC`.

    Raises RegistrationError when the pictures do not correlate, do not say enough or move as no zoom lens and no hand
    would make them.
    """
    height, width = moving_HWC.shape[:2]
    zoom = float(np.sqrt(abs(np.linalg.det(nominal[:, :2]))))
    side = min(*reference.shape, height / zoom, width / zoom)
    if side < _MIN_SIDE_PX:
        raise RegistrationError(f"shared area {side:.0f} px wide or high, expected at least {_MIN_SIDE_PX}")
    light = LongLight.prepare(moving_HWC, nominal, sensor)
    centre = apply(invert(nominal), np.array([[width / 2, height / 2]]))[0]
    mapping = LensMap(translation(0, 0), centre, float(np.hypot(height, width)) / 2 / zoom)
    top = int(np.clip(np.log2(side / _COARSEST_PX), 0, _MAX_LEVELS))
    for level in range(top, -1, -1):
        shrink = 2.0**level
        size = (round(reference.shape[1] / shrink), round(reference.shape[0] / shrink))
        # (x, y) pixels of `reference` per pixel of this level, which need not divide it.
        step = np.array([reference.shape[1] / size[0], reference.shape[0] / size[1]])
        fixed = fine_detail(np.asarray(cv2.resize(reference, size, interpolation=cv2.INTER_AREA), np.float32))
        picture = LongPicture.of_level(light, shrink)
        if level == top:
            mapping = _coarse_shift(fixed, picture, mapping, step)
        mapping, found, score = _refine(fixed, picture, mapping, step, lens=lens and (level < top or top == 0))
    if not score >= MIN_CORRELATION:
        raise RegistrationError(f"correlation {score:.2f} after registration, expected at least {MIN_CORRELATION}")
    if not found.error_px <= MAX_ERROR_PX:
        raise RegistrationError(
            f"map known to {found.error_px:.2f} px, expected {MAX_ERROR_PX} or better: too little detail"
        )
    _require_plausible(mapping, reference.shape)
    return mapping.then(nominal)


def _coarse_shift(fixed: Plane, picture: LongPicture, mapping: LensMap, step: NDArray[np.float64]) -> LensMap:
    """Where the middle of the long-focal picture is found in the short-focal one: normalised cross-correlation."""
    height, width = fixed.shape
    planes, inside = picture.seen(mapping, _centres((0, 0, width, height), step))
    rows, cols = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    if rows.size < 8 or cols.size < 8:
        raise RegistrationError("the pictures do not overlap")
    first, size = np.array([rows[0], cols[0]]), np.array([np.ptp(rows) + 1, np.ptp(cols) + 1])
    reach = np.minimum(int(np.ceil(MAX_SHIFT * size.max())), size // 3)
    inner = first + reach
    outer = first + size - reach
    template = np.ascontiguousarray(planes[inner[0] : outer[0], inner[1] : outer[1], 0])
    low = np.maximum(inner - 2 * reach, 0)
    high = np.minimum(first + size + reach, [height, width])
    score = cv2.matchTemplate(
        np.ascontiguousarray(fixed[low[0] : high[0], low[1] : high[1]]), template, cv2.TM_CCOEFF_NORMED
    )
    if not np.isfinite(score).all() or template.std() < 1e-3:
        raise RegistrationError("no detail to register by")
    found = low + np.unravel_index(int(score.argmax()), score.shape)
    row, col = (inner - found) * step[::-1]
    return replace(mapping, affine=compose(translation(float(col), float(row)), mapping.affine))


def _refine(
    fixed: Plane, picture: LongPicture, mapping: LensMap, step: NDArray[np.float64], *, lens: bool
) -> tuple[LensMap, Fit, float]:
    """(map, how well it is known, correlation of detail) at one level."""
    box = _covered(fixed.shape, picture, mapping, step)
    side = _BLOCK_PX if min(box[2] - box[0], box[3] - box[1]) >= 6 * _BLOCK_PX else _BLOCK_PX // 2
    (columns, left_over), (rows, over) = divmod(box[2] - box[0], side), divmod(box[3] - box[1], side)
    left, top = box[0] + left_over // 2, box[1] + over // 2
    right, bottom = left + columns * side, top + rows * side
    if right - left < 4 * side or bottom - top < 4 * side:
        raise RegistrationError("the pictures hardly overlap")
    at, part = _centres((left, top, right, bottom), step), np.ascontiguousarray(fixed[top:bottom, left:right])
    px = float(step.mean())
    for _ in range(_MAX_STEPS):
        seen = picture.seen(mapping, at)
        blocks = Blocks.measure(part, seen, at, side)
        if len(blocks.cover_N) < _MIN_BLOCKS:
            raise RegistrationError("the pictures hardly overlap")
        found = fit(blocks, mapping, px=px, lens=lens)
        mapping = mapping.moved(found.step)
        if np.abs(mapping.slopes(blocks.centre_N2) @ found.step).max() < _CONVERGED_PX * px:
            break
    planes, inside = seen
    return mapping, found, correlation(part[inside > 0], planes[..., 0][inside > 0])


def _covered(
    shape: tuple[int, ...], picture: LongPicture, mapping: LensMap, step: NDArray[np.float64]
) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of the level's pixels that the long-focal picture covers."""
    height, width = picture.size
    corners = np.array([[0, 0], [width, 0], [0, height], [width, height]], np.float64)
    points = apply(invert(compose(picture.to_pixels, mapping.affine)), corners) / step
    left, top = np.clip(np.floor(points.min(0)), 0, None).astype(int).tolist()
    right, bottom = np.minimum(np.ceil(points.max(0)), shape[::-1]).astype(int).tolist()
    return left, top, right, bottom


def _centres(box: tuple[int, int, int, int], step: NDArray[np.float64]) -> NDArray[np.float64]:
    """[H, W, 2] centres (x, y) of a level's pixels in (left, top, right, bottom), full-size coordinates."""
    left, top, right, bottom = box
    x, y = np.meshgrid((np.arange(left, right) + 0.5) * step[0], (np.arange(top, bottom) + 0.5) * step[1])
    return np.stack([x, y], axis=-1)


def _require_plausible(mapping: LensMap, shape: tuple[int, ...]) -> None:
    height, width = shape
    change = float(np.abs(np.linalg.svd(mapping.affine[:, :2] - np.eye(2), compute_uv=False)).max())
    shift = np.abs(apply(mapping.affine, mapping.centre[None])[0] - mapping.centre).max()
    if change > MAX_SCALE_CHANGE or shift > MAX_SHIFT * max(height, width):
        raise RegistrationError(
            f"found a change of {change:.3f} in scale or angle and a shift of {shift:.0f} px, "
            f"expected at most {MAX_SCALE_CHANGE} and {MAX_SHIFT * max(height, width):.0f} px"
        )


def _gradients(plane: Plane) -> tuple[Plane, Plane]:
    """(d/dx, d/dy)"""
    x = cv2.Sobel(plane, cv2.CV_32F, 1, 0, ksize=3, scale=1 / 8)
    y = cv2.Sobel(plane, cv2.CV_32F, 0, 1, ksize=3, scale=1 / 8)
    return np.asarray(x, np.float32), np.asarray(y, np.float32)


def _gain(a: Plane, b: Plane) -> tuple[float, float]:
    """(gain, bias) by which b comes closest to a."""
    mean_a, mean_b = float(a.mean()), float(b.mean())
    about = b - mean_b
    gain = float(np.vdot(a, about)) / max(float(np.vdot(about, about)), 1e-9 * about.size)
    gain = float(np.clip(gain, 0.2, 5.0))  # before the pictures meet the fit is near 0 and would stop the steps
    return gain, mean_a - gain * mean_b

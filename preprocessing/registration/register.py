"""Registers two pictures of one scene: finds the map between them from coarse to fine.

The map is that of a zoom lens in a moving hand (lens.py). Exposure, colour and vignetting do not affect it.
Conventions for maps: affine.py.
"""

from dataclasses import replace

import cv2
import numpy as np
from numpy.typing import NDArray

from preprocessing.registration.affine import Map, apply, compose, invert, translation
from preprocessing.registration.block_motion import Blocks, Fit, PyramidBase, PyramidLevel, fine_detail, fit
from preprocessing.registration.lens import LensMap
from preprocessing.registration.shift import Plane, correlation

_MIN_SIDE_PX = 32
_COARSEST_PX = 60
"""Smallest length of the shorter side at the coarsest level."""
_MAX_LEVELS = 5
_BLOCK_PX = 16
_MIN_BLOCKS = 12
_MAX_STEPS = 8
_CONVERGED_PX = 3e-3
MIN_CORRELATION = 0.4
"""Least correlation of fine detail; below it the pictures count as unrelated."""
MAX_ERROR_PX = 0.25
"""Largest accepted standard error of the map, short-focal pixels."""
MAX_SCALE_CHANGE = 0.08
"""Largest accepted difference between the affine's linear part and the identity: EXIF focal lengths are rounded, and
focusing changes the field of view."""
MAX_SHIFT = 0.15
"""Largest accepted shift at the centre, as a fraction of the picture's longer side."""


class RegistrationError(ValueError):
    """Two pictures could not be registered; the message is one line that says why."""


def register(
    reference: Plane,
    moving_HWC: NDArray[np.uint8],
    nominal: Map,
    *,
    camera_matrix: NDArray[np.float64] | None = None,
    lens: bool = True,
) -> LensMap:
    """The map near `nominal` that registers `moving` to `reference`: moving(map(p)) ~ reference(p).

    Normalised cross-correlation at the coarsest level finds the shift. At each level the shifts of blocks then refine
    an affine, tilt and radial distortion. Blocks are weighted by their precision; blocks with another motion are left
    out.

    Args:
        reference: [H, W] in [0, 255], luminance of the short-focal picture, at full size.
        moving_HWC: [H, W, 3] the long-focal picture at full size; the whole frame if `lens`.
        nominal: reference -> moving, a similarity, from the focal lengths.
        camera_matrix: [3, 3] linear sRGB -> white-balanced camera colours (`colour.srgb_to_camera`) if `reference` is
            the luminance of an RGGB mosaic (raw_to_jpg.py); None if it is that of a camera JPG.
        lens: whether to fit tilt and radial distortion, too; `moving_HWC` must then be centred on the lens's axis.

    Raises RegistrationError if the pictures do not correlate, have too little detail, or the map is implausible for a
    zoom lens in a moving hand.
    """
    height, width = moving_HWC.shape[:2]
    zoom = float(np.sqrt(abs(np.linalg.det(nominal[:, :2]))))
    side = min(*reference.shape, height / zoom, width / zoom)
    if side < _MIN_SIDE_PX:
        raise RegistrationError(f"shared area: expected at least {_MIN_SIDE_PX} px each way, got {side:.0f} px")
    base = PyramidBase.prepare(moving_HWC, nominal, camera_matrix)
    centre = apply(invert(nominal), np.array([[width / 2, height / 2]]))[0]
    mapping = LensMap(translation(0, 0), centre, float(np.hypot(height, width)) / 2 / zoom)
    top = int(np.clip(np.log2(side / _COARSEST_PX), 0, _MAX_LEVELS))
    for halvings in range(top, -1, -1):
        shrink = 2.0**halvings
        size = (round(reference.shape[1] / shrink), round(reference.shape[0] / shrink))
        # (x, y) pixels of `reference` per pixel of this level; not always an integer ratio.
        step = np.array([reference.shape[1] / size[0], reference.shape[0] / size[1]])
        fixed = fine_detail(np.asarray(cv2.resize(reference, size, interpolation=cv2.INTER_AREA), np.float32))
        level = PyramidLevel.of(base, shrink)
        if halvings == top:
            mapping = _coarse_shift(fixed, level, mapping, step)
        mapping, found, score = _refine(fixed, level, mapping, step, lens=lens and (halvings < top or top == 0))
    _require_plausible(mapping, found.error_px, score, reference.shape)
    return mapping.then(nominal)


def _coarse_shift(fixed: Plane, level: PyramidLevel, mapping: LensMap, step: NDArray[np.float64]) -> LensMap:
    """Correct `mapping` by the shift at which the middle of the long-focal picture best matches the short-focal one, by
    normalised cross-correlation."""
    height, width = fixed.shape
    planes, inside = level.warped(mapping, _centres((0, 0, width, height), step))
    rows, cols = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    if rows.size < 8 or cols.size < 8:
        raise RegistrationError("shared area: expected overlapping pictures, got no overlap")
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
        raise RegistrationError("detail: expected structure to register, got flat pictures")
    found = low + np.unravel_index(int(score.argmax()), score.shape)
    row, col = (inner - found) * step[::-1]
    return replace(mapping, affine=compose(translation(float(col), float(row)), mapping.affine))


def _refine(
    fixed: Plane, level: PyramidLevel, mapping: LensMap, step: NDArray[np.float64], *, lens: bool
) -> tuple[LensMap, Fit, float]:
    """(refined map, its last fit, correlation of detail) at one level."""
    box = _covered(fixed.shape, level, mapping, step)
    side = _BLOCK_PX if min(box[2] - box[0], box[3] - box[1]) >= 6 * _BLOCK_PX else _BLOCK_PX // 2
    (columns, left_over), (rows, over) = divmod(box[2] - box[0], side), divmod(box[3] - box[1], side)
    left, top = box[0] + left_over // 2, box[1] + over // 2
    right, bottom = left + columns * side, top + rows * side
    if right - left < 4 * side or bottom - top < 4 * side:
        raise RegistrationError(
            f"shared area: expected at least {4 * side} px each way at every level, got {right - left}x{bottom - top}"
        )
    at, part = _centres((left, top, right, bottom), step), np.ascontiguousarray(fixed[top:bottom, left:right])
    px = float(step.mean())
    for _ in range(_MAX_STEPS):
        warped = level.warped(mapping, at)
        blocks = Blocks.measure(part, warped, at, side)
        if len(blocks.cover_N) < _MIN_BLOCKS:
            raise RegistrationError(f"overlapping blocks: expected at least {_MIN_BLOCKS}, got {len(blocks.cover_N)}")
        found = fit(blocks, mapping, px=px, lens=lens)
        mapping = mapping.updated(found.step)
        if np.abs(mapping.jacobian(blocks.centre_N2) @ found.step).max() < _CONVERGED_PX * px:
            break
    planes, inside = warped
    return mapping, found, correlation(part[inside > 0], planes[..., 0][inside > 0])


def _covered(
    shape: tuple[int, ...], level: PyramidLevel, mapping: LensMap, step: NDArray[np.float64]
) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of the level's pixels that the long-focal picture covers."""
    height, width = level.size
    corners = np.array([[0, 0], [width, 0], [0, height], [width, height]], np.float64)
    points = apply(invert(compose(level.to_pixels, mapping.affine)), corners) / step
    left, top = np.clip(np.floor(points.min(0)), 0, None).astype(int).tolist()
    right, bottom = np.minimum(np.ceil(points.max(0)), shape[::-1]).astype(int).tolist()
    return left, top, right, bottom


def _centres(box: tuple[int, int, int, int], step: NDArray[np.float64]) -> NDArray[np.float64]:
    """[H, W, 2] centres (x, y), in full-size coordinates, of a level's pixels in the box (left, top, right, bottom)."""
    left, top, right, bottom = box
    x, y = np.meshgrid((np.arange(left, right) + 0.5) * step[0], (np.arange(top, bottom) + 0.5) * step[1])
    return np.stack([x, y], axis=-1)


def _require_plausible(mapping: LensMap, error_px: float, score: float, shape: tuple[int, ...]) -> None:
    if not score >= MIN_CORRELATION:
        raise RegistrationError(f"correlation after registration: expected at least {MIN_CORRELATION}, got {score:.2f}")
    if not error_px <= MAX_ERROR_PX:
        raise RegistrationError(
            f"standard error of the map: expected at most {MAX_ERROR_PX} px, got {error_px:.2f} px (too little detail)"
        )
    height, width = shape
    change = float(np.abs(np.linalg.svd(mapping.affine[:, :2] - np.eye(2), compute_uv=False)).max())
    shift = np.abs(apply(mapping.affine, mapping.centre[None])[0] - mapping.centre).max()
    if change > MAX_SCALE_CHANGE or shift > MAX_SHIFT * max(height, width):
        raise RegistrationError(
            f"map: expected a change in scale or angle of at most {MAX_SCALE_CHANGE} and a shift of at most "
            f"{MAX_SHIFT * max(height, width):.0f} px, got {change:.3f} and {shift:.0f} px"
        )

"""Measure exposure and in-camera corrections of one pair from its pictures.

Exposure is the ratio of HR's light to LR's. The corrections are those that the camera applied to its JPG but not to the
RAW: distortion and vignetting. All pictures are uint8 [H, W, 3] on the LR mosaic's grid over the pair's shared area.
"Units" are distances from a frame's centre in half diagonals of that frame.
"""

from dataclasses import dataclass, replace
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from preprocessing.colour import RENDERING_BYTE_TO_LINEAR, SRGB_BYTE_TO_LINEAR, RenderingCurve
from preprocessing.registration.affine import Map, apply, compose, translation
from preprocessing.registration.shift import local_detail, luminance, measure_shift

Plane = NDArray[np.float32]

COLUMNS = (
    *("exposure_ratio", "exposure_falloff"),
    *("jpg_scale", "jpg_k1", "jpg_shift_x", "jpg_shift_y", "jpg_falloff"),
)

_PATCH_PX = 96
"""Side of the patches whose shifts give the JPG's geometry."""
_MAX_PATCHES = 7
"""Number of patches along one side."""
_SHIFT_PX = 384
"""Side of the central window in which the shift between the frames is measured."""
_CELL_PX = 4
"""Side of the cells whose mean light is compared. Small, because the tone curve is not linear in a mean."""
_MAX_SIDE_CELLS = 192
_BLOCKS = 8
"""Blocks of cells along the shorter side. Blocks are large, so that remaining misalignment matters little."""
_TONE_DEGREE = 4
"""Degree of the polynomial fitted to the tone curve."""
_DARK, _BRIGHT = 4, 250
"""Pixels outside this range are too dark or too close to clipping to measure light."""
_LUMINANCE = np.array([0.2126, 0.7152, 0.0722], np.float32)
_ROUNDS = 5
"""Iterations of the robust fit."""
_OUTLIER = 4.0
"""Tukey's limit, in standard deviations estimated from the median."""
MAX_ERROR = {"shift_px": 0.25, "scale": 0.002, "k1": 0.01, "jpg_falloff": 0.03, "ratio": 0.05, "falloff": 0.1}
"""A value with a larger standard error counts as not measurable."""


@dataclass(frozen=True)
class Pictures:
    """One pair on the LR mosaic's grid over the shared area, uint8 [H, W, 3] each."""

    rendering: NDArray[np.uint8]
    """LibRaw's rendering of LR's RAW (raw.rendering): linear light encoded with `curve`."""
    lr: NDArray[np.uint8]
    hr: NDArray[np.uint8]
    """Low-passed and sampled on this grid."""
    lr_is_jpg: bool
    """True for a camera JPG, False for a rendering."""
    hr_is_jpg: bool
    to_lr_units: Map
    """Pixel (x, y) of this grid -> units of the LR frame."""
    to_hr_units: Map
    curve: RenderingCurve = "srgb"
    """The curve of the rendering, and of `lr` and `hr` where they are renderings, too."""

    def table(self, *, is_jpg: bool) -> NDArray[np.float32]:
        """Byte -> linear light; the curves of cameras' JPGs are close to sRGB's."""
        return SRGB_BYTE_TO_LINEAR if is_jpg else RENDERING_BYTE_TO_LINEAR[self.curve]


def measure(pictures: Pictures) -> dict[str, float]:
    """Measure the columns `COLUMNS` of one pair (schema.py has their meaning); NaN if not measurable."""
    found = dict.fromkeys(COLUMNS, float("nan"))
    tone = None
    if pictures.lr_is_jpg:
        found |= _jpg_geometry(pictures)
        pictures = _undistorted(pictures, found)
    cells = _Cells(_without_shift(pictures))
    if pictures.lr_is_jpg:
        tone, found["jpg_falloff"] = _tone_curve(cells)
    if tone is not None or not pictures.hr_is_jpg:
        found["exposure_ratio"], found["exposure_falloff"] = _exposure(cells, tone if pictures.hr_is_jpg else None)
    return found


def _jpg_geometry(pictures: Pictures) -> dict[str, float]:
    """Fit shift, scale and radial distortion of the JPG against the rendering to the measured shifts of patches."""
    height, width = pictures.lr.shape[:2]
    fixed, moving = (local_detail(luminance(p)) for p in (pictures.rendering, pictures.lr))
    side = min(_PATCH_PX, height, width)
    places, shifts = [], []
    for top in _starts(height, side):
        for left in _starts(width, side):
            at = (slice(top, top + side), slice(left, left + side))
            dy, dx = measure_shift(fixed[at], moving[at])
            if np.isfinite(dx):
                places.append((left + side / 2, top + side / 2))
                shifts.append((dx, dy))
    if not places:
        return {}
    q = apply(pictures.to_lr_units, np.array(places))
    px_per_unit = 1 / abs(pictures.to_lr_units[0, 0])
    radial = np.concatenate([q, q * (q * q).sum(1, keepdims=True)], axis=1).reshape(-1, 2, 2) * px_per_unit
    one, zero = np.ones(len(q)), np.zeros(len(q))
    shift_x, shift_y = np.stack([one, zero], 1), np.stack([zero, one], 1)
    columns = [shift_x.ravel(), shift_y.ravel(), radial[:, 0].ravel(), radial[:, 1].ravel()]
    value, error = _robust_fit(columns, np.array(shifts).ravel())
    k1 = value[3] / (1 + value[2])
    if not error[3] <= MAX_ERROR["k1"]:
        value, error = _robust_fit(columns[:3], np.array(shifts).ravel())
        k1 = float("nan")
    if not (max(error[:2]) <= MAX_ERROR["shift_px"] and error[2] <= MAX_ERROR["scale"]):
        return {}
    return {"jpg_scale": 1 + value[2], "jpg_k1": k1, "jpg_shift_x": value[0], "jpg_shift_y": value[1]}


def _undistorted(pictures: Pictures, found: dict[str, float]) -> Pictures:
    """Resample the camera's JPG to the RAW's geometry, if that was measured."""
    if not np.isfinite(found["jpg_scale"]):
        return pictures
    (step, _, left), (_, _, top) = pictures.to_lr_units
    height, width = pictures.lr.shape[:2]
    x = ((np.arange(width) + 0.5) * step + left).astype(np.float32)[None]
    y = ((np.arange(height) + 0.5) * step + top).astype(np.float32)[:, None]
    bent = found["jpg_scale"] * (1 + np.nan_to_num(found["jpg_k1"]) * (x * x + y * y)) - 1
    map_x = np.arange(width, dtype=np.float32)[None] + (x * bent / step + found["jpg_shift_x"])
    map_y = np.arange(height, dtype=np.float32)[:, None] + (y * bent / step + found["jpg_shift_y"])
    maps = np.asarray(map_x, np.float32), np.asarray(map_y, np.float32)
    return replace(pictures, lr=np.asarray(cv2.remap(pictures.lr, *maps, cv2.INTER_LINEAR), np.uint8))


def _without_shift(pictures: Pictures) -> Pictures:
    """Remove the residual shift of hr, if it can be measured, so that light is compared at the same place."""
    height, width = pictures.lr.shape[:2]
    top, left = max(0, (height - _SHIFT_PX) // 2), max(0, (width - _SHIFT_PX) // 2)
    at = (slice(top, top + _SHIFT_PX), slice(left, left + _SHIFT_PX))
    lr, hr = (local_detail(luminance(part[at])) for part in (pictures.lr, pictures.hr))
    dy, dx = measure_shift(lr, hr)
    if not np.isfinite(dx):
        return pictures
    shift = translation(dx, dy)
    # Pixels from outside become black, and black pixels are ignored.
    moved = cv2.warpAffine(pictures.hr, shift, (width, height), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP)
    return replace(pictures, hr=np.asarray(moved, np.uint8), to_hr_units=compose(pictures.to_hr_units, shift))


class _Cells:
    """Mean light per cell, and a mask of the cells without dark or clipped pixels."""

    def __init__(self, pictures: Pictures) -> None:
        height, width = pictures.lr.shape[:2]
        side = max(_CELL_PX, -(-max(height, width) // _MAX_SIDE_CELLS))
        self.shape = (max(1, height // side), max(1, width // side))
        self.rendering, well = self._light(pictures.rendering, side, pictures.table(is_jpg=False))
        self.lr, lr_well = self._light(pictures.lr, side, pictures.table(is_jpg=pictures.lr_is_jpg))
        self.hr, hr_well = self._light(pictures.hr, side, pictures.table(is_jpg=pictures.hr_is_jpg))
        self.lr_good, self.hr_good = well & lr_well, well & hr_well
        y, x = (np.mgrid[: self.shape[0], : self.shape[1]] + 0.5) * side
        places = np.stack([x.ravel(), y.ravel()], 1)
        self.lr_r2, self.hr_r2 = (
            (apply(units, places) ** 2).sum(1).reshape(self.shape)
            for units in (pictures.to_lr_units, pictures.to_hr_units)
        )

    def _light(
        self, picture: NDArray[np.uint8], side: int, table: NDArray[np.float32]
    ) -> tuple[Plane, NDArray[np.bool_]]:
        rows, cols = self.shape
        part = picture[: rows * side, : cols * side] if min(picture.shape[:2]) >= side else picture
        size = (cols, rows)
        luminance = cv2.transform(cv2.LUT(part, table), _LUMINANCE[None])
        light = cv2.resize(luminance, size, interpolation=cv2.INTER_AREA)
        within = cv2.inRange(part, (_DARK,) * 3, (_BRIGHT,) * 3)  # 255 where all three colours are
        extreme = np.asarray(within == 0, np.float32)
        return np.asarray(light, np.float32), cv2.resize(extreme, size, interpolation=cv2.INTER_AREA) == 0


@dataclass(frozen=True)
class _Tone:
    """The inverse of the camera's tone curve: log light, in RAW units, as a polynomial of the log sRGB-decoded JPG."""

    coefficients: NDArray[np.float64]
    low: float
    high: float

    def light(self, decoded: Plane) -> NDArray[np.float64]:
        """Light of sRGB-decoded values; NaN outside the range of the fit."""
        x = np.log(np.maximum(decoded, 1e-6)).astype(np.float64)
        inside = (x >= self.low) & (x <= self.high)
        return np.where(inside, np.exp(np.polynomial.polynomial.polyval(x, self.coefficients)), np.nan)


def _tone_curve(cells: _Cells) -> tuple[_Tone | None, float]:
    """Fit the tone curve and the JPG's falloff f against the RAW: log raw = curve(log jpg) - log(1 - f r2)."""
    good = cells.lr_good
    if good.sum() < 30 * (_TONE_DEGREE + 2):
        return None, float("nan")
    x = np.log(np.maximum(cells.lr[good], 1e-6)).astype(np.float64)
    y = np.log(np.maximum(cells.rendering[good], 1e-6)).astype(np.float64)
    columns = [x**power for power in range(_TONE_DEGREE + 1)]
    value, _ = _radial_fit(columns, y, cells.lr_r2[good], sign=-1.0)
    tone = _Tone(value[:-1], float(np.percentile(x, 0.5)), float(np.percentile(x, 99.5)))
    # Errors of neighbouring cells are correlated (e.g. a leaf's colour), so the error of f is estimated from blocks.
    known = tone.light(cells.lr)
    ratio, r2 = _block_ratios(cells.rendering, known, good & np.isfinite(known), cells.lr_r2)
    falloff, error = _radial_fit([np.ones(len(r2))], ratio, r2, sign=-1.0)
    return tone, float(falloff[-1]) if error[-1] <= MAX_ERROR["jpg_falloff"] else float("nan")


def _block_ratios(
    a: NDArray[Any], b: NDArray[Any], good: NDArray[np.bool_], r2: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(log(mean of a / mean of b), mean r2) per block of cells, for blocks that are more than half good."""
    block = max(1, min(good.shape) // _BLOCKS)
    size = (max(1, good.shape[1] // block), max(1, good.shape[0] // block))
    sum_a, sum_b, share, mean_r2 = (
        np.asarray(cv2.resize(plane.astype(np.float64), size, interpolation=cv2.INTER_AREA), np.float64)
        for plane in (np.where(good, a, 0), np.where(good, b, 0), good, r2)
    )
    used = share > 0.5
    return np.log(sum_a[used] / sum_b[used]), mean_r2[used]


def _exposure(cells: _Cells, tone: _Tone | None) -> tuple[float, float]:
    """(HR's light / LR's at the centre, falloff of that ratio to HR's corner). tone is None if hr is a rendering."""
    bright = cells.hr.astype(np.float64) if tone is None else tone.light(cells.hr)
    ratio, r2 = _block_ratios(bright, cells.rendering, cells.hr_good & np.isfinite(bright), cells.hr_r2)
    one = np.ones(len(ratio))
    value, error = _radial_fit([one], ratio, r2, sign=1.0)
    falloff = float(value[-1])
    if not error[-1] <= MAX_ERROR["falloff"]:
        value, error = _robust_fit([one], ratio)
        falloff = float("nan")
    return (float(np.exp(value[0])) if error[0] <= MAX_ERROR["ratio"] else float("nan")), falloff


def _radial_fit(
    columns: list[NDArray[np.float64]], target: NDArray[np.float64], r2: NDArray[np.float64], *, sign: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Fit target = columns . c + sign log(1 - f r2). Returns ([c..., f], standard errors)."""
    falloff = 0.0
    value, error = np.zeros(len(columns) + 1), np.full(len(columns) + 1, np.nan)
    for _ in range(3):
        inside = np.maximum(1 - falloff * r2, 0.05)
        slope = -sign * r2 / inside
        value, error = _robust_fit([*columns, slope], target - sign * np.log(inside) + slope * falloff)
        falloff = float(np.clip(value[-1], -2.0, 0.9))
    return value, error


def _robust_fit(
    columns: list[NDArray[np.float64]], target: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Least squares with Tukey's weights: (values, standard errors). Errors are infinite if the data are too few."""
    matrix = np.stack(columns, 1)
    count = matrix.shape[1]
    infinite = np.full(count, np.inf)
    value = np.zeros(count)
    weight = np.ones(len(target))
    if len(target) < 2 * count + 2:
        return value, infinite
    for _ in range(_ROUNDS):
        weighted = matrix * weight[:, None]
        normal = weighted.T @ matrix
        try:
            inverse = np.linalg.inv(normal)
        except np.linalg.LinAlgError:
            return value, infinite
        value = inverse @ (weighted.T @ target)
        residual = target - matrix @ value
        spread = 1.4826 * float(np.median(np.abs(residual))) + 1e-9
        weight = np.square(np.clip(1 - np.square(residual / (_OUTLIER * spread)), 0, None))
    used = float(weight.sum())
    if used <= count:
        return value, infinite
    variance = float((weight * residual**2).sum()) / (used - count)
    error = np.sqrt(np.maximum(np.diag(inverse @ (matrix.T @ (matrix * np.square(weight)[:, None])) @ inverse), 0))
    return value, np.asarray(np.where(np.isfinite(error), error * np.sqrt(variance), np.inf))


def _starts(length: int, side: int) -> list[int]:
    count = int(np.clip(length // side, 1, _MAX_PATCHES))
    return [round(start) for start in np.linspace(0, length - side, count).tolist()]

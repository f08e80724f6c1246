"""The look of a camera's JPG against LibRaw's rendering of the same RAW: a tone curve and a colour matrix.

    rendering = encode(matrix . light(jpg))        light: one monotone curve for all three colours

A network whose target has the camera's look learns that look, and gives it to photographs of every other camera. Taking
the look out of the pictures of a pair leaves only detail to learn (train.look=rendering).

The fit compares flat cells of the pair's shared area, where differences of geometry and sharpening matter least.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from preprocessing.colour import RENDERING_BYTE_TO_LINEAR, RenderingCurve, linear_to_srgb, srgb_to_linear

COLUMNS = ("look_curve", "look_matrix")
KNOTS = 33
"""Values of the curve, evenly spaced in the JPG's encoded value."""

_CELL_PX = 4
_DARK, _BRIGHT = 3, 252
"""Cells with a colour outside this range are too dark or too close to clipping to compare."""
_FLAT = 6.0
"""The largest standard deviation of a flat cell's green, of 255; if few cells are flat, the flattest are taken."""
_MIN_CELLS = 400
_MIN_PER_KNOT = 20
_ROUNDS = 12
"""Alternations between curve and matrix; the error of strong colours halves in each."""
_MAX_CELLS = 20_000
_RIDGE = 1e-3
"""Pulls the matrix to the identity where the colours of a scene do not determine it; relative to a colourful scene."""
_PLACES = np.linspace(0, 1, KNOTS)
_STEPS = np.float32(65535)
"""Steps of light in the table that encodes it. Of the darkest bytes, each spans 20 of them."""


_LEVEL_TO_LINEAR = srgb_to_linear(np.arange(2**16) / (2**16 - 1)).astype(np.float32)
_ROWS = 64
"""Rows that `Look.add` converts at a time."""
_LEAST_SLOPE, _SMOOTHINGS = 0.1 / (KNOTS - 1), 2


@lru_cache
def _encoding(curve: RenderingCurve) -> NDArray[np.uint8]:
    """The byte that encodes each step of light, [_STEPS + 1]. Interpolation takes ten times as long as a table."""
    light = np.arange(int(_STEPS) + 1) / float(_STEPS)
    return np.rint(np.interp(light, RENDERING_BYTE_TO_LINEAR[curve], np.arange(256))).astype(np.uint8)


@dataclass(frozen=True)
class Look:
    """How a camera's JPG differs from the rendering of its RAW."""

    curve: NDArray[np.float32]
    """(KNOTS,) monotone: sRGB-encoded light in [0, 1] of the JPG values 0, 1/32, ..., 1, before `matrix`."""
    matrix: NDArray[np.float32]
    """[3, 3] on linear light; each row sums to 1, so that grey stays grey."""

    def remove(self, picture_3HW: NDArray[np.uint8], curve: RenderingCurve) -> NDArray[np.uint8]:
        """The picture with the rendering's look: uint8 [3, H, W], encoded with `curve`."""
        table = srgb_to_linear(np.interp(np.arange(256) / 255, _PLACES, self.curve)).astype(np.float32)
        light = (_STEPS * self.matrix) @ table[picture_3HW].reshape(3, -1)
        step = np.clip(light + np.float32(0.5), 0, _STEPS).astype(np.uint16)
        return _encoding(curve)[step].reshape(picture_3HW.shape)

    def add(self, levels_HW3: NDArray[np.uint16], bits: int) -> NDArray[Any]:
        """A picture in the rendering's look, sRGB in 16 bits, with the JPG's look: the inverse of `remove`.

        Returns:
            uint8 or uint16 by `bits` [H, W, 3].
        """
        table = self._of_light(bits)
        matrix = (_STEPS * np.linalg.inv(self.matrix.astype(np.float64))).T.astype(np.float32)
        done = np.empty(levels_HW3.shape, table.dtype)
        for first in range(0, len(levels_HW3), _ROWS):
            light = _LEVEL_TO_LINEAR[levels_HW3[first : first + _ROWS]] @ matrix
            done[first : first + _ROWS] = table[np.clip(light + np.float32(0.5), 0, _STEPS).astype(np.uint16)]
        return done

    def _of_light(self, bits: int) -> NDArray[Any]:
        """The JPG's level for each step of light before `matrix`, [_STEPS + 1].

        The curve's knots are medians, so their slopes are smoothed, and kept above zero, which an inverse needs.
        """
        slopes = np.maximum(np.diff(self.curve.astype(np.float64)), _LEAST_SLOPE)
        for _ in range(_SMOOTHINGS):
            slopes = np.convolve(np.pad(slopes, 1, mode="edge"), (0.25, 0.5, 0.25), mode="valid")
        curve = np.concatenate(([0], np.cumsum(slopes))) / slopes.sum()
        encoded = linear_to_srgb(np.arange(int(_STEPS) + 1) / float(_STEPS))
        level = (2**bits - 1) * np.interp(encoded, curve, _PLACES)
        return np.rint(level).astype(np.uint8 if bits == 8 else np.uint16)

    def columns(self) -> dict[str, Any]:
        """The values of COLUMNS."""
        return {"look_curve": self.curve, "look_matrix": self.matrix.ravel()}

    @classmethod
    def of_row(cls, row: Mapping[str, Any]) -> Look | None:
        """The look of a shard's row; None if it was not measurable or the shard is older than these columns."""
        curve, matrix = (row.get(name) for name in COLUMNS)
        if curve is None or matrix is None:
            return None
        return cls(np.asarray(curve, np.float32), np.asarray(matrix, np.float32).reshape(3, 3))


def measure_look(jpg_HWC: NDArray[np.uint8], rendering_HWC: NDArray[np.uint8], curve: RenderingCurve) -> Look | None:
    """Fit the look of a JPG to the rendering of the same area.

    Args:
        jpg_HWC, rendering_HWC: uint8 [H, W, 3] on the same grid.
        curve: the rendering's.

    Returns:
        the look; None if the pictures have too few flat, unclipped cells.
    """
    jpg, light = _flat_cells(jpg_HWC, rendering_HWC, RENDERING_BYTE_TO_LINEAR[curve])
    if len(jpg) < _MIN_CELLS:
        return None
    matrix, knots = np.eye(3), _PLACES
    for _ in range(_ROUNDS):
        knots = _fit_curve(jpg, light @ np.linalg.inv(matrix).T)
        matrix = _fit_matrix(np.asarray(srgb_to_linear(np.interp(jpg, _PLACES, knots)), np.float64), light)
    return Look(knots.astype(np.float32), matrix.astype(np.float32))


def _flat_cells(
    jpg_HWC: NDArray[np.uint8], rendering_HWC: NDArray[np.uint8], to_light: NDArray[np.float32]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(JPG's encoded values in [0, 1], rendering's light), [cells, 3] each, of the flat, unclipped cells."""
    rows, cols = (side // _CELL_PX for side in jpg_HWC.shape[:2])
    if min(rows, cols) == 0:
        return np.empty((0, 3)), np.empty((0, 3))

    def means(picture: NDArray[Any]) -> NDArray[np.float64]:
        part = picture[: rows * _CELL_PX, : cols * _CELL_PX]
        mean = cv2.resize(part, (cols, rows), interpolation=cv2.INTER_AREA)
        return np.asarray(mean, np.float64).reshape(rows * cols, -1)

    values = means(jpg_HWC.astype(np.float32))
    variance = means(np.square(jpg_HWC.astype(np.float32))) - np.square(values)
    inside = [cv2.inRange(picture, (_DARK,) * 3, (_BRIGHT,) * 3) for picture in (jpg_HWC, rendering_HWC)]
    clipped = means(255 - np.minimum(*inside))[:, 0] > 0
    spread = np.where(clipped, np.inf, variance[:, 1])
    limit = max(_FLAT**2, float(np.sort(spread)[min(4 * _MIN_CELLS, len(spread) - 1)]))
    good = np.flatnonzero((spread <= limit) & np.isfinite(spread))
    good = good[:: -(-len(good) // _MAX_CELLS) or 1]
    return values[good] / 255, means(cv2.LUT(rendering_HWC, to_light))[good]


def _fit_curve(jpg: NDArray[np.float64], light: NDArray[np.float64]) -> NDArray[np.float64]:
    """(KNOTS,) sRGB-encoded light at _PLACES: medians about each knot, made monotone.

    Beyond the measured range the curve runs straight to black and to white.
    """
    value, encoded = jpg.ravel(), linear_to_srgb(np.maximum(light.ravel(), 0))
    knot = np.rint(value * (KNOTS - 1)).astype(int)
    slope = np.polynomial.polynomial.polyfit(value, encoded, 3)
    # Move each value along the overall curve to its knot, so that a median is not biased by where its values lie.
    moved = (
        encoded
        + np.polynomial.polynomial.polyval(_PLACES[knot], slope)
        - np.polynomial.polynomial.polyval(value, slope)
    )
    known = [n for n in range(1, KNOTS - 1) if np.count_nonzero(knot == n) >= _MIN_PER_KNOT]
    medians = np.maximum.accumulate([float(np.median(moved[knot == n])) for n in known])
    return np.interp(_PLACES, [0.0, *_PLACES[known], 1.0], np.clip([0.0, *medians, 1.0], 0, 1))


def _fit_matrix(seen: NDArray[np.float64], light: NDArray[np.float64]) -> NDArray[np.float64]:
    """[3, 3], rows sum to 1: the least relative error of seen . matrix^T against light."""
    weight = 1 / (light.mean(axis=1) + 0.02)
    matrix = np.eye(3)
    for row in range(3):
        others = [column for column in range(3) if column != row]
        differences = (seen[:, others] - seen[:, [row]]) * weight[:, None]
        error = (light[:, row] - seen[:, row]) * weight
        normal = differences.T @ differences + _RIDGE * len(seen) * np.eye(2)
        matrix[row, others] = np.linalg.solve(normal, differences.T @ error)
        matrix[row, row] = 1 - matrix[row, others].sum()
    return matrix

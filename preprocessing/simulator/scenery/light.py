"""Lighting of a finished scene: fine grain on every surface, one side brighter, soft shadows of clouds."""

import cv2
import numpy as np

from preprocessing.simulator.scenery.canvas import Box
from preprocessing.simulator.scenery.drawing import Drawing
from preprocessing.simulator.scenery.painter import Painter


def draw_light(drawing: Drawing, rng: np.random.Generator, outer: Box) -> None:
    coarse = rng.normal(size=(6, 9)).astype(np.float32)
    tilt = rng.normal(size=2) * 0.10
    drawing.add(outer, Painter.grain, outer, 0.035, 0.5, int(rng.integers(64)) * 8)
    drawing.add(outer, _shade_smoothly, outer, coarse * 0.07, tilt)


def _shade_smoothly(painter: Painter, outer: Box, coarse: np.ndarray, tilt: np.ndarray) -> None:
    """Multiply the canvas by 1 + a smooth field: `coarse` [6, 9] over `outer`, plus a linear ramp (`tilt`)."""
    size = 64
    rows, columns = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
    field = cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC) + tilt[0] * rows + tilt[1] * columns
    left, top, right, bottom = outer
    grid_x = (size / (right - left) / painter.density, (painter.canvas.x0 - left) * size / (right - left) - 0.5)
    grid_y = (size / (bottom - top) / painter.density, (painter.canvas.y0 - top) * size / (bottom - top) - 0.5)
    affine = np.array([[grid_x[0], 0, grid_x[1]], [0, grid_y[0], grid_y[1]]])
    for start in range(0, painter.height, 256):
        part = painter.pixels[start : start + 256]
        affine[1, 2] = grid_y[1] + start * grid_y[0]
        factor = 1 + cv2.warpAffine(
            field.astype(np.float32),
            affine,
            (part.shape[1], part.shape[0]),
            flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
            borderMode=cv2.BORDER_REPLICATE,
        )
        part[:] = np.clip(part * factor[..., None] + 0.5, 0, 255)

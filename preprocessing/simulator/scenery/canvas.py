"""A canvas: a rectangle of one plane of the scene at one density."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Colour = tuple[float, float, float]
"""sRGB, 0 to 255."""
Box = tuple[float, float, float, float]
"""(left, top, right, bottom) in scene units."""

FINEST_DENSITY = 1.5
"""Density of the finest canvas, pixels per scene unit."""
NUM_LEVELS = 4
"""Canvases per plane; each has half the density of the next finer one."""
WHITE: Colour = (255.0, 255.0, 255.0)
"""Colour of full coverage in a mask."""


@dataclass
class Canvas:
    """Part of a plane of the scene, top left corner at scene coordinates (x0, y0)."""

    pixels: npt.NDArray[np.uint8]
    """sRGB [H, W, 3], or [H, W, 4] with premultiplied colour and alpha last."""
    x0: float
    y0: float
    density: float
    """Canvas pixels per scene unit."""
    level: int = 0
    """Octaves below the finest canvas; selects the material's level."""

    @property
    def box(self) -> Box:
        height, width = self.pixels.shape[:2]
        return self.x0, self.y0, self.x0 + width / self.density, self.y0 + height / self.density

    def covers(self, x0: float, y0: float, x1: float, y1: float) -> bool:
        left, top, right, bottom = self.box
        return left <= x0 and top <= y0 and x1 <= right and y1 <= bottom

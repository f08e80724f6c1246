"""What the bench measures on an enlarged chart. Pictures are float32 [scale H, scale W, 3] sRGB in [0, 1].

line variation   standard deviation of the luma along the line's centre, relative to the line's own mean contrast
line contrast    mean contrast of lines relative to that of the true picture
false colour     mean CIELAB chroma around grey lines and on the zone plate
edge width       distance from 10 to 90 % of a step, mosaic pixels
overshoot        how far an edge goes beyond its two levels, relative to the step; the larger of the two sides
tone             difference of a flat patch's mean from that of the input's rendering, levels of 255
noise            standard deviation of the luma on flat patches, levels of 255
"""

import cv2
import numpy as np
from numpy.typing import NDArray
from optical_bench.charts import ANGLES, EDGE_ANGLES, Chart, normal

Image = NDArray[np.float32]
REACH_PX = 15.0
"""Half the length of the part of a line or edge that is measured; the rest of its patch is a margin."""
PLATEAU_PX = (8.0, 14.0)
"""Distances from an edge at which its two levels are read."""
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)


def luma(picture: Image) -> Image:
    return picture @ _LUMA


def _sampled(image: Image, x: NDArray, y: NDArray, scale: int) -> NDArray:
    """Bilinear samples at positions in mosaic pixels."""
    to = [np.asarray(values * scale - 0.5, np.float32) for values in (x, y)]
    return np.asarray(cv2.remap(image, to[0], to[1], cv2.INTER_LINEAR))


def _profile(image: Image, chart: Chart, number: int, angle: float, distances: NDArray, scale: int) -> NDArray:
    """[distances, places along]: luma at distances across a line or edge."""
    (x, y), (across_x, across_y) = chart.centre(number), normal(angle)
    along = np.arange(-REACH_PX, REACH_PX, 0.25)
    across, along = np.meshgrid(distances, along, indexing="ij")
    return _sampled(image, x + across * across_x + along * across_y, y + across * across_y - along * across_x, scale)


def line_contrasts(picture: Image, chart: Chart, scale: int) -> NDArray:
    """[angles, places along]: each line's distance from its background, signed."""
    image, found = luma(picture), []
    for number, angle in enumerate(ANGLES):
        centre = _profile(image, chart, number, angle, np.array([-0.25, 0.0, 0.25]), scale).mean(axis=0)
        back = _profile(image, chart, number, angle, np.array([-8.0, -7.0, 7.0, 8.0]), scale).mean()
        found.append(centre - back)
    return np.array(found)


def line_variation(contrasts: NDArray) -> float:
    """Mean over the lines."""
    return float(np.mean(contrasts.std(axis=1) / np.maximum(np.abs(contrasts.mean(axis=1)), 1e-3)))


def line_contrast(contrasts: NDArray, true: NDArray) -> float:
    """Mean over the lines."""
    return float(np.mean(contrasts.mean(axis=1) / true.mean(axis=1)))


def chroma(picture: Image, border_px: int = 0) -> float:
    """Mean CIELAB chroma inside the border (pixels of the picture)."""
    inside = picture[border_px : picture.shape[0] - border_px, border_px : picture.shape[1] - border_px]
    lab = cv2.cvtColor(np.ascontiguousarray(inside), cv2.COLOR_RGB2LAB)
    return float(np.hypot(lab[..., 1], lab[..., 2]).mean())


def edges(picture: Image, chart: Chart, scale: int) -> tuple[float, float]:
    """(edge width, overshoot), means over the angles."""
    image, widths, overshoots = luma(picture), [], []
    distances = np.arange(-PLATEAU_PX[1], PLATEAU_PX[1] + 0.01, 1 / 16)
    far = np.abs(distances) >= PLATEAU_PX[0]
    for number, angle in enumerate(EDGE_ANGLES):
        profile = _profile(image, chart, number, angle, distances, scale).mean(axis=1)
        low, high = profile[far & (distances < 0)].mean(), profile[far & (distances > 0)].mean()
        step = (profile - low) / (high - low)
        widths.append(_crossing(step, distances, 0.9) - _crossing(step, distances, 0.1))
        overshoots.append(max(float(step.max()) - 1, -float(step.min()), 0.0))
    return float(np.mean(widths)), float(np.mean(overshoots))


def _crossing(step: NDArray, distances: NDArray, level: float) -> float:
    """Where the edge first passes `level`, interpolated."""
    after = int(np.argmax(step >= level))
    before = max(after - 1, 0)
    rise = step[after] - step[before]
    share = (level - step[before]) / rise if rise > 0 else 0.0
    return float(distances[before] + share * (distances[after] - distances[before]))


def patch_means(picture: Image, chart: Chart, count: int, scale: int) -> NDArray:
    """[count, 3]: means over the inner half of each flat patch."""
    return np.array([_inner(picture, chart, number, scale).mean(axis=(0, 1)) for number in range(count)])


def noise(picture: Image, chart: Chart, count: int, scale: int) -> float:
    """Levels of 255, root mean square over the patches."""
    variances = [luma(_inner(picture, chart, number, scale)).var() for number in range(count)]
    return 255 * float(np.sqrt(np.mean(variances)))


def _inner(picture: Image, chart: Chart, number: int, scale: int) -> Image:
    x, y = chart.centre(number)
    left, top, half = round(x * scale), round(y * scale), chart.patch_px * scale // 4
    return picture[top - half : top + half, left - half : left + half]

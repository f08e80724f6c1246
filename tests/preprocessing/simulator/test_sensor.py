"""Rendered frames: points appear at their exact positions, and the noise has the right variance."""

import numpy as np
import pytest
from simulated_frames import draw_frames

from preprocessing.colour import linear_to_srgb_bytes
from preprocessing.simulator import sensor
from preprocessing.simulator.optics import PRESETS, draw_geometries
from preprocessing.simulator.scenery.canvas import Canvas
from preprocessing.simulator.scenes import Scene
from preprocessing.truth.frame import Exposure


def dots(points: np.ndarray, sigma: float, density: float) -> Canvas:
    """A canvas with a Gaussian spot of light at each scene point."""
    low, high = points.min(axis=0) - 20 * sigma, points.max(axis=0) + 20 * sigma
    width, height = np.ceil((high - low) * density).astype(int)
    light = np.full((height, width, 1), 0.02, np.float32)
    for x, y in (points - low) * density:
        reach = int(5 * sigma * density) + 2
        rows, columns = slice(int(y) - reach, int(y) + reach), slice(int(x) - reach, int(x) + reach)
        down = np.exp(-0.5 * ((np.arange(rows.start, rows.stop) + 0.5 - y) / (sigma * density)) ** 2)
        across = np.exp(-0.5 * ((np.arange(columns.start, columns.stop) + 0.5 - x) / (sigma * density)) ** 2)
        light[rows, columns, 0] += 0.9 * np.outer(down, across)
    return Canvas(linear_to_srgb_bytes(light).repeat(3, axis=2), float(low[0]), float(low[1]), density)


@pytest.mark.parametrize("number", range(7))
def test_rendered_points_are_at_their_exact_positions(number: int) -> None:
    frame = draw_frames()[number]
    grid = np.stack(np.meshgrid(np.linspace(30.3, 450.8, 6), np.linspace(25.6, 290.1, 4)), -1).reshape(-1, 2)
    points = frame.to_scene(grid)
    scene = Scene([dots(points, 1.5 / frame.magnification, 2.0 * frame.magnification)], [], "dots")
    image = np.concatenate([band for _, band in sensor.render_linear(scene, frame, psf_px=0.6)])[..., 1]
    background = np.median(image)
    for x, y in frame.from_scene(points):
        left, top = int(x) - 8, int(y) - 8
        spot = image[top : top + 17, left : left + 17] - background
        at = np.arange(17) + 0.5
        found = ((spot * at).sum() / spot.sum() + left, (spot * at[:, None]).sum() / spot.sum() + top)
        assert np.hypot(found[0] - x, found[1] - y) < 0.03


def test_noise_variance_is_photon_plus_read_noise() -> None:
    """On a grey wall the counts' variance follows from full well, ISO and read noise."""
    frame = draw_geometries(np.random.default_rng(0), PRESETS["perfect"], jpg_size=(384, 256), raw_size=(384, 256))[0]
    wall = Canvas(linear_to_srgb_bytes(np.full((600, 900, 3), 0.3, np.float32)), -300.0, -200.0, 1.5)
    exposure = Exposure(400, 0.01, 8.0, 0.8, (2.0, 1.0, 1.5), 0.6, vignetting=0.0)
    mosaic = sensor.expose(Scene([wall], [], "wall"), frame, exposure, np.random.default_rng(1)).astype(np.float64)
    electrons_per_count = sensor.FULL_WELL_E / 4 / (sensor.WHITE_LEVEL - sensor.BLACK_LEVEL)
    for plane, gain in ((mosaic[0::2, 0::2], 2.0), (mosaic[0::2, 1::2], 1.0), (mosaic[1::2, 1::2], 1.5)):
        signal = plane.mean() - sensor.BLACK_LEVEL
        assert signal == pytest.approx(0.3 * 0.8 / gain * (sensor.WHITE_LEVEL - sensor.BLACK_LEVEL), rel=0.02)
        variance = (signal * electrons_per_count + sensor.READ_NOISE_E**2) / electrons_per_count**2
        assert plane.var() == pytest.approx(variance, rel=0.05)

"""Geometries of a simulated sequence's frames, without rendering them."""

import numpy as np

from preprocessing.simulator.optics import PRESETS, draw_geometries
from preprocessing.truth.frame import FrameGeometry

SIZE = (480, 320)
"""(width, height) of RAW and JPG."""


def draw_frames(preset: str = "handheld", seed: int = 3) -> list[FrameGeometry]:
    """Seven frames, the longest focal length first."""
    return draw_geometries(np.random.default_rng(seed), PRESETS[preset], jpg_size=SIZE, raw_size=SIZE)

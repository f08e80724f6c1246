"""The near plane: twigs with leaves and a post between the camera and the scene."""

import numpy as np

from preprocessing.simulator.scenery.canvas import WHITE, Box
from preprocessing.simulator.scenery.drawing import Drawing
from preprocessing.simulator.scenery.foliage import twig
from preprocessing.simulator.scenery.painter import Painter
from preprocessing.simulator.scenery.words import pick, tint


def draw_near(rng: np.random.Generator, outer: Box, unit: float) -> tuple[Drawing, Drawing]:
    """The same shapes twice: in colour, and as a white coverage mask."""
    colour, mask = Drawing(), Drawing()
    left, top, right, bottom = outer
    # One or two twigs reach into the centre, where every focal length sees them; more are near the edges.
    for _ in range(int(rng.integers(1, 3))):
        angle = rng.uniform(0, 2 * np.pi)
        tip = np.array([700 * np.cos(angle), 450 * np.sin(angle)]) * unit * rng.uniform(0.35, 0.95)
        start = tip + np.array([np.cos(angle), np.sin(angle)]) * rng.uniform(900, 2200) * unit
        twig(colour, mask, rng, start, tip, rng.uniform(120, 240) * unit, unit)
    for _ in range(int(rng.integers(3, 8))):
        side = rng.choice([left, right]) * rng.uniform(0.45, 1.0)
        start = np.array([side, rng.uniform(top, 0.2 * bottom)])
        tip = start + rng.normal(size=2) * 1500 * unit
        twig(colour, mask, rng, start, tip, rng.uniform(160, 420) * unit, unit)
    if rng.random() < 0.4:
        x = float(rng.choice([-1, 1]) * rng.uniform(900, 4000) * unit)
        width = rng.uniform(60, 180) * unit
        post = (x, top, x + width, bottom)
        colour.add(post, Painter.material, post, "metal", tint(rng, pick(rng, ((0.4, 0.42, 0.42), (0.6, 0.55, 0.5)))))
        colour.add(post, Painter.shade, post, (0.5, 0.9, 1.15, 1.0, 0.8, 0.45), horizontal=True)
        mask.add(post, Painter.rect, post, WHITE)
    return colour, mask

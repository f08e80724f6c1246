"""Leaves and twigs, and the subject garden: an overgrown wall with plant labels."""

import numpy as np
import numpy.typing as npt

from preprocessing.simulator.scenery.canvas import WHITE, Box, Colour
from preprocessing.simulator.scenery.drawing import Drawing
from preprocessing.simulator.scenery.painter import Painter
from preprocessing.simulator.scenery.words import pick, title, tone

Point = npt.NDArray[np.float64]

GREENS: tuple[Colour, ...] = ((74, 94, 48), (92, 110, 60), (58, 80, 46), (108, 118, 66), (84, 96, 70), (66, 88, 62))
AUTUMN: tuple[Colour, ...] = ((122, 84, 44), (138, 66, 42), (150, 118, 62), (104, 92, 52))
_DARK = (26, 32, 20)


def leaf(
    colour: Drawing,
    mask: Drawing | None,
    rng: np.random.Generator,
    stem: Point,
    length: float,
    angle: float,
    green: Colour,
) -> None:
    """One leaf: two halves of different brightness, a midrib and side veins. Without a mask it casts a shadow."""
    t = np.linspace(0, 1, 15)
    fat = rng.uniform(0.20, 0.34) * length
    serration = 1 + 0.05 * (np.arange(15) % 2) * (rng.random() < 0.5)
    width = fat * np.sin(np.pi * t**0.8) ** 0.9 * serration
    bend = rng.uniform(-0.12, 0.12) * length * np.sin(np.pi * t)
    along, across = np.array([np.cos(angle), np.sin(angle)]), np.array([-np.sin(angle), np.cos(angle)])
    rib = stem + t[:, None] * length * along + bend[:, None] * across
    one, other = rib + width[:, None] * across, rib - width[:, None] * across
    outline = np.concatenate([one, other[::-1]])
    box = (*outline.min(axis=0).tolist(), *outline.max(axis=0).tolist())
    bright, dim = tone(rng, green, 0.04), tuple(0.80 * channel for channel in green)
    if rng.random() < 0.5:
        bright, dim = dim, bright  # type: ignore[assignment]
    if mask is None:  # on the far plane, its shadow falls on the leaves behind it
        fall = 0.035 * length * np.array([1.0, 1.5])
        area = (box[0], box[1], box[2] + float(fall[0]), box[3] + float(fall[1]))
        colour.add(area, Painter.shade_polygon, outline + fall, 0.55, smallest=0.035 * length)
    colour.add(box, Painter.polygon, np.concatenate([one, rib[::-1]]), bright)
    colour.add(box, Painter.polygon, np.concatenate([other, rib[::-1]]), dim)
    vein = tuple(min(255.0, 1.28 * channel + 10) for channel in green)
    colour.add(box, Painter.line, rib, 0.014 * length, vein, smallest=0.014 * length)
    for number in range(2, 12):
        for edge in (one, other):
            points = np.stack([rib[number], 0.15 * rib[number + 2] + 0.85 * edge[number + 1]])
            colour.add(box, Painter.line, points, 0.006 * length, vein, smallest=0.006 * length)
    if mask is not None:
        mask.add(box, Painter.polygon, outline, WHITE)


def twig(
    colour: Drawing, mask: Drawing, rng: np.random.Generator, start: Point, tip: Point, leaf_length: float, unit: float
) -> None:
    """A curved stalk from start to tip with leaves along it."""
    t = np.linspace(0, 1, 24)[:, None]
    direction = tip - start
    normal = np.array([-direction[1], direction[0]])
    stalk = start + t * direction + rng.uniform(-0.25, 0.25) * np.sin(np.pi * t) * normal
    box = (*stalk.min(axis=0).tolist(), *stalk.max(axis=0).tolist())
    bark = tone(rng, (74, 60, 46))
    thick = rng.uniform(10, 18) * unit
    colour.add(box, Painter.line, stalk, thick, bark)
    mask.add(box, Painter.line, stalk, thick, WHITE)
    greens = GREENS if rng.random() < 0.75 else AUTUMN
    green = pick(rng, greens)
    heading = float(np.arctan2(direction[1], direction[0]))
    spacing = max(1, round(24 * 0.45 * leaf_length / max(float(np.hypot(*direction)), 1.0)))
    for number in range(2, 24, spacing):
        side = 1 if (number // spacing) % 2 else -1
        angle = heading + side * rng.uniform(0.5, 1.2)
        leaf(colour, mask, rng, stalk[number], leaf_length * rng.uniform(0.7, 1.2), angle, tone(rng, green))


def draw_garden(drawing: Drawing, rng: np.random.Generator, outer: Box, unit: float) -> None:
    left, top, right, bottom = outer
    drawing.add(outer, Painter.material, outer, pick(rng, ("stone", "brick", "wood")), (0.8, 0.8, 0.78))
    # Patches of wall stay bare; the rest is covered by layers of leaves, the deeper ones darker.
    holes = [(rng.uniform(left, right), rng.uniform(top, bottom), rng.uniform(900, 2200) * unit) for _ in range(5)] + [
        (rng.normal() * 500 * unit, rng.normal() * 350 * unit, rng.uniform(250, 420) * unit)
    ]
    greens = GREENS if rng.random() < 0.75 else AUTUMN
    for depth in range(4):
        shade = (0.34, 0.58, 0.80, 1.0)[depth]
        step = (430 + 40 * depth) * unit
        for y in np.arange(top, bottom + step, 0.62 * step):
            for x in np.arange(left, right + step, 0.8 * step):
                stem = np.array([x, y]) + rng.normal(size=2) * 0.4 * step
                bare = any(
                    np.hypot(stem[0] - hx, stem[1] - hy) < radius * (1.2 - 0.1 * depth) for hx, hy, radius in holes
                )
                angle, length = rng.normal(1.45, 0.75), rng.lognormal(np.log(0.95), 0.28) * step
                green = tone(rng, pick(rng, greens), 0.10)
                if bare or rng.random() < 0.30:
                    continue
                leaf(drawing, None, rng, stem, length, angle, (green[0] * shade, green[1] * shade, green[2] * shade))
    for number in range(14):
        centre = rng.normal(size=2) * (np.array([620, 420]) if number < 4 else np.array([5000, 3300])) * unit
        _label(drawing, rng, centre, unit)


def _label(drawing: Drawing, rng: np.random.Generator, centre: Point, unit: float) -> None:
    wide, high = rng.uniform(240, 420) * unit, rng.uniform(110, 170) * unit
    x, y = centre.tolist()
    plate = (x, y, x + wide, y + high)
    drawing.add(
        plate, Painter.shadow, (x + 8 * unit, y + 12 * unit, x + wide + 8 * unit, y + high + 12 * unit), 14 * unit, 0.5
    )
    drawing.add(plate, Painter.material, plate, pick(rng, ("metal", "paper", "wood")), (1.0, 0.98, 0.94))
    drawing.add(
        plate, Painter.text, (x + 0.08 * wide, y + 0.14 * high), 0.30 * high, title(rng), (40, 42, 38), fit=0.84 * wide
    )
    latin = pick(rng, ("Hedera helix", "Parthenocissus", "Wisteria sinensis", "Clematis montana", "Rosa canina"))
    drawing.add(
        plate,
        Painter.text,
        (x + 0.08 * wide, y + 0.58 * high),
        0.2 * high,
        latin,
        (70, 66, 58),
        slant=0.2,
        fit=0.8 * wide,
    )

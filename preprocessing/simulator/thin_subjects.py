"""Subjects of thin lines, for the preset wide: twigs, wires, hair, fabric, print, facades, test lines.

Lines are 0.7 to 2 pixels wide on the 50, 35 or 24 mm frame, the short frames of 4x pairs, where the mosaic aliases
them. Each subject fills the middle densely, which those pairs show, and the rest thinly.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from preprocessing.simulator.optics import FOCALS_MM
from preprocessing.simulator.scenery.canvas import Box, Colour
from preprocessing.simulator.scenery.drawing import Drawing
from preprocessing.simulator.scenery.painter import Painter
from preprocessing.simulator.scenery.words import CLOTH, PAINT, PAPER, pick, sentence, title, tone
from preprocessing.truth.frame import NATIVE_MM

Points = npt.NDArray[np.float64]

LINE_PX = (0.7, 2.0)
_SHORT_FRAMES = FOCALS_MM[4:]
_SKY: tuple[Colour, ...] = ((196, 208, 222), (150, 180, 214), (226, 226, 224), (236, 214, 190))
_DARK: tuple[Colour, ...] = ((30, 28, 26), (62, 50, 40), (24, 26, 32), (84, 70, 54))
_HAIR: tuple[Colour, ...] = ((36, 28, 24), (96, 66, 42), (176, 140, 92), (150, 146, 142), (120, 60, 36))


def _short_px(rng: np.random.Generator) -> float:
    """Scene units of a pixel of one of the short frames."""
    return NATIVE_MM / float(rng.choice(_SHORT_FRAMES))


def _strip(points: Points, widths: npt.ArrayLike) -> Points:
    """The outline [2N, 2] of a line through `points` [N, 2] with the given widths."""
    along = np.gradient(points, axis=0)
    normal = np.stack([-along[:, 1], along[:, 0]], -1) / np.maximum(np.hypot(*along.T), 1e-9)[:, None]
    half = normal * np.broadcast_to(np.asarray(widths, np.float64) / 2, len(points))[:, None]
    return np.concatenate([points + half, (points - half)[::-1]])


def _stroke(drawing: Drawing, points: Points, widths: npt.ArrayLike, colour: Colour) -> None:
    outline = _strip(points, widths)
    box = (*outline.min(axis=0).tolist(), *outline.max(axis=0).tolist())
    drawing.add(box, Painter.polygon, outline, colour, smallest=float(np.asarray(widths, np.float64).mean()))


def _segment(drawing: Drawing, start: Points, end: Points, width: float, colour: Colour) -> None:
    _stroke(drawing, np.stack([start, end]).astype(np.float64), width, colour)


def _sky(drawing: Drawing, rng: np.random.Generator, outer: Box) -> None:
    sky = pick(rng, _SKY)
    drawing.add(outer, Painter.gradient, outer, tone(rng, sky), tone(rng, pick(rng, _SKY)))


def _surface(drawing: Drawing, rng: np.random.Generator, outer: Box) -> None:
    name = pick(rng, ("plaster", "paper", "stone", "metal", "wood", "slabs"))
    drawing.add(outer, Painter.material, outer, name, tuple(rng.uniform(0.5, 1.05) * np.ones(3)))


def draw_twigs(drawing: Drawing, rng: np.random.Generator, outer: Box, unit: float) -> None:
    """Bare branches against the sky."""
    _sky(drawing, rng, outer)
    for number in range(26):
        spread = np.array([1700, 1100]) * unit if number < 14 else np.array([outer[2], outer[3]]) / 2
        angle, length = rng.uniform(0, 2 * np.pi), rng.uniform(250, 700) * unit
        width = float(rng.uniform(4, 12)) * _short_px(rng)
        _branch(drawing, rng, rng.normal(size=2) * spread, angle, length, width, pick(rng, _DARK), 5)


def _branch(
    drawing: Drawing,
    rng: np.random.Generator,
    start: Points,
    angle: float,
    length: float,
    width: float,
    bark: Colour,
    depth: int,
) -> None:
    t = np.linspace(0, 1, 7)[:, None]
    direction = np.array([np.cos(angle), np.sin(angle)])
    bend = rng.normal() * 0.12 * length * np.sin(np.pi * t) * np.array([-direction[1], direction[0]])
    line = start + t * length * direction + bend
    end = max(0.6 * width, 0.7 * NATIVE_MM / _SHORT_FRAMES[0])
    _stroke(drawing, line, np.linspace(width, end, 7), tone(rng, bark))
    if depth == 0:
        return
    for _ in range(3):
        at = line[int(rng.integers(2, 7))]
        turn = rng.choice([-1, 1]) * rng.uniform(0.25, 0.9)
        _branch(drawing, rng, at, angle + turn, length * rng.uniform(0.5, 0.8), end, bark, depth - 1)


def draw_wires(drawing: Drawing, rng: np.random.Generator, outer: Box, unit: float) -> None:
    """Cables, masts with struts, and a mesh, against the sky or a surface."""
    (_sky if rng.random() < 0.6 else _surface)(drawing, rng, outer)
    reach = outer[2] - outer[0]
    for _ in range(70):
        angle, middle = rng.uniform(0, np.pi), rng.normal(size=2) * np.array([1800, 1200]) * unit
        direction = np.array([np.cos(angle), np.sin(angle)])
        t = np.linspace(-1, 1, 33)[:, None]
        line = middle + t * reach / 2 * direction + np.array([0, rng.uniform(0, 400) * unit]) * (1 - t**2)
        colour = tone(rng, pick(rng, _DARK)) if rng.random() < 0.7 else tone(rng, (226, 226, 220))
        _stroke(drawing, line, rng.uniform(*LINE_PX) * _short_px(rng), colour)
    for _ in range(4):
        corner, px = rng.normal(size=2) * np.array([900, 600]) * unit, _short_px(rng)
        step, width, lean = rng.uniform(4, 10) * px, rng.uniform(*LINE_PX) * px, rng.uniform(0, np.pi)
        along, across = np.array([np.cos(lean), np.sin(lean)]), np.array([-np.sin(lean), np.cos(lean)])
        count, colour = int(rng.integers(12, 30)), tone(rng, pick(rng, _DARK + PAINT))
        for number in range(count):
            for one, other in ((along, across), (across, along)):
                start = corner + number * step * one
                _segment(drawing, start, start + count * step * other, width, colour)


def draw_hair(drawing: Drawing, rng: np.random.Generator, outer: Box, unit: float) -> None:
    """Strands of hair or fur that cross at small angles."""
    skin = tone(rng, pick(rng, ((206, 166, 140), (150, 106, 80), (96, 68, 54), (120, 110, 96))))
    drawing.add(outer, Painter.gradient, outer, skin, tone(rng, skin, 0.2))
    for lock in range(60):
        near = lock < 40
        spread = np.array([1500, 1000]) * unit if near else np.array([outer[2], outer[3]]) / 2
        root, angle, hair = rng.normal(size=2) * spread, rng.uniform(0, 2 * np.pi), pick(rng, _HAIR)
        curl, px = rng.normal() * 0.7, _short_px(rng)
        for _ in range(36):
            t = np.linspace(0, 1, 12)
            turn = angle + curl * t + rng.normal() * 0.12
            step = rng.uniform(700, 1300) * unit / 11
            start = root + rng.normal(size=2) * 110 * unit
            line = start + np.cumsum(step * np.stack([np.cos(turn), np.sin(turn)], -1), axis=0)
            _stroke(drawing, line, rng.uniform(0.5, 1.4) * px, tone(rng, hair, 0.3))


def draw_fabric(drawing: Drawing, rng: np.random.Generator, outer: Box, unit: float) -> None:
    """Folded cloths with fine stripes, checks and ribs at every angle."""
    drawing.add(outer, Painter.material, outer, "cloth", (0.7, 0.7, 0.72))
    for number in range(34):
        spread = np.array([1500, 1000]) * unit if number < 24 else np.array([outer[2], outer[3]]) / 2
        middle, px = rng.normal(size=2) * spread, _short_px(rng)
        angle = rng.uniform(0, np.pi)
        ground, thread = tone(rng, pick(rng, CLOTH)), tone(rng, pick(rng, CLOTH), 0.3)
        side = float(rng.uniform(300, 700)) * unit
        _bundle(drawing, middle, angle, side, rng.uniform(1.6, 6) * px, 0.5, thread, ground)
        if rng.random() < 0.4:
            _bundle(drawing, middle, angle + np.pi / 2, side, rng.uniform(3, 9) * px, 0.3, thread, None)


def _bundle(
    drawing: Drawing,
    middle: Points,
    angle: float,
    side: float,
    period: float,
    share: float,
    colour: Colour,
    ground: Colour | None,
) -> None:
    """Parallel lines in a square of the given side; `share` of the period is line."""
    along, across = np.array([np.cos(angle), np.sin(angle)]), np.array([-np.sin(angle), np.cos(angle)])
    if ground is not None:
        corners = [middle + side / 2 * (a * along + b * across) for a, b in ((-1, -1), (1, -1), (1, 1), (-1, 1))]
        table = np.array(corners)
        box = (*table.min(axis=0).tolist(), *table.max(axis=0).tolist())
        drawing.add(box, Painter.polygon, table, ground)
    for at in np.arange(-side / 2, side / 2 - share * period, period):
        start = middle + (at + share * period / 2) * across - side / 2 * along
        _segment(drawing, start, start + side * along, share * period, colour)


def draw_lines(drawing: Drawing, rng: np.random.Generator, outer: Box, unit: float) -> None:
    """Lines, bundles and stars at all angles on plain and structured ground, light and dark, grey and coloured."""
    _surface(drawing, rng, outer)
    colours = (*_DARK, *PAPER, *PAINT, (200, 40, 40), (40, 70, 190), (30, 140, 70), (230, 190, 40))
    for number in range(60):
        spread = np.array([1500, 1000]) * unit if number < 44 else np.array([outer[2], outer[3]]) / 2
        middle, px, colour = rng.normal(size=2) * spread, _short_px(rng), tone(rng, pick(rng, colours))
        ground = tone(rng, pick(rng, colours)) if rng.random() < 0.7 else None
        side, angle = float(rng.uniform(150, 420)) * unit, rng.uniform(0, np.pi)
        kind = rng.random()
        if kind < 0.4:
            _bundle(drawing, middle, angle, side, rng.uniform(1.5, 8) * px, rng.uniform(0.3, 0.6), colour, ground)
        elif kind < 0.8:
            _bundle(drawing, middle, angle, side, rng.uniform(5, 20) * px, 0.15, colour, ground)
        else:
            count = int(rng.integers(12, 48))
            for spoke in range(count):
                direction = np.array([np.cos(angle + np.pi * spoke / count), np.sin(angle + np.pi * spoke / count)])
                start, end = middle - side * direction, middle + side * direction
                _segment(drawing, start, end, rng.uniform(*LINE_PX) * px, colour)


def draw_print(drawing: Drawing, rng: np.random.Generator, outer: Box, unit: float) -> None:
    """Printed pages with letters of 5 to 20 pixels on the short frames."""
    drawing.add(outer, Painter.material, outer, "wood", (0.7, 0.66, 0.6))
    for number in range(30):
        spread = np.array([1300, 900]) * unit if number < 20 else np.array([outer[2], outer[3]]) / 2
        x, y = (rng.normal(size=2) * spread).tolist()
        wide, high = rng.uniform(500, 1000) * unit, rng.uniform(600, 900) * unit
        page, inverse = (x, y, x + wide, y + high), rng.random() < 0.2
        paper = tone(rng, pick(rng, _DARK if inverse else PAPER))
        ink = tone(rng, pick(rng, PAPER if inverse else _DARK))
        drawing.add(page, Painter.rect, page, paper)
        px, top = _short_px(rng), y + 0.05 * high
        size = rng.uniform(5, 11) * px
        drawing.add(page, Painter.text, (x + 0.06 * wide, top), 2 * size, title(rng), ink, bold=True, fit=0.88 * wide)
        lines = np.arange(top + 3.2 * size, y + high - 1.6 * size, 1.5 * size)
        for line, at in enumerate(lines):
            drawing.add(page, Painter.text, (x + 0.06 * wide, at), size, sentence(line), ink, fit=0.88 * wide)


def draw_facades(drawing: Drawing, rng: np.random.Generator, outer: Box, unit: float) -> None:
    """Modern buildings: grids of windows with blinds, and railings."""
    _sky(drawing, rng, outer)
    x = outer[0]
    while x < outer[2]:
        width, top = rng.uniform(900, 2000) * unit, rng.uniform(outer[1], 0.3 * outer[1])
        wall = (x, float(top), x + width, outer[3])
        drawing.add(wall, Painter.material, wall, pick(rng, ("plaster", "slabs", "brick")), (0.8, 0.8, 0.8))
        pitch_x, pitch_y = rng.uniform(90, 240) * unit, rng.uniform(110, 260) * unit
        frame, glass = tone(rng, pick(rng, PAINT)), tone(rng, (60, 76, 88))
        inside = abs(x) < 4200 * unit
        for left in np.arange(x + 0.2 * pitch_x, x + width - 0.9 * pitch_x, pitch_x):
            for row in np.arange(float(top) + 0.3 * pitch_y, outer[3] if inside else 0.5 * outer[3], pitch_y):
                pane = (left, row, left + 0.62 * pitch_x, row + 0.6 * pitch_y)
                drawing.add(pane, Painter.rect, pane, tone(rng, glass, 0.3), smallest=0.3 * pitch_x)
                if not abs(row) < 2200 * unit or not inside:
                    continue
                px, kind = _short_px(rng), rng.random()
                if kind < 0.5:  # blinds
                    for at in np.arange(row, row + rng.uniform(0.2, 0.6) * pitch_y, rng.uniform(1.6, 4) * px):
                        slat = (left, at, left + 0.62 * pitch_x, at + 0.8 * px)
                        drawing.add(slat, Painter.rect, slat, frame, smallest=0.8 * px)
                elif kind < 0.75:  # a railing
                    for at in np.arange(left, left + 0.62 * pitch_x, rng.uniform(2, 5) * px):
                        bar = (at, row + 0.35 * pitch_y, at + rng.uniform(0.7, 1.4) * px, row + 0.6 * pitch_y)
                        drawing.add(bar, Painter.rect, bar, frame, smallest=0.7 * px)
        x += width


SUBJECTS: dict[str, Callable[[Drawing, np.random.Generator, Box, float], None]] = {
    "twigs": draw_twigs,
    "wires": draw_wires,
    "hair": draw_hair,
    "fabric": draw_fabric,
    "lines": draw_lines,
    "print": draw_print,
    "facades": draw_facades,
}
"""As `scenery.subjects.SUBJECTS`."""

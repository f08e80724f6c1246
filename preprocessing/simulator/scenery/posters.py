"""The subject posters: a wall with posters, notices, maps, timetables and test charts, from large to small print."""

from collections.abc import Callable

import numpy as np

from preprocessing.simulator.scenery.canvas import Box, Colour
from preprocessing.simulator.scenery.drawing import Drawing
from preprocessing.simulator.scenery.painter import Painter
from preprocessing.simulator.scenery.words import (
    CLOTH,
    INK,
    PAINT,
    PAPER,
    author,
    date,
    figures,
    pick,
    sentence,
    shop,
    tint,
    title,
    tone,
)

# Few font sizes, so that rendered lines of small print can be cached.
_SIZES = tuple(9.0 * 1.25**step for step in range(24))

Sheet = Callable[[Drawing, np.random.Generator, Box], None]


def draw_posters(drawing: Drawing, rng: np.random.Generator, outer: Box, unit: float) -> None:
    wall = pick(rng, ("brick", "plaster", "wood", "stone"))
    drawing.add(outer, Painter.material, outer, wall, tint(rng, (0.82, 0.81, 0.79)))
    left, top, right, bottom = outer
    spread = np.array([right - left, bottom - top]) / 2
    # (count, width, reach): large sheets anywhere, small ones around the centre, which long focal lengths see.
    for number, width, reach in ((26, 2400, 1.0), (60, 1300, 0.8), (70, 720, 0.42), (60, 420, 0.2), (34, 260, 0.11)):
        for _ in range(number):
            centre = np.clip(rng.uniform(-1, 1, 2) * reach, -1, 1) * spread
            wide = width * rng.uniform(0.75, 1.3) * unit
            high = wide * pick(rng, (1.414, 1.414, 1.3, 0.707, 1.0))
            x, y = (centre - 0.5 * np.array([wide, high])).tolist()
            _sheet(drawing, rng, (x, y, x + wide, y + high), unit)


def _sheet(drawing: Drawing, rng: np.random.Generator, box: Box, unit: float) -> None:
    left, top, right, bottom = box
    lift = 0.006 * (right - left) + 3 * unit
    cast = (left + lift, top + lift, right + lift, bottom + lift)
    around = (left - 4 * lift, top - 4 * lift, right + 5 * lift, bottom + 5 * lift)
    drawing.add(around, Painter.shadow, cast, 1.5 * lift, 0.42)
    sheets: tuple[Sheet, ...] = (_event, _event, _notice, _notice, _landscape, _timetable, _chart, _map)
    kind = pick(rng, sheets)
    kind(drawing, rng, box)
    # Folds and weathering: paper is never quite flat.
    fold = (1.0, 0.97, 1.03, 0.96, 1.0) if rng.random() < 0.5 else (1.02, 1.0, 0.97, 0.98)
    drawing.add(box, Painter.shade, box, fold, horizontal=bool(rng.random() < 0.5))
    if rng.random() < 0.5:
        _tape(drawing, rng, box)


def _tape(drawing: Drawing, rng: np.random.Generator, box: Box) -> None:
    left, top, right, _ = box
    wide = 0.1 * (right - left)
    for x in (left + 0.06 * (right - left), right - 0.06 * (right - left) - wide):
        strip = (x, top - 0.22 * wide, x + wide, top + 0.22 * wide)
        drawing.add(strip, Painter.rect, strip, tone(rng, (206, 196, 162)))


def _size(value: float) -> float:
    return min(_SIZES, key=lambda size: abs(np.log(size / max(value, 1e-6))))


def _paper(drawing: Drawing, rng: np.random.Generator, box: Box, colour: Colour) -> None:
    dye = (colour[0] / 236, colour[1] / 234, colour[2] / 228)
    drawing.add(box, Painter.material, box, "paper", dye, (int(rng.integers(64)) * 8, int(rng.integers(64)) * 8))


def _line(
    drawing: Drawing, x: float, y: float, size: float, text: str, ink: Colour, fit: float, bold: bool = False
) -> None:
    area = (x, y, x + fit, y + 1.3 * size)
    drawing.add(area, Painter.text, (x, y), size, text, ink, bold=bold, fit=fit, smallest=size / 1.2)


def _paragraph(drawing: Drawing, rng: np.random.Generator, box: Box, size: float, ink: Colour) -> None:
    """Fill a box with lines of small print."""
    left, top, right, bottom = box
    size = _size(size)
    first = int(rng.integers(48))
    for number in range(int((bottom - top) / (1.45 * size))):
        if number % 7 == 6:
            continue
        y = top + 1.45 * size * number
        _line(drawing, left, y, size, sentence(first + number), ink, (right - left) * (0.6 if number % 7 == 5 else 1))


def _event(drawing: Drawing, rng: np.random.Generator, box: Box) -> None:
    left, top, right, bottom = box
    wide, high = right - left, bottom - top
    ground, ink = tone(rng, pick(rng, (*CLOTH, *PAINT))), pick(rng, PAPER)
    if sum(ground) > 400:
        ink = pick(rng, INK)
    _paper(drawing, rng, box, ground)
    art = (left + 0.08 * wide, top + 0.30 * high, right - 0.08 * wide, top + 0.72 * high)
    _artwork(drawing, rng, art)
    _line(drawing, left + 0.08 * wide, top + 0.06 * high, 0.17 * min(wide, high), title(rng), ink, 0.84 * wide, True)
    _line(drawing, left + 0.08 * wide, top + 0.22 * high, 0.06 * min(wide, high), author(rng), ink, 0.8 * wide)
    _line(drawing, left + 0.08 * wide, top + 0.75 * high, 0.08 * min(wide, high), date(rng), ink, 0.8 * wide, True)
    _line(drawing, left + 0.08 * wide, top + 0.85 * high, 0.045 * min(wide, high), shop(rng), ink, 0.6 * wide)
    small = (left + 0.08 * wide, top + 0.91 * high, right - 0.08 * wide, bottom - 0.02 * high)
    _paragraph(drawing, rng, small, 0.022 * min(wide, high), ink)


def _artwork(drawing: Drawing, rng: np.random.Generator, box: Box) -> None:
    """A screen print: overlapping discs, bars or leaves in three colours."""
    left, top, right, bottom = box
    wide, high = right - left, bottom - top
    drawing.add(box, Painter.rect, box, tone(rng, pick(rng, CLOTH)))
    form = int(rng.integers(3))
    for number in range(int(rng.integers(4, 9))):
        colour = tone(rng, pick(rng, CLOTH))
        if form == 0:
            radius = rng.uniform(0.08, 0.3) * high
            x, y = rng.uniform(left + radius, right - radius), rng.uniform(top + radius, bottom - radius)
            drawing.add(box, Painter.ellipse, (x, y), (radius, radius), colour)
            drawing.add(box, Painter.ellipse, (x, y), (0.6 * radius, 0.6 * radius), tone(rng, pick(rng, PAPER)))
        elif form == 1:
            x = left + wide * number / 9
            bar = (x, bottom - rng.uniform(0.2, 0.95) * high, x + 0.08 * wide, bottom)
            drawing.add(box, Painter.rect, bar, colour)
        else:
            corners = np.array([left, top]) + rng.random((3, 2)) * np.array([wide, high])
            drawing.add(box, Painter.polygon, corners, colour)


def _notice(drawing: Drawing, rng: np.random.Generator, box: Box) -> None:
    left, top, right, bottom = box
    wide, high = right - left, bottom - top
    ink = pick(rng, INK)
    _paper(drawing, rng, box, tone(rng, pick(rng, PAPER), 0.03))
    _line(drawing, left + 0.1 * wide, top + 0.06 * high, 0.09 * min(wide, high), title(rng), ink, 0.8 * wide, True)
    rule = (left + 0.1 * wide, top + 0.19 * high, right - 0.1 * wide, top + 0.195 * high)
    drawing.add(rule, Painter.rect, rule, ink, smallest=0.005 * high)
    columns = 2 if wide > 0.9 * high else 1
    size = rng.uniform(0.022, 0.036) * min(wide, high)
    for number in range(columns):
        x = left + (0.1 + 0.42 * number) * wide
        text = (x, top + 0.24 * high, x + (0.38 if columns == 2 else 0.8) * wide, bottom - 0.2 * high)
        _paragraph(drawing, rng, text, size, ink)
    _line(drawing, left + 0.1 * wide, bottom - 0.14 * high, 0.05 * min(wide, high), date(rng), ink, 0.8 * wide)
    if rng.random() < 0.5:
        _code(drawing, rng, (right - 0.25 * wide, bottom - 0.2 * wide, right - 0.1 * wide, bottom - 0.05 * wide), ink)


def _code(drawing: Drawing, rng: np.random.Generator, box: Box, ink: Colour) -> None:
    """A square of black and white cells."""
    left, top, right, _ = box
    cells = 21
    step = (right - left) / cells
    bits = rng.random((cells, cells)) < 0.5
    for row, column in ((0, 0), (0, 14), (14, 0)):
        ring = np.ones((7, 7), bool)
        ring[1:6, 1:6] = False
        ring[2:5, 2:5] = True
        bits[row : row + 7, column : column + 7] = ring
    picture = np.where(bits[..., None], np.array(ink), 240).astype(np.uint8).repeat(6, 0).repeat(6, 1)
    drawing.add(box, Painter.picture, (left, top, left + cells * step, top + cells * step), picture)


def _landscape(drawing: Drawing, rng: np.random.Generator, box: Box) -> None:
    """A print of layered hills under a sky, with a white border and a caption."""
    left, top, right, bottom = box
    wide, high = right - left, bottom - top
    _paper(drawing, rng, box, tone(rng, pick(rng, PAPER), 0.03))
    view = (left + 0.05 * wide, top + 0.05 * high, right - 0.05 * wide, bottom - 0.14 * high)
    sky, haze = tone(rng, (118, 146, 176)), tone(rng, (214, 206, 194))
    drawing.add(view, Painter.gradient, view, sky, haze)
    sun = (rng.uniform(view[0] + 0.2 * wide, view[2] - 0.2 * wide), top + 0.25 * high)
    drawing.add(view, Painter.ellipse, sun, (0.05 * wide, 0.05 * wide), (238, 226, 196))
    ground = np.array(tone(rng, pick(rng, ((64, 84, 56), (88, 76, 60), (60, 72, 84)))))
    x = np.linspace(view[0], view[2], 160)
    for layer in range(5):
        depth = (layer + 1) / 5
        waves = sum(np.sin((x - left) / wide * 6.28 * f + rng.uniform(0, 6.28)) / f for f in (1, 2.3, 5.1, 11.7, 23.0))
        ridge = top + high * (0.30 + 0.10 * layer) + 0.05 * high * np.asarray(waves)
        outline = np.concatenate(
            [np.stack([x, np.minimum(ridge, view[3])], -1), [[view[2], view[3]], [view[0], view[3]]]]
        )
        colour = tuple((np.array(haze) * (1 - depth) + ground * depth).tolist())
        drawing.add(view, Painter.polygon, outline, colour)
    drawing.add(view, Painter.grain, view, 0.10, 1.0, int(rng.integers(64)) * 8)
    ink = pick(rng, INK)
    _line(drawing, left + 0.05 * wide, bottom - 0.11 * high, 0.06 * min(wide, high), title(rng), ink, 0.6 * wide)


def _timetable(drawing: Drawing, rng: np.random.Generator, box: Box) -> None:
    left, top, right, bottom = box
    wide, high = right - left, bottom - top
    ink = pick(rng, INK)
    _paper(drawing, rng, box, tone(rng, pick(rng, PAPER), 0.03))
    head = (left, top, right, top + 0.14 * high)
    drawing.add(head, Painter.rect, head, tone(rng, pick(rng, PAINT)))
    place = f"{title(rng)} Line"
    _line(
        drawing,
        left + 0.06 * wide,
        top + 0.04 * high,
        0.06 * min(wide, high),
        place,
        (232, 228, 216),
        0.8 * wide,
        True,
    )
    rows = int(rng.integers(14, 30))
    step = 0.8 * high / rows
    first = int(rng.integers(32))
    for row in range(rows):
        y = top + 0.17 * high + row * step
        if row % 2 == 0:
            stripe = (left + 0.04 * wide, y, right - 0.04 * wide, y + step)
            drawing.add(stripe, Painter.rect, stripe, tone(rng, (210, 208, 200), 0.01), smallest=step / 2)
        size = _size(0.6 * step)
        _line(drawing, left + 0.06 * wide, y + 0.2 * step, size, shop(np.random.default_rng(row)), ink, 0.3 * wide)
        _line(drawing, left + 0.40 * wide, y + 0.2 * step, size, figures(first + row), ink, 0.54 * wide)


def _chart(drawing: Drawing, rng: np.random.Generator, box: Box) -> None:
    """A lens test chart: gratings down to single canvas pixels, a star, grey steps."""
    left, top, right, bottom = box
    wide, high = right - left, bottom - top
    dark, light = (34.0, 34.0, 36.0), (228.0, 226.0, 220.0)
    _paper(drawing, rng, box, (234, 232, 228))
    periods = [0.06 * wide / 1.35**step for step in range(14)]
    upright = (left + 0.06 * wide, top + 0.06 * high, left + 0.34 * wide, bottom - 0.2 * high)
    drawing.add(upright, Painter.grating, upright, periods, False, dark, light)
    flat = (left + 0.38 * wide, top + 0.06 * high, left + 0.60 * wide, bottom - 0.2 * high)
    drawing.add(flat, Painter.grating, flat, periods, True, dark, light)
    centre = np.array([left + 0.79 * wide, top + 0.06 * high + 0.17 * wide])
    radius, spokes = 0.16 * wide, 36
    for spoke in range(spokes):
        angles = 2 * np.pi * (spoke + np.array([0.0, 0.5])) / spokes
        rim = centre + radius * np.stack([np.cos(angles), np.sin(angles)], -1)
        drawing.add(box, Painter.polygon, np.concatenate([centre[None], rim]), dark)
    for number in range(8):
        x = left + (0.64 + 0.038 * number) * wide
        step = (x, top + 0.55 * high, x + 0.038 * wide, top + 0.68 * high)
        value = 30 + 28.0 * number
        drawing.add(step, Painter.rect, step, (value, value, value))
    _paragraph(
        drawing,
        rng,
        (left + 0.64 * wide, top + 0.71 * high, right - 0.05 * wide, bottom - 0.2 * high),
        0.02 * wide,
        dark,
    )
    _line(
        drawing, left + 0.06 * wide, bottom - 0.15 * high, 0.07 * min(wide, high), "Lens test", dark, 0.5 * wide, True
    )


def _map(drawing: Drawing, rng: np.random.Generator, box: Box) -> None:
    """A street map: blocks, roads of three widths, a river, names."""
    left, top, right, bottom = box
    wide, high = right - left, bottom - top
    drawing.add(box, Painter.rect, box, tone(rng, (216, 210, 192), 0.03))
    for _ in range(6):
        x, y = rng.uniform(left, right - 0.2 * wide), rng.uniform(top, bottom - 0.2 * high)
        park = (x, y, x + rng.uniform(0.05, 0.2) * wide, y + rng.uniform(0.05, 0.2) * high)
        drawing.add(park, Painter.rect, park, tone(rng, (176, 190, 152)))
    t = np.linspace(0, 1, 60)
    river = np.stack([left + t * wide, top + high * (0.5 + 0.16 * np.sin(5 * t + rng.uniform(0, 6)))], -1)
    drawing.add(box, Painter.line, river, 0.05 * wide, (148, 172, 188))
    for number in range(46):
        width = (0.014, 0.007, 0.004)[number % 3] * wide
        at = rng.uniform(0.03, 0.97)
        slope = rng.normal() * 0.05
        across = number % 2 == 0
        ends = (
            [[left, top + at * high], [right, top + np.clip(at + slope, 0, 1) * high]]
            if across
            else [[left + at * wide, top], [left + np.clip(at + slope, 0, 1) * wide, bottom]]
        )
        drawing.add(box, Painter.line, ends, 1.5 * width, (140, 132, 118), smallest=width / 3)
        drawing.add(
            box, Painter.line, ends, width, (242, 236, 214) if number % 3 else (226, 190, 120), smallest=width / 3
        )
    for _ in range(26):
        x, y = rng.uniform(left, right - 0.2 * wide), rng.uniform(top, bottom - 0.05 * high)
        _line(drawing, x, y, _size(0.018 * wide), title(rng), (60, 56, 52), 0.18 * wide)
    rim = 0.02 * wide
    for edge in (
        (left, top, right, top + rim),
        (left, bottom - rim, right, bottom),
        (left, top, left + rim, bottom),
        (right - rim, top, right, bottom),
    ):
        drawing.add(edge, Painter.rect, edge, (236, 232, 222))

"""The subject street: brick, stone and plaster houses with curtained windows, shops with signs, roofs, sky."""

import numpy as np

from preprocessing.simulator.scenery.canvas import Box, Colour
from preprocessing.simulator.scenery.drawing import Drawing
from preprocessing.simulator.scenery.painter import Painter
from preprocessing.simulator.scenery.words import INK, PAINT, PAPER, date, pick, sentence, shop, tint, title, tone

_CREAM = (222.0, 216.0, 202.0)


def draw_street(drawing: Drawing, rng: np.random.Generator, outer: Box, unit: float) -> None:
    left, _, right, bottom = outer
    ground = rng.uniform(1500, 2300) * unit
    _sky(drawing, rng, outer, unit)
    x = left - rng.uniform(0, 2500) * unit
    while x < right:
        width = rng.uniform(3000, 5200) * unit
        storeys = int(rng.integers(3, 6))
        _house(drawing, rng, (x, ground, x + width, bottom), storeys, unit)
        x += width
    pavement = (left, ground, right, ground + 900 * unit)
    drawing.add(pavement, Painter.material, pavement, "slabs", (0.95, 0.94, 0.92))
    drawing.add(pavement, Painter.shade, pavement, (0.6, 0.95, 1.0, 1.0, 0.9))
    road = (left, ground + 900 * unit, right, bottom)
    drawing.add(road, Painter.material, road, "soil", (0.78, 0.84, 0.95))
    drawing.add(road, Painter.shade, road, (0.55, 1.0, 1.1, 1.15))
    edge = (left, ground + 900 * unit, right, ground + 980 * unit)
    drawing.add(edge, Painter.material, edge, "stone", (0.9, 0.9, 0.9))


def _sky(drawing: Drawing, rng: np.random.Generator, outer: Box, unit: float) -> None:
    high, low = tone(rng, (104, 138, 178)), tone(rng, (206, 208, 206))
    drawing.add(outer, Painter.gradient, (outer[0], outer[1], outer[2], 0.0), high, low)
    above = (outer[0], outer[1], outer[2], -1500 * unit)
    drawing.add(above, Painter.clouds, above, int(rng.integers(64)) * 8, 4200 * unit)


def _house(drawing: Drawing, rng: np.random.Generator, place: Box, storeys: int, unit: float) -> None:
    """One house on `place`: (left, ground, right, unused)."""
    left, ground, right, _ = place
    storey = rng.uniform(1350, 1750) * unit
    shop_high = rng.uniform(1500, 1900) * unit
    top = ground - shop_high - storeys * storey
    wall = (left, top, right, ground)
    name = pick(rng, ("brick", "brick", "stone", "plaster", "wood"))
    wash = tint(rng, pick(rng, ((1.0, 1.0, 1.0), (0.9, 0.86, 0.8), (0.82, 0.86, 0.88), (1.0, 0.92, 0.8))))
    _roof(drawing, rng, (left, top, right, ground), unit)
    drawing.add(wall, Painter.material, wall, name, wash, (int(rng.integers(64)) * 8, int(rng.integers(64)) * 8))
    count = int(rng.integers(3, 5))
    step = (right - left) / count
    frame = tone(rng, pick(rng, (_CREAM, *PAINT)))
    wide, high = min(0.56 * step, 860 * unit), 0.64 * storey
    for row in range(storeys):
        y = top + (row + 0.22) * storey
        for column in range(count):
            x = left + (column + 0.5) * step - wide / 2
            _window(drawing, rng, (x, y, x + wide, y + high), frame, unit)
        if rng.random() < 0.6:
            course = (left, top + row * storey + 0.03 * storey, right, top + row * storey + 0.07 * storey)
            _ledge(drawing, rng, course, unit)
    _ledge(drawing, rng, (left - 30 * unit, top - 60 * unit, right + 30 * unit, top + 70 * unit), unit)
    _front(drawing, rng, (left, ground - shop_high, right, ground), unit)
    pipe = (right - 90 * unit, top, right - 40 * unit, ground)
    drawing.add(pipe, Painter.rect, pipe, tone(rng, (84, 84, 82)))
    drawing.add(pipe, Painter.shade, pipe, (0.6, 1.2, 1.0, 0.5), horizontal=True)


def _roof(drawing: Drawing, rng: np.random.Generator, wall: Box, unit: float) -> None:
    left, top, right, _ = wall
    rise = rng.uniform(700, 1200) * unit
    roof = (left, top - rise, right, top)
    drawing.add(roof, Painter.material, roof, "rooftiles", tint(rng, (0.8, 0.8, 0.82)))
    drawing.add(roof, Painter.shade, roof, (0.8, 1.0, 1.1))
    for _ in range(2):
        x = rng.uniform(left + 200 * unit, right - 500 * unit)
        stack = (x, top - rise - 420 * unit, x + 300 * unit, top - 0.4 * rise)
        drawing.add(stack, Painter.material, stack, "brick", (0.8, 0.78, 0.76))
        drawing.add(stack, Painter.shade, stack, (1.1, 1.0, 0.7), horizontal=True)


def _ledge(drawing: Drawing, rng: np.random.Generator, box: Box, unit: float) -> None:
    left, _, right, bottom = box
    under = (left, bottom, right, bottom + 90 * unit)
    drawing.add(under, Painter.shade, under, (0.5, 0.8, 1.0))
    drawing.add(box, Painter.material, box, "stone", (1.05, 1.04, 1.0), (int(rng.integers(64)) * 8, 40))
    drawing.add(box, Painter.shade, box, (1.12, 1.0, 0.8))


def _window(drawing: Drawing, rng: np.random.Generator, box: Box, frame: Colour, unit: float) -> None:
    left, top, right, bottom = box
    rim = 46 * unit
    lintel = (left - 1.6 * rim, top - 2.8 * rim, right + 1.6 * rim, top - 0.6 * rim)
    drawing.add(lintel, Painter.material, lintel, "stone", (1.0, 0.99, 0.96))
    drawing.add(lintel, Painter.shade, lintel, (1.1, 1.0, 0.82))
    outside = (left - rim, top - rim, right + rim, bottom + rim)
    drawing.add(outside, Painter.rect, outside, tuple(0.45 * channel for channel in frame))
    # Glass: a dark room with a paler reflection of the sky.
    glass, pale = tone(rng, (40, 48, 54)), tone(rng, (116, 132, 142))
    drawing.add(box, Painter.gradient, box, pale if rng.random() < 0.6 else glass, glass)
    lean = rng.uniform(-0.4, 0.4) * (right - left)
    middle = (left + right) / 2
    wide = right - left
    streak = [[middle + lean, top], [middle + lean + 0.25 * wide, top], [middle + 0.1 * wide, bottom]]
    streak.append([middle - 0.15 * wide, bottom])
    inside = [[min(max(x, left), right), y] for x, y in streak]
    drawing.add(box, Painter.polygon, inside, tuple(0.5 * (a + b) for a, b in zip(glass, pale, strict=True)))
    if rng.random() < 0.7:
        _curtains(drawing, rng, box)
    columns, rows = int(rng.integers(2, 4)), int(rng.integers(2, 5))
    for line in range(columns + 1):
        x = left + (right - left) * line / columns
        bar = (x - 0.32 * rim, top - 0.5 * rim, x + 0.32 * rim, bottom + 0.5 * rim)
        drawing.add(bar, Painter.rect, bar, frame)
        drawing.add(bar, Painter.shade, bar, (1.15, 1.0, 0.7), horizontal=True)
    for line in range(rows + 1):
        y = top + (bottom - top) * line / rows
        bar = (left - 0.5 * rim, y - 0.32 * rim, right + 0.5 * rim, y + 0.32 * rim)
        drawing.add(bar, Painter.rect, bar, frame)
        drawing.add(bar, Painter.shade, bar, (1.15, 1.0, 0.7))
    shade = (left, top, right, top + 3 * rim)
    drawing.add(shade, Painter.shade, shade, (0.5, 0.85, 1.0))
    sill = (left - 2 * rim, bottom + rim, right + 2 * rim, bottom + 2.4 * rim)
    _ledge(drawing, rng, sill, unit)
    if rng.random() < 0.35:
        _flowers(drawing, rng, (left, bottom - 2.2 * rim, right, bottom + rim), unit)


def _curtains(drawing: Drawing, rng: np.random.Generator, box: Box) -> None:
    left, top, right, bottom = box
    cloth = tone(rng, pick(rng, ((196, 188, 172), (150, 96, 84), (112, 128, 136), (176, 160, 120))))
    dye = (cloth[0] / 190, cloth[1] / 190, cloth[2] / 190)
    share = rng.uniform(0.16, 0.36) * (right - left)
    for side in ((left, top, left + share, bottom), (right - share, top, right, bottom)):
        drawing.add(side, Painter.material, side, "cloth", dye)
        drawing.add(side, Painter.shade, side, (0.6, 0.95, 0.55, 0.9, 0.5, 0.85, 0.6), horizontal=True)


def _flowers(drawing: Drawing, rng: np.random.Generator, box: Box, unit: float) -> None:
    left, top, right, bottom = box
    tub = (left, (top + bottom) / 2, right, bottom)
    drawing.add(tub, Painter.material, tub, "wood", (0.7, 0.62, 0.56))
    petals = tone(rng, pick(rng, ((170, 70, 74), (190, 150, 80), (150, 100, 140), (206, 200, 196))))
    for _ in range(46):
        x, y = rng.uniform(left, right), rng.normal((top + bottom) / 2 - 10 * unit, 34 * unit)
        radius = rng.uniform(14, 30) * unit
        area = (x - radius, y - radius, x + radius, y + radius)
        green = tone(rng, (72, 96, 54), 0.2)
        colour = petals if rng.random() < 0.3 else green
        drawing.add(area, Painter.ellipse, (x, y), (radius, 0.6 * radius), tone(rng, colour), smallest=radius / 2)


def _front(drawing: Drawing, rng: np.random.Generator, box: Box, unit: float) -> None:
    """A shop front: sign, lit window with goods and notices, a door with a number."""
    left, top, right, bottom = box
    wide, high = right - left, bottom - top
    paint = tone(rng, pick(rng, PAINT))
    drawing.add(box, Painter.material, box, "wood", tuple(channel / 128 for channel in paint), turned=True)
    drawing.add(box, Painter.shade, box, (0.8, 1.0, 1.0, 0.9))
    sign = (left + 0.03 * wide, top + 0.04 * high, right - 0.03 * wide, top + 0.24 * high)
    drawing.add(sign, Painter.material, sign, "wood", tuple(channel / 160 for channel in paint))
    letters = _CREAM if sum(paint) < 380 else (52.0, 46.0, 42.0)
    name = shop(rng)
    at = (sign[0] + 0.08 * wide, sign[1] + 0.04 * high)
    drawing.add(sign, Painter.text, at, 0.11 * high, name, letters, bold=True, fit=0.8 * wide)
    door_left = right - 0.26 * wide
    pane = (left + 0.05 * wide, top + 0.30 * high, door_left - 0.04 * wide, bottom - 0.2 * high)
    _shop_window(drawing, rng, pane, unit)
    _door(drawing, rng, (door_left, top + 0.3 * high, right - 0.06 * wide, bottom), unit)


def _shop_window(drawing: Drawing, rng: np.random.Generator, pane: Box, unit: float) -> None:
    left, top, right, bottom = pane
    high = bottom - top
    rim = (left - 40 * unit, top - 40 * unit, right + 40 * unit, bottom + 40 * unit)
    drawing.add(rim, Painter.rect, rim, (54, 50, 46))
    drawing.add(pane, Painter.gradient, pane, (70, 66, 58), (128, 112, 88))
    for shelf in range(3):
        y = top + (0.34 + 0.32 * shelf) * high
        x = left + 20 * unit
        while x < right - 160 * unit:
            goods = rng.uniform(50, 170) * unit
            tall = rng.uniform(0.10, 0.25) * high
            item = (x, y - tall, x + goods, y)
            colour = tone(
                rng, pick(rng, ((150, 96, 64), (176, 150, 104), (92, 108, 96), (120, 60, 54), (196, 188, 170)))
            )
            drawing.add(item, Painter.rect, item, colour)
            drawing.add(item, Painter.shade, item, (0.6, 1.1, 1.0, 0.55), horizontal=True)
            tag = (x + 0.15 * goods, y - 0.6 * tall, x + 0.85 * goods, y - 0.3 * tall)
            drawing.add(tag, Painter.rect, tag, _CREAM)
            price = f"{int(rng.integers(1, 40))}.{int(rng.integers(10)) * 10:02d}"
            drawing.add(tag, Painter.text, (tag[0], tag[1]), 0.24 * tall, price, (50, 44, 40), fit=0.7 * goods)
            x += goods + rng.uniform(10, 60) * unit
        board = (left, y, right, y + 22 * unit)
        drawing.add(board, Painter.material, board, "wood", (0.8, 0.72, 0.62))
    for _ in range(2):
        _bill(drawing, rng, pane, unit)


def _bill(drawing: Drawing, rng: np.random.Generator, pane: Box, unit: float) -> None:
    """A notice on the glass."""
    wide = rng.uniform(240, 380) * unit
    high = 1.35 * wide
    x = rng.uniform(pane[0], max(pane[0] + 1, pane[2] - wide))
    y = rng.uniform(pane[1], max(pane[1] + 1, pane[3] - high))
    sheet = (x, y, x + wide, y + high)
    ink = pick(rng, INK)
    drawing.add(sheet, Painter.material, sheet, "paper", tuple(channel / 240 for channel in pick(rng, PAPER)))
    drawing.add(
        sheet, Painter.text, (x + 0.1 * wide, y + 0.06 * high), 0.13 * high, title(rng), ink, bold=True, fit=0.8 * wide
    )
    drawing.add(sheet, Painter.text, (x + 0.1 * wide, y + 0.24 * high), 0.07 * high, date(rng), ink, fit=0.8 * wide)
    size = 14 * unit
    for line in range(int(0.58 * high / (1.5 * size))):
        at = (x + 0.1 * wide, y + 0.38 * high + 1.5 * size * line)
        drawing.add(sheet, Painter.text, at, size, sentence(line), ink, fit=0.8 * wide, smallest=size / 1.2)


def _door(drawing: Drawing, rng: np.random.Generator, box: Box, unit: float) -> None:
    left, top, right, bottom = box
    wide, high = right - left, bottom - top
    paint = tone(rng, pick(rng, PAINT))
    drawing.add(box, Painter.rect, box, tuple(0.5 * channel for channel in paint))
    leaf = (left + 0.05 * wide, top + 0.04 * high, right - 0.05 * wide, bottom)
    drawing.add(leaf, Painter.material, leaf, "wood", tuple(channel / 128 for channel in paint), turned=True)
    for row in range(2):
        for column in range(2):
            x, y = leaf[0] + (0.1 + 0.45 * column) * wide, leaf[1] + (0.08 + 0.46 * row) * high
            panel = (x, y, x + 0.33 * wide, y + 0.36 * high)
            drawing.add(panel, Painter.shade, panel, (0.6, 0.95, 1.0, 1.0, 1.2))
            drawing.add(panel, Painter.shade, panel, (0.7, 0.98, 1.0, 1.0, 1.15), horizontal=True)
    knob = (leaf[0] + 0.84 * wide, leaf[1] + 0.52 * high)
    area = (knob[0] - 40 * unit, knob[1] - 40 * unit, knob[0] + 40 * unit, knob[1] + 40 * unit)
    drawing.add(area, Painter.ellipse, knob, (22 * unit, 22 * unit), (176, 148, 92))
    drawing.add(area, Painter.ellipse, (knob[0] - 6 * unit, knob[1] - 6 * unit), (8 * unit, 8 * unit), (232, 214, 168))
    number = str(int(rng.integers(1, 180)))
    drawing.add(
        box, Painter.text, (left + 0.36 * wide, top + 0.05 * high), 110 * unit, number, (226, 214, 178), bold=True
    )

"""The subject library: shelves of books of all sizes with titles on their spines and call numbers on labels."""

import numpy as np

from preprocessing.simulator.scenery.canvas import Box
from preprocessing.simulator.scenery.drawing import Drawing
from preprocessing.simulator.scenery.painter import Painter
from preprocessing.simulator.scenery.words import CLOTH, author, pick, title, tone

_GOLD = (196, 168, 104)
_ROUND = (0.52, 0.86, 1.04, 1.10, 1.02, 0.92, 0.66)


def draw_library(drawing: Drawing, rng: np.random.Generator, outer: Box, unit: float) -> None:
    left, top, right, bottom = outer
    drawing.add(outer, Painter.material, outer, "wood", (0.30, 0.27, 0.25))
    board = 44 * unit
    bay = rng.uniform(2300, 3000) * unit
    post = 64 * unit
    first_bay = -rng.uniform(0.25, 0.75) * bay
    y = -rng.uniform(300, 620) * unit
    rows = []
    while y > top:
        y -= rng.uniform(470, 640) * unit
    while y < bottom:
        height = rng.uniform(470, 640) * unit
        rows.append((y, height))
        y += height
    num_left = int(np.ceil((first_bay - left) / bay))
    starts = np.arange(first_bay - num_left * bay, right, bay)
    for y, height in rows:
        for start in starts:
            _shelf(drawing, rng, (float(start) + post, y, float(start + bay), y + height - board), unit)
        plank = (left, y + height - board, right, y + height)
        drawing.add(plank, Painter.material, plank, "wood", (0.74, 0.66, 0.58))
        drawing.add(plank, Painter.shade, plank, (1.25, 1.0, 0.72))
        under = (left, y + height, right, y + height + 150 * unit)
        drawing.add(under, Painter.shade, under, (0.45, 0.72, 0.9, 1.0))
    for start in starts:
        upright = (float(start), top, float(start) + post, bottom)
        drawing.add(upright, Painter.material, upright, "wood", (0.78, 0.70, 0.62), turned=True)
        drawing.add(upright, Painter.shade, upright, (0.7, 1.1, 1.0, 0.6), horizontal=True)


def _shelf(drawing: Drawing, rng: np.random.Generator, box: Box, unit: float) -> None:
    left, top, right, bottom = box
    x = left + rng.uniform(0, 20) * unit
    room = bottom - top
    while x < right - 30 * unit:
        run = int(rng.integers(2, 9))
        set_of_books = rng.random() < 0.35
        cloth = pick(rng, CLOTH)
        width = rng.lognormal(np.log(78), 0.36) * unit
        high = room * rng.uniform(0.66, 0.93)
        name, writer = title(rng), author(rng)
        for volume in range(run):
            if not set_of_books:
                cloth, name, writer = pick(rng, CLOTH), title(rng), author(rng)
                width = rng.lognormal(np.log(78), 0.36) * unit
                high = room * rng.uniform(0.62, 0.94)
            width = float(np.clip(width, 30 * unit, 190 * unit))
            if x + width > right:
                return
            spine = (x, bottom - high, x + width, bottom)
            _book(drawing, rng, spine, tone(rng, cloth), f"{name} {volume + 1}" if set_of_books else name, writer, unit)
            x += width + rng.uniform(0.5, 3) * unit
        if rng.random() < 0.16:
            x += rng.uniform(60, 320) * unit


def _book(
    drawing: Drawing,
    rng: np.random.Generator,
    spine: Box,
    colour: tuple[float, float, float],
    name: str,
    writer: str,
    unit: float,
) -> None:
    left, top, right, bottom = spine
    width, height = right - left, bottom - top
    tint = (colour[0] / 186, colour[1] / 186, colour[2] / 186)
    shift = (int(rng.integers(64)) * 8, int(rng.integers(64)) * 8)
    drawing.add(spine, Painter.material, spine, "cloth" if rng.random() < 0.6 else "paper", tint, shift)
    bright = sum(colour) > 390
    letters = (40, 36, 34) if bright else (_GOLD if rng.random() < 0.7 else (222, 216, 204))
    for at in (0.07, 0.09, 0.78) if rng.random() < 0.6 else (0.12, 0.88):
        band = (left, top + at * height, right, top + at * height + max(2.2 * unit, 0.006 * height))
        drawing.add(band, Painter.rect, band, letters, smallest=2 * unit)
    if rng.random() < 0.3:
        field = (left, top + 0.16 * height, right, top + 0.42 * height)
        drawing.add(field, Painter.rect, field, tone(rng, pick(rng, CLOTH)), smallest=6 * unit)
    size = min(0.50 * width, 46 * unit)
    place = (left + 0.5 * (width - 1.05 * size), top + 0.15 * height)
    drawing.add(spine, Painter.text, place, size, name, letters, bold=rng.random() < 0.4, down=True, fit=0.50 * height)
    small = min(0.34 * width, 26 * unit)
    place = (left + 0.5 * (width - small), top + 0.67 * height)
    drawing.add(spine, Painter.text, place, small, writer, letters, down=True, fit=0.15 * height, smallest=0.6 * small)
    if rng.random() < 0.4 and width > 50 * unit:
        label = (left + 0.1 * width, bottom - 0.17 * height, right - 0.1 * width, bottom - 0.06 * height)
        drawing.add(label, Painter.rect, label, tone(rng, (226, 220, 204)))
        for line, text in enumerate(
            (f"{int(rng.integers(100, 999))}.{int(rng.integers(10, 99))}", writer[3:6].upper())
        ):
            place = (label[0] + 3 * unit, label[1] + (4 + 19 * line) * unit)
            drawing.add(label, Painter.text, place, 15 * unit, text, (48, 46, 50), fit=0.74 * width, smallest=8 * unit)
    drawing.add(spine, Painter.shade, spine, _ROUND, horizontal=True)
    drawing.add(spine, Painter.shade, spine, (0.86, 1.0, 1.0, 0.97, 0.86), smallest=30 * unit)

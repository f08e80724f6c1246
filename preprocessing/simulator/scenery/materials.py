"""Seamless textures: 1/f noise, brick, stone, wood, cloth, plaster, roof tiles, paper and more.

A material is a tile at the finest canvas's density, with copies averaged down by 2, 4 and 8. A wall thus looks the same
at every focal length. Tiles are made once per process from fixed seeds; scenes tint, shift and shade them.
"""

from collections.abc import Callable
from functools import cache, lru_cache

import cv2
import numpy as np
import numpy.typing as npt

from preprocessing.simulator.scenery.canvas import NUM_LEVELS

TILE_PX = 1024

Tile = npt.NDArray[np.float32]


@lru_cache(maxsize=32)
def noise(seed: int, slope: float = 1.0, stretch: float = 1.0) -> Tile:
    """Periodic 1/f^slope noise [TILE_PX, TILE_PX], mean 0, standard deviation 1; stretch > 1 elongates it along x."""
    rng = np.random.default_rng(seed)
    fy = np.fft.fftfreq(TILE_PX)[:, None]
    fx = np.fft.rfftfreq(TILE_PX)[None] * stretch
    radius = np.hypot(fx, fy)
    radius[0, 0] = 1.0
    # Periods are at most about a quarter of the tile; with longer ones the repetition would be visible.
    amplitude = radius**-slope * (1 - np.exp(-((radius * TILE_PX / 4) ** 2)))
    spectrum = amplitude * np.exp(2j * np.pi * rng.random(radius.shape))
    field = np.fft.irfft2(spectrum, s=(TILE_PX, TILE_PX))
    field -= field.mean()
    return np.asarray(field / field.std(), np.float32)


def _grid(columns: int, rows: int, seed: int, offset: float) -> tuple[Tile, Tile, npt.NDArray[np.int64]]:
    """Each pixel's distance to its brick's edge in x and y (px), and its brick's number. Odd rows are shifted."""
    y, x = np.mgrid[0:TILE_PX, 0:TILE_PX].astype(np.float32) + 0.5
    wobble = 1.2
    y = y + wobble * np.roll(noise(seed, 1.6), 100, axis=0)
    x = x + wobble * noise(seed + 1, 1.6)
    height, width = TILE_PX / rows, TILE_PX / columns
    row = np.floor(y / height).astype(int)
    shifted = x / width + offset * (row % 2)
    column = np.floor(shifted).astype(int)
    across = (shifted - column) * width
    along = y - row * height
    return (
        np.minimum(across, width - across).astype(np.float32),
        np.minimum(along, height - along).astype(np.float32),
        (row % rows) * columns + column % columns,
    )


def _coloured(value: Tile, low: tuple[int, int, int], high: tuple[int, int, int]) -> Tile:
    """Blend two sRGB colours (bytes) by value in about [0, 1]."""
    start, end = np.array(low, np.float32), np.array(high, np.float32)
    return np.asarray(start + np.clip(value, -0.3, 1.3)[..., None] * (end - start), np.float32)


def _bonded(
    columns: int,
    rows: int,
    seed: int,
    low: tuple[int, int, int],
    high: tuple[int, int, int],
    joint: tuple[int, int, int],
    joint_px: float,
    rough: float,
) -> Tile:
    rng = np.random.default_rng(seed)
    edge_x, edge_y, cell = _grid(columns, rows, seed, 0.5)
    tone = rng.normal(0.5, 0.26, columns * rows).astype(np.float32)[cell]
    grain = noise(seed + 2, 0.9)
    body = _coloured(tone + rough * grain, low, high)
    body *= (1 + 0.05 * noise(seed + 4, 0.4))[..., None]
    edge = np.minimum(edge_x, edge_y)
    mortar = np.clip((joint_px - edge) / 1.6 + 0.5 + 0.3 * noise(seed + 3, 0.8), 0, 1)[..., None]
    # Light from above: the upper edge of a brick is bright, the joint below it dark.
    lit = np.gradient(cv2.GaussianBlur(1 - mortar[..., 0], (0, 0), 1.5), axis=0)
    colour = body * (1 - mortar) + (np.array(joint, np.float32) * (1 + 0.08 * grain[..., None])) * mortar
    return np.asarray(colour * (1 + 0.9 * np.clip(lit, -0.4, 0.4))[..., None], np.float32)


def _brick() -> Tile:
    return _bonded(10, 26, 11, (112, 62, 48), (168, 104, 80), (176, 166, 150), 2.6, 0.10)


def _stone() -> Tile:
    return _bonded(4, 9, 23, (142, 132, 114), (196, 186, 166), (120, 112, 100), 2.2, 0.16)


def _tiles() -> Tile:
    return _bonded(16, 20, 31, (104, 70, 58), (146, 96, 74), (58, 44, 40), 2.4, 0.10)


def _slabs() -> Tile:
    return _bonded(3, 5, 37, (116, 114, 110), (156, 152, 146), (70, 68, 66), 2.4, 0.18)


def _plaster() -> Tile:
    grain = 0.10 * noise(41, 1.0) + 0.05 * noise(42, 0.3)
    blotch = 0.16 * noise(43, 1.7)
    cracks = np.exp(-((noise(44, 1.5) / 0.012) ** 2)) * np.clip(noise(45, 1.6) - 0.7, 0, 1)
    return _coloured(0.55 + grain + blotch - 0.8 * cracks, (196, 188, 172), (236, 230, 216))


def _wood() -> Tile:
    _, x = np.mgrid[0:TILE_PX, 0:TILE_PX].astype(np.float32)
    boards = 8
    rng = np.random.default_rng(51)
    y = np.mgrid[0:TILE_PX, 0:TILE_PX][0].astype(np.float32)
    board = (y // (TILE_PX / boards)).astype(int)
    grain = noise(52, 1.0, 14.0)
    rings = np.sin(9.0 * noise(53, 1.6, 9.0) + 0.35 * y + rng.uniform(0, 6, boards).astype(np.float32)[board])
    tone = rng.normal(0.5, 0.2, boards).astype(np.float32)[board]
    gap = np.abs((y % (TILE_PX / boards)) - 1.5) < 1.6
    value = tone + 0.16 * grain + 0.10 * rings + 0.05 * noise(54, 0.5, 20.0)
    colour = _coloured(value, (104, 74, 50), (176, 138, 100))
    colour[gap] *= 0.35
    return np.asarray(colour + 0 * x[..., None], np.float32)


def _cloth() -> Tile:
    y, x = np.mgrid[0:TILE_PX, 0:TILE_PX].astype(np.float32)
    period = 2 * np.pi / 8.0
    warp, weft = np.cos(period * x + 0.4 * noise(61, 1.4)), np.cos(period * y + 0.4 * noise(62, 1.4))
    over = (np.floor(x / 8) + np.floor(y / 8)) % 2
    weave = np.where(over > 0, np.abs(warp), np.abs(weft))
    return _coloured(0.25 + 0.55 * weave + 0.10 * noise(63, 1.0, 4.0), (128, 128, 128), (220, 220, 220))


def _paper() -> Tile:
    return _coloured(0.6 + 0.10 * noise(71, 0.6) + 0.14 * noise(72, 1.5), (222, 218, 208), (244, 241, 234))


def _metal() -> Tile:
    return _coloured(0.5 + 0.16 * noise(81, 0.7, 30.0) + 0.10 * noise(82, 1.4), (120, 124, 128), (176, 180, 184))


def _hedge() -> Tile:
    value = 0.42 + 0.20 * noise(91, 0.8) + 0.16 * noise(92, 1.4)
    return _coloured(value, (34, 46, 24), (110, 126, 66))


def _soil() -> Tile:
    return _coloured(0.4 + 0.2 * noise(95, 0.7) + 0.1 * noise(96, 1.4), (52, 42, 32), (120, 100, 78))


_MAKERS: dict[str, Callable[[], Tile]] = {
    "brick": _brick,
    "stone": _stone,
    "rooftiles": _tiles,
    "slabs": _slabs,
    "plaster": _plaster,
    "wood": _wood,
    "cloth": _cloth,
    "paper": _paper,
    "metal": _metal,
    "hedge": _hedge,
    "soil": _soil,
}
NAMES = tuple(_MAKERS)


@cache
def material(name: str) -> tuple[npt.NDArray[np.uint8], ...]:
    """The tile's levels, sRGB bytes [TILE_PX / 2^level, TILE_PX / 2^level, 3]; level 0 is for the finest canvas."""
    tile = np.clip(_MAKERS[name](), 0, 255)
    levels = []
    for level in range(NUM_LEVELS):
        size = TILE_PX >> level
        levels.append(np.rint(cv2.resize(tile, (size, size), interpolation=cv2.INTER_AREA)).astype(np.uint8))
    return tuple(levels)


@cache
def grain(slope: float) -> tuple[npt.NDArray[np.float32], ...]:
    """1/f noise [TILE_PX / 2^level, TILE_PX / 2^level] by level; mean 0, level 0 with standard deviation 1."""
    tile = noise(int(1000 * slope), slope)
    return tuple(
        np.asarray(cv2.resize(tile, (TILE_PX >> level,) * 2, interpolation=cv2.INTER_AREA), np.float32)
        for level in range(NUM_LEVELS)
    )

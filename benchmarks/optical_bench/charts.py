"""Test charts, sampled 8 times as finely as a mosaic, and the mosaics that cameras take of them.

Lengths are mosaic pixels, angles degrees. A chart consists of square patches in reading order, one subject in each.
"""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from preprocessing.colour import srgb_to_linear
from preprocessing.raw import decode
from preprocessing.raw.dng import write_dng
from preprocessing.simulator.wide import CameraModel
from preprocessing.simulator.wide_sensor import read_out
from preprocessing.truth.frame import Exposure

Image = NDArray[np.float32]
Offsets = NDArray[np.float32]

FINE = 8
PATCH_PX = 48
COLUMNS = 8
LINE_PX = (0.7, 1.0, 1.4, 2.0)
ANGLES = tuple(7.5 * step for step in range(24))
EDGE_ANGLES = tuple(5.0 + 22.5 * step for step in range(8))
ZONE_PX = 192
DARK, BRIGHT = 0.03, 0.55
"""Linear light of the two greys of lines and edges."""
GREYS = (16, 32, 64, 96, 128, 160, 192, 224)
COLOURS = ((200, 40, 40), (40, 160, 60), (40, 70, 190), (220, 200, 40), (190, 60, 160), (40, 170, 190), (210, 140, 110),
           (90, 60, 45))  # fmt: skip
"""sRGB of 8 bits; inside the gamut of every camera's rendering."""
ISOS = (100, 800, 3200, 12_800)


@dataclass(frozen=True)
class Lens:
    """What stands before the sensor."""

    name: str
    psf_px: float
    """Standard deviation of the blur, without the pixel's own area."""
    lateral_px: float = 0.0
    """How far red is moved to the right and blue to the left."""


LENSES = (Lens("no low-pass filter", 0.3), Lens("low-pass filter", 0.65), Lens("lateral colour", 0.4, 0.6))

CAMERA = CameraModel(
    colours="Nikon D810", cfa="RGGB", black_level=600, white_level=16383, full_well_e=60_000, read_e=2.5,
    read_counts=1.5, row_share=0.05, hot_share=0.0, psf_px=0, psf_rise=0, halo=0, halo_px=0, lateral_px=(0, 0),
    axis=(0, 0), defocus_px=0, motion_px=0, motion_rad=0,
)  # fmt: skip
"""A full-frame camera. Lens and motion are those of LENSES."""


@dataclass(frozen=True)
class Chart:
    """A scene of patches."""

    light: Image
    """[FINE H, FINE W, 3] linear sRGB in [0, 1]."""
    patch_px: int
    columns: int

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)."""
        return self.light.shape[0] // FINE, self.light.shape[1] // FINE

    def truth(self, scale: int) -> Image:
        """[scale H, scale W, 3] linear sRGB: the chart averaged over the pixels of the enlarged picture."""
        height, width = self.size
        return np.asarray(cv2.resize(self.light, (width * scale, height * scale), interpolation=cv2.INTER_AREA))

    def centre(self, number: int) -> tuple[float, float]:
        """(x, y) of a patch's centre; pixel i covers [i, i + 1)."""
        row, column = divmod(number, self.columns)
        return (column + 0.5) * self.patch_px, (row + 0.5) * self.patch_px


def _chart(paints: Sequence[Callable[[Offsets, Offsets], NDArray]], patch_px: int, columns: int) -> Chart:
    """A patch for each function of (x, y), the distances from the patch's centre, that returns light [.., .., (3)]."""
    rows = -(-len(paints) // columns)
    side = patch_px * FINE
    light = np.full((rows * side, columns * side, 3), BRIGHT, np.float32)
    along = ((np.arange(side) + 0.5) / FINE - patch_px / 2).astype(np.float32)
    x, y = np.meshgrid(along, along)
    for number, paint in enumerate(paints):
        row, column = divmod(number, columns)
        painted = np.asarray(paint(x, y), np.float32)
        patch = painted if painted.ndim == 3 else np.repeat(painted[..., None], 3, axis=2)
        light[row * side : (row + 1) * side, column * side : (column + 1) * side] = patch
    return Chart(light, patch_px, columns)


def normal(angle: float) -> tuple[float, float]:
    """Unit vector across a line or edge of this angle; x to the right, y down."""
    return -float(np.sin(np.deg2rad(angle))), float(np.cos(np.deg2rad(angle)))


def _line(angle: float, width: float, back: float, front: float) -> Callable[[Offsets, Offsets], NDArray]:
    across_x, across_y = normal(angle)

    def paint(x: Offsets, y: Offsets) -> NDArray:
        inside = np.clip((width / 2 - np.abs(x * across_x + y * across_y)) * FINE + 0.5, 0, 1)
        return back + (front - back) * inside

    return paint


def lines(width: float, *, dark: bool) -> Chart:
    """One line through the centre of each patch, at each of ANGLES."""
    back, front = (BRIGHT, DARK) if dark else (DARK, BRIGHT)
    return _chart([_line(angle, width, back, front) for angle in ANGLES], PATCH_PX, COLUMNS)


def edges() -> Chart:
    """A dark and a bright half in each patch, at each of EDGE_ANGLES."""

    def edge(angle: float) -> Callable[[Offsets, Offsets], NDArray]:
        across_x, across_y = normal(angle)
        return lambda x, y: DARK + (BRIGHT - DARK) * np.clip((x * across_x + y * across_y) * FINE + 0.5, 0, 1)

    return _chart([edge(angle) for angle in EDGE_ANGLES], PATCH_PX, COLUMNS)


def zone_plate() -> Chart:
    """Rings whose frequency grows to the mosaic's limit, 0.5 cycles a pixel, at the patch's border."""

    def paint(x: Offsets, y: Offsets) -> NDArray:
        phase = np.pi * 0.5 * (x.astype(np.float64) ** 2 + y.astype(np.float64) ** 2) / (ZONE_PX / 2)
        return DARK + (BRIGHT - DARK) * (0.5 + 0.5 * np.cos(phase))

    return _chart([paint], ZONE_PX, 1)


def patches() -> Chart:
    """Flat patches: GREYS, then COLOURS."""
    colours = [(level,) * 3 for level in GREYS] + list(COLOURS)
    linear = [srgb_to_linear(np.array(colour) / 255) for colour in colours]
    return _chart([partial(_flat, colour) for colour in linear], PATCH_PX, COLUMNS)


def _flat(colour: NDArray, x: Offsets, y: Offsets) -> NDArray:
    return np.broadcast_to(colour, (*x.shape, 3))


def expose(chart: Chart, lens: Lens, iso: int, seed: int) -> decode.RawImage:
    """The chart as a camera's RAW file, decoded and rendered as every RAW file is."""
    light = cv2.GaussianBlur(chart.light, (0, 0), lens.psf_px * FINE)
    for channel, sign in ((0, 1), (2, -1)):
        moved = np.array([[1, 0, sign * lens.lateral_px * FINE], [0, 1, 0]], np.float64)
        light[..., channel] = cv2.warpAffine(
            light[..., channel], moved, light.shape[1::-1], flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
        )
    height, width = chart.size
    sites = cv2.resize(light, (width, height), interpolation=cv2.INTER_AREA)
    exposure = Exposure(
        iso=iso, exposure_s=0.01, f_number=4.0, gain=1.0, wb=(2.0, 1.0, 1.5), psf_px=lens.psf_px, vignetting=0.0
    )
    mosaic = read_out(np.asarray(sites, np.float32), CAMERA, exposure, np.random.default_rng(seed))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "chart.dng"
        write_dng(
            path, mosaic, cfa=CAMERA.cfa, black_level=(float(CAMERA.black_level),) * 4, white_level=CAMERA.white_level,
            wb=exposure.wb, xyz_to_camera_33=CAMERA.xyz_to_camera,
        )  # fmt: skip
        return decode.load(path.read_bytes(), name="chart.dng")

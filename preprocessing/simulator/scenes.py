"""Scenes for the simulated camera: two planes, far and near, of nested canvases, finest in the centre.

A 24 mm frame is ten times as wide as a 240 mm frame, so a single canvas at full density would need the pixels of a
hundred frames. Four canvases replace it, for 240 mm, 150-100 mm, 70-50 mm and 35-24 mm. The finest has 1.5 pixels per
pixel of the 240 mm frame; each of the others has half the density of the one inside it. The centre of each is the
finer canvas at half density (in linear light, alias-free), so that all show the same scene.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

from preprocessing.colour import SRGB_BYTE_TO_LINEAR, linear_to_srgb_bytes
from preprocessing.registration.affine import LANCZOS_LOBES
from preprocessing.simulator import thin_subjects
from preprocessing.simulator.scenery import light, near, photographs, subjects
from preprocessing.simulator.scenery.canvas import FINEST_DENSITY, NUM_LEVELS, Box, Canvas
from preprocessing.simulator.scenery.drawing import Drawing

BAND_ROWS = 256

_REACH = 2 * LANCZOS_LOBES
_TAPS = (np.arange(-_REACH, _REACH) + 0.5) / 2
_HALVING = np.asarray(np.sinc(_TAPS) * np.sinc(_TAPS / LANCZOS_LOBES), np.float32)
_HALVING /= _HALVING.sum()
"""Lanczos' kernel at half density. A 2x2 average would alias detail above the coarser canvas's resolution to moire that
no lens produces: at 35 mm it moved edges by up to 0.1 px of the frame."""

_RGBA_TO_LINEAR = np.stack([SRGB_BYTE_TO_LINEAR] * 3 + [(np.arange(256) / 255).astype(np.float32)], axis=-1)[None]


@dataclass
class Scene:
    """A scene's canvases, finest first."""

    far: list[Canvas]
    near: list[Canvas]
    """With alpha; empty if the scene has no near plane."""
    subject: str


def level_of(focal_mm: float) -> int:
    """Number of the canvas for a focal length: 240 | 150, 100 | 70, 50 | 35, 24 mm."""
    return sum(focal_mm < limit for limit in (200, 85, 42))


def build_scene(
    rng: np.random.Generator,
    boxes: Sequence[Box],
    *,
    frame_width: int,
    subject: str | None = None,
    photos: Sequence[Path] = (),
    first_photo: int = 0,
    thin: bool = False,
) -> Scene:
    """Draw a scene.

    boxes        area that each of the NUM_LEVELS canvases must cover, scene units, finest first
    frame_width  width of a 240 mm frame in scene units; sizes of objects are proportional to it
    subject      one of `subjects.SUBJECTS` (or, with `thin`, of `thin_subjects.SUBJECTS`); None: a random one
    photos       photographs to show instead of a procedural subject, starting with number `first_photo`
    thin         a random subject may also be one of `thin_subjects.SUBJECTS`
    """
    unit = frame_width / 1536
    nested = _nested_boxes(boxes)
    drawers = {**subjects.SUBJECTS, **(thin_subjects.SUBJECTS if thin else {})}
    names = list(drawers)
    chosen = names[int(rng.integers(len(names)))] if subject is None else subject
    drawing = Drawing()
    if photos:
        chosen = "photographs"
        photographs.draw_gallery(drawing, nested, photos, first_photo, unit)
    else:
        drawers[chosen](drawing, rng, nested[-1], unit)
    light.draw_light(drawing, rng, nested[-1])
    colour_drawing, mask_drawing = near.draw_near(rng, nested[-1], unit)
    return Scene(_far_canvases(drawing, nested), _near_canvases(colour_drawing, mask_drawing, nested), chosen)


def _nested_boxes(boxes: Sequence[Box]) -> list[Box]:
    """Grow each box to the coarsest canvas's pixel grid and to at least a pixel around the finer boxes."""
    step = 2 ** (NUM_LEVELS - 1) / FINEST_DENSITY
    nested: list[Box] = []
    for left, top, right, bottom in boxes:
        if nested:
            inner = nested[-1]
            left, top = min(left, inner[0] - step), min(top, inner[1] - step)
            right, bottom = max(right, inner[2] + step), max(bottom, inner[3] + step)
        low = [float(np.floor(value / step) * step) for value in (left, top)]
        high = [float(np.ceil(value / step) * step) for value in (right, bottom)]
        nested.append((low[0], low[1], high[0], high[1]))
    return nested


def _blank(box: Box, level: int, grey: int) -> Canvas:
    density = FINEST_DENSITY / 2**level
    left, top, right, bottom = box
    shape = (round((bottom - top) * density), round((right - left) * density), 3)
    # np.zeros allocates no memory until it is written.
    pixels = np.full(shape, grey, np.uint8) if grey else np.zeros(shape, np.uint8)
    return Canvas(pixels, left, top, density, level)


def _far_canvases(drawing: Drawing, boxes: Sequence[Box]) -> list[Canvas]:
    canvases: list[Canvas] = []
    for level, box in enumerate(boxes):
        canvas = _blank(box, level, grey=128)
        finer = canvases[-1] if canvases else None
        drawing.render(canvas, finer.box if finer else None)
        if finer:
            _insert_finer(finer, canvas)
        canvases.append(canvas)
    return canvases


def _near_canvases(colour_drawing: Drawing, mask_drawing: Drawing, boxes: Sequence[Box]) -> list[Canvas]:
    """Draw colour and coverage (white on black) separately; store the colour premultiplied in linear light."""
    if not mask_drawing.commands:
        return []
    canvases: list[Canvas] = []
    for level, box in enumerate(boxes):
        finer = canvases[-1] if canvases else None
        inner = finer.box if finer else None
        # The colour's background is grey, so that antialiased edges do not become dark.
        colour, mask = _blank(box, level, grey=70), _blank(box, level, grey=0)
        colour_drawing.render(colour, inner)
        mask_drawing.render(mask, inner)
        pixels = np.zeros((*mask.pixels.shape[:2], 4), np.uint8)
        for start in range(0, len(pixels), BAND_ROWS):
            rows = slice(start, start + BAND_ROWS)
            columns = np.flatnonzero(mask.pixels[rows, :, 0].any(axis=0))
            if len(columns):
                part = (rows, slice(columns[0], columns[-1] + 1))
                alpha = mask.pixels[part][..., :1]
                premultiplied = cv2.LUT(colour.pixels[part], SRGB_BYTE_TO_LINEAR) * (alpha / np.float32(255))
                pixels[part][..., :3] = linear_to_srgb_bytes(premultiplied)
                pixels[part][..., 3:] = alpha
        canvas = Canvas(pixels, colour.x0, colour.y0, colour.density, level)
        if finer:
            _insert_finer(finer, canvas)
        canvases.append(canvas)
    return canvases


def _insert_finer(finer: Canvas, canvas: Canvas) -> None:
    """Replace a canvas's centre by the finer canvas at half density: linear light, and coverage if any."""
    row = round((finer.y0 - canvas.y0) * canvas.density)
    column = round((finer.x0 - canvas.x0) * canvas.density)
    height, width = finer.pixels.shape[0] // 2, finer.pixels.shape[1] // 2
    canvas.pixels[row : row + height, column : column + width] = 0
    for start in range(0, height, BAND_ROWS):
        stop = min(start + BAND_ROWS, height)
        first = max(0, 2 * start - _REACH)
        fine = finer.pixels[first : min(2 * height, 2 * stop + _REACH), : 2 * width]
        if not fine.any():
            continue
        half = halved(to_linear(fine))[start - first // 2 :][: stop - start]
        part = canvas.pixels[row + start : row + stop, column : column + width]
        part[..., :3] = linear_to_srgb_bytes(half[..., :3])
        if half.shape[2] == 4:
            part[..., 3] = np.rint(255 * half[..., 3])


def halved(light_HWC: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Linear light [H, W, C] -> [H/2, W/2, C], clipped to [0, 1], alias-free; H and W are even."""
    anchor = (_REACH - 1, _REACH - 1)
    smooth = cv2.sepFilter2D(light_HWC, cv2.CV_32F, _HALVING, _HALVING, anchor=anchor, borderType=cv2.BORDER_REFLECT)
    return np.asarray(np.clip(smooth[::2, ::2], 0, 1), np.float32)


def to_linear(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """sRGB bytes [H, W, 3 or 4] -> linear light [0, 1]; a fourth channel is coverage, which stays linear."""
    if pixels.shape[2] == 3:
        return np.asarray(cv2.LUT(pixels, SRGB_BYTE_TO_LINEAR), np.float32)
    return np.asarray(cv2.LUT(pixels, _RGBA_TO_LINEAR), np.float32)

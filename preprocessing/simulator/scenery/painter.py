"""Draws shapes, materials, text, gratings and soft shadows on one canvas of a scene, in scene units."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from preprocessing.simulator.scenery import materials
from preprocessing.simulator.scenery.canvas import Box, Canvas, Colour

_SHIFT = 4  # fractional bits of OpenCV's polygon coordinates


@lru_cache(maxsize=256)
def _font(half_px: int) -> Any:
    return ImageFont.load_default(half_px / 2)


@lru_cache(maxsize=2048)
def text_mask(text: str, half_px: int, bold: bool, slant: float) -> npt.NDArray[np.uint8]:
    """Coverage uint8 [h, w] of one line of text; `half_px` is the font size in half pixels."""
    font = _font(half_px)
    stroke = half_px / 44 if bold else 0.0
    left, top, right, bottom = font.getbbox(text, stroke_width=stroke)
    image = Image.new("L", (int(right - left) + 2, int(bottom - top) + 2), 0)
    ImageDraw.Draw(image).text((1 - left, 1 - top), text, fill=255, font=font, stroke_width=stroke)
    mask = np.asarray(image)
    if slant:
        extra = int(abs(slant) * mask.shape[0])
        shear = np.array([[1, -slant, slant * mask.shape[0] if slant > 0 else 0], [0, 1, 0]], np.float64)
        mask = np.asarray(cv2.warpAffine(mask, shear, (mask.shape[1] + extra, mask.shape[0])), np.uint8)
    return mask


class Painter:
    """Draws on one canvas. Positions and sizes are in scene units; anything outside the canvas is clipped."""

    def __init__(self, canvas: Canvas) -> None:
        self.canvas = canvas
        self.pixels = canvas.pixels
        self.density = canvas.density
        self.height, self.width = canvas.pixels.shape[:2]

    # -- helpers: scene units to canvas pixels

    def _points(self, points: npt.ArrayLike) -> npt.NDArray[np.int32]:
        xy = (np.asarray(points, np.float64) - (self.canvas.x0, self.canvas.y0)) * self.density - 0.5
        return np.asarray(np.rint(xy * (1 << _SHIFT)), np.int32)

    def _window(self, box: Box) -> tuple[slice, slice]:
        left = round((box[0] - self.canvas.x0) * self.density)
        top = round((box[1] - self.canvas.y0) * self.density)
        right = round((box[2] - self.canvas.x0) * self.density)
        bottom = round((box[3] - self.canvas.y0) * self.density)
        return (
            slice(min(max(top, 0), self.height), min(max(bottom, 0), self.height)),
            slice(min(max(left, 0), self.width), min(max(right, 0), self.width)),
        )

    def _blend(self, top: int, left: int, mask_HW: npt.NDArray[Any], colour: Any) -> None:
        """Blend a colour (or a picture of the mask's size) over the canvas; `mask_HW` is its opacity, 0 to 255."""
        height, width = mask_HW.shape
        r0, r1 = max(top, 0), min(top + height, self.height)
        c0, c1 = max(left, 0), min(left + width, self.width)
        if r0 >= r1 or c0 >= c1:
            return
        inner = (slice(r0 - top, r1 - top), slice(c0 - left, c1 - left))
        part = self.pixels[r0:r1, c0:c1]
        alpha = (mask_HW[inner].astype(np.float32) * np.float32(1 / 255))[..., None]
        over = colour[inner] if isinstance(colour, np.ndarray) else np.array(colour, np.float32)
        part[:] = np.clip(part + alpha * (over - part) + 0.5, 0, 255)

    # -- shapes

    def rect(self, box: Box, colour: Colour) -> None:
        rows, columns = self._window(box)
        self.pixels[rows, columns] = colour

    def polygon(self, points: npt.ArrayLike, colour: Colour) -> None:
        cv2.fillPoly(self.pixels, [self._points(points)], colour, lineType=cv2.LINE_AA, shift=_SHIFT)

    def line(self, points: npt.ArrayLike, width: float, colour: Colour) -> None:
        """A stroked polyline, at least one canvas pixel wide."""
        thickness = max(1, round(width * self.density))
        cv2.polylines(self.pixels, [self._points(points)], False, colour, thickness, cv2.LINE_AA, _SHIFT)

    def ellipse(self, centre: tuple[float, float], radii: tuple[float, float], colour: Colour) -> None:
        angle = np.linspace(0, 2 * np.pi, 49)
        self.polygon(np.stack([centre[0] + radii[0] * np.cos(angle), centre[1] + radii[1] * np.sin(angle)], -1), colour)

    # -- surfaces

    def material(
        self, box: Box, name: str, tint: Colour = (1, 1, 1), shift: tuple[int, int] = (0, 0), turned: bool = False
    ) -> None:
        """Fill a box with a material.

        tint     factor per channel
        shift    (rows, columns) by which the tile is moved, pixels of its finest level, multiples of 8
        turned   swap the tile's x and y
        """
        rows, columns = self._window(box)
        if rows.start >= rows.stop or columns.start >= columns.stop:
            return
        level = self.canvas.level
        tile = materials.material(name)[level]
        if turned:
            tile = tile.transpose(1, 0, 2)
        size = tile.shape[0]
        # The tile's phase is relative to the scene's origin, so that a wall matches across canvases.
        row0 = rows.start + round(self.canvas.y0 * self.density) + (shift[0] >> level)
        col0 = columns.start + round(self.canvas.x0 * self.density) + (shift[1] >> level)
        tinted = cv2.LUT(tile, np.clip(np.arange(256)[:, None] * np.array(tint), 0, 255).astype(np.uint8)[None])
        for row in range(rows.start, rows.stop, size):
            high = min(size, rows.stop - row)
            index = (np.arange(row0 + row - rows.start, row0 + row - rows.start + high)) % size
            stripe = tinted[index]
            wide = columns.stop - columns.start
            first = col0 % size
            repeats = -(-(first + wide) // size)
            stripe = (
                np.concatenate([stripe] * repeats, axis=1)[:, first : first + wide]
                if repeats > 1
                else stripe[:, first : first + wide]
            )
            self.pixels[row : row + high, columns] = stripe

    def gradient(self, box: Box, start: Colour, end: Colour, horizontal: bool = False) -> None:
        rows, columns = self._window(box)
        region = self.pixels[rows, columns]
        if region.size == 0:
            return
        if horizontal:
            at = ((np.arange(columns.start, columns.stop) + 0.5) / self.density + self.canvas.x0 - box[0]) / (
                box[2] - box[0]
            )
        else:
            at = ((np.arange(rows.start, rows.stop) + 0.5) / self.density + self.canvas.y0 - box[1]) / (box[3] - box[1])
        ramp = np.array(start) + at[:, None] * (np.array(end) - np.array(start))
        region[:] = ramp[None] if horizontal else ramp[:, None]

    def shade(self, box: Box, profile: Sequence[float], horizontal: bool = False) -> None:
        """Multiply a box by factors interpolated along its height or width, to show roundness or fading light."""
        rows, columns = self._window(box)
        region = self.pixels[rows, columns]
        if region.size == 0:
            return
        low, high = (box[0], box[2]) if horizontal else (box[1], box[3])
        span = columns if horizontal else rows
        origin = self.canvas.x0 if horizontal else self.canvas.y0
        at = ((np.arange(span.start, span.stop) + 0.5) / self.density + origin - low) / (high - low)
        factor = np.interp(at, np.linspace(0, 1, len(profile)), profile).astype(np.float32)
        factor_HW1 = factor[None, :, None] if horizontal else factor[:, None, None]
        region[:] = np.minimum(region * factor_HW1 + 0.5, 255)

    def shadow(self, box: Box, blur: float, strength: float) -> None:
        """A soft dark rectangle: the shadow of a flat object a little in front of a wall.

        The part more than 2 `blur` inside the edge is not drawn, since the object hides it.
        """
        if (box[2] - box[0]) * self.density < 2:
            return
        sigma = max(blur * self.density, 0.3)
        rows, columns = self._window((box[0] - 3 * blur, box[1] - 3 * blur, box[2] + 3 * blur, box[3] + 3 * blur))
        hidden_rows, hidden_columns = self._window(
            (box[0] + 2 * blur, box[1] + 2 * blur, box[2] - 2 * blur, box[3] - 2 * blur)
        )

        def edge(low: float, high: float, span: slice, origin: float) -> npt.NDArray[np.float64]:
            at = np.arange(span.start, span.stop) + 0.5
            a, b = (at - (low - origin) * self.density) / sigma, (at - (high - origin) * self.density) / sigma
            return np.asarray(0.5 * (np.tanh(a) - np.tanh(b)))

        middle = slice(max(rows.start, hidden_rows.start), max(rows.start, hidden_rows.stop))
        strips = [
            (slice(rows.start, middle.start), columns),
            (middle, slice(columns.start, max(columns.start, hidden_columns.start))),
            (middle, slice(max(columns.start, hidden_columns.stop), columns.stop)),
            (slice(middle.stop, rows.stop), columns),
        ]
        for part_rows, part_columns in strips:
            region = self.pixels[part_rows, part_columns]
            if region.size:
                down = edge(box[1], box[3], part_rows, self.canvas.y0)
                across = edge(box[0], box[2], part_columns, self.canvas.x0)
                factor = (1 - strength * down[:, None] * across[None]).astype(np.float32)
                region[:] = region * factor[..., None] + np.float32(0.5)

    def shade_polygon(self, points: npt.ArrayLike, factor: float) -> None:
        """Darken a polygon: a shadow with a hard edge."""
        fixed = self._points(points)
        (left, top), (right, bottom) = (fixed.min(axis=0) >> _SHIFT) - 1, (fixed.max(axis=0) >> _SHIFT) + 2
        mask = np.zeros((bottom - top, right - left), np.uint8)
        cv2.fillPoly(mask, [fixed - np.array([left, top]) * (1 << _SHIFT)], (255,), cv2.LINE_AA, _SHIFT)
        self._blend(int(top), int(left), mask * np.float32(1 - factor), (0.0, 0.0, 0.0))

    def grating(self, box: Box, periods: Sequence[float], horizontal: bool, dark: Colour, light: Colour) -> None:
        """Bars, one block per period (scene units); a block too fine for the canvas gets the mean colour."""
        step = (box[3] - box[1]) / len(periods)
        for number, period in enumerate(periods):
            top = box[1] + number * step
            block = (box[0], top, box[2], top + 0.86 * step)
            if period * self.density < 0.5:
                mean = tuple((a + b) / 2 for a, b in zip(dark, light, strict=True))
                self.rect(block, (mean[0], mean[1], mean[2]))
                continue
            rows, columns = self._window(block)
            span, low, origin = (rows, block[1], self.canvas.y0) if horizontal else (columns, block[0], self.canvas.x0)
            # 4 samples per pixel antialias the bars' edges.
            at = (np.arange(4 * (span.stop - span.start)) + 0.5) / 4 + span.start
            phase = (at / self.density + origin - low) / period
            bars = ((phase % 1) < 0.5).reshape(-1, 4).mean(axis=1)[:, None]
            colour = np.array(light) + bars * (np.array(dark) - np.array(light))
            self.pixels[rows, columns] = colour[:, None] if horizontal else colour[None]

    def text(
        self,
        at: tuple[float, float],
        size: float,
        text: str,
        colour: Colour,
        *,
        bold: bool = False,
        slant: float = 0.0,
        down: bool = False,
        fit: float = 0.0,
        alpha: float = 1.0,
    ) -> None:
        """One line of text; letters below 2 canvas pixels become a grey line.

        at     top left corner
        size   font size, scene units
        down   turn the line to read downwards
        fit    if > 0, the line's greatest length; a longer line is squeezed
        """
        pixels = size * self.density
        if pixels < 2.0:
            # Illegible letters blend to a grey line; a letter's mean width is half its height.
            length = min(fit or np.inf, 0.5 * size * len(text))
            wide, high = (0.6 * size, length) if down else (length, 0.6 * size)
            rows, columns = self._window((at[0], at[1] + 0.2 * size, at[0] + wide, at[1] + 0.2 * size + high))
            part = self.pixels[rows, columns]
            part[:] = 0.65 * part + 0.35 * np.array(colour) + 0.5
            return
        mask = text_mask(text, max(5, round(2 * pixels)), bold, slant)
        shrink_y = pixels / (max(5, round(2 * pixels)) / 2)
        shrink_x = min(shrink_y, fit * self.density / mask.shape[1]) if fit else shrink_y
        wide, high = max(1, round(mask.shape[1] * shrink_x)), max(1, round(mask.shape[0] * shrink_y))
        if (wide, high) != (mask.shape[1], mask.shape[0]):
            mask = np.asarray(cv2.resize(mask, (wide, high), interpolation=cv2.INTER_AREA), np.uint8)
        if down:
            mask = np.rot90(mask, -1)
        left = round((at[0] - self.canvas.x0) * self.density)
        top = round((at[1] - self.canvas.y0) * self.density)
        self._blend(top, left, mask * alpha if alpha < 1 else mask, colour)

    def picture(self, box: Box, picture_HW3: npt.NDArray[np.uint8]) -> None:
        """Stretch a picture over a box; it is area-averaged before it is reduced."""
        left, top = (box[0] - self.canvas.x0) * self.density, (box[1] - self.canvas.y0) * self.density
        wide, high = (box[2] - box[0]) * self.density, (box[3] - box[1]) * self.density
        rows, columns = self._window(box)
        if rows.start >= rows.stop or columns.start >= columns.stop or wide < 1 or high < 1:
            return
        source_h, source_w = picture_HW3.shape[:2]
        shrink = max(source_w / wide, source_h / high)
        if shrink > 1:
            size = (max(1, round(source_w / shrink)), max(1, round(source_h / shrink)))
            picture_HW3 = np.asarray(cv2.resize(picture_HW3, size, interpolation=cv2.INTER_AREA), np.uint8)
            source_h, source_w = picture_HW3.shape[:2]
        scale_x, scale_y = source_w / wide, source_h / high
        affine = np.array(
            [
                [scale_x, 0, (columns.start + 0.5 - left) * scale_x - 0.5],
                [0, scale_y, (rows.start + 0.5 - top) * scale_y - 0.5],
            ]
        )
        size = (columns.stop - columns.start, rows.stop - rows.start)
        self.pixels[rows, columns] = cv2.warpAffine(
            picture_HW3, affine, size, flags=cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP, borderMode=cv2.BORDER_REPLICATE
        )

    def clouds(self, box: Box, shift: int, size: float) -> None:
        """Blend soft white clouds over a box; `size` is the extent of the largest cloud, scene units."""
        rows, columns = self._window(box)
        if rows.start >= rows.stop or columns.start >= columns.stop:
            return
        field = cv2.resize(materials.noise(7, 1.7), (256, 256), interpolation=cv2.INTER_AREA)
        # The tile spans four of these extents, so that it does not repeat within a frame.
        step = 256 / (4 * size * self.density)
        x = (
            (columns.start + self.canvas.x0 * self.density) * step + shift,
            (rows.start + self.canvas.y0 * self.density) * step,
        )
        affine = np.array([[step, 0, x[0] % 256], [0, 1.8 * step, (1.8 * x[1]) % 256]])
        shape = (columns.stop - columns.start, rows.stop - rows.start)
        noise = cv2.warpAffine(
            field, affine, shape, flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP, borderMode=cv2.BORDER_WRAP
        )
        cover = np.clip((noise - 0.1) * 90, 0, 190)
        self._blend(rows.start, columns.start, cover, (236.0, 234.0, 230.0))

    def grain(self, box: Box, strength: float, slope: float = 0.6, shift: int = 0) -> None:
        """Multiply a box by fine 1/f noise, since no real surface is uniform."""
        rows, columns = self._window(box)
        if rows.start >= rows.stop or columns.start >= columns.stop:
            return
        tile = materials.grain(slope)[self.canvas.level]
        size = tile.shape[0]
        row_at = (np.arange(rows.start, rows.stop) + round(self.canvas.y0 * self.density) + shift) % size
        col_at = (np.arange(columns.start, columns.stop) + round(self.canvas.x0 * self.density)) % size
        for start in range(0, len(row_at), 256):
            part = self.pixels[rows.start + start : min(rows.start + start + 256, rows.stop), columns]
            factor = 1 + strength * np.take(tile[row_at[start : start + 256]], col_at, axis=1)
            part[:] = np.clip(part * factor[..., None] + 0.5, 0, 255)

"""Cut one pair into tiles: computes the columns of a shard's row that come from the pictures.

Areas are (top, left, height, width) in packed pixels unless stated otherwise; a packed pixel is 2 x 2 mosaic pixels.
"""

import contextlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from preprocessing.photometry import corrections
from preprocessing.photometry.look import COLUMNS as LOOK_COLUMNS
from preprocessing.photometry.look import measure_look
from preprocessing.raw.decode import RawImage
from preprocessing.raw.picture import PictureError, read_picture
from preprocessing.registration import affine
from preprocessing.registration.affine import Map, Size
from preprocessing.registration.lens import LensMap, sample_through
from preprocessing.registration.raw_to_jpg import register_raw
from preprocessing.registration.register import RegistrationError
from preprocessing.registration.same_scene import MIN_SCORE, scene_score
from preprocessing.registration.shift import correlation, local_detail, luminance, measure_shift

Area = tuple[int, int, int, int]

_MEASURE_PX = 96
"""Minimum side, packed pixels, of the window in which a tile's residual shift is measured. It must exceed any shift."""


class TileError(ValueError):
    """A pair cannot be cut into tiles. The message is one line and says why."""


class UnalignedError(TileError):
    """The pictures of a pair neither correlate nor register: they do not show the same thing."""


class Grid(Protocol):
    """The short-focal frame's packed pixels: a RAW's, or those of a picture without RAW."""

    @property
    def size(self) -> Size:
        """(rows, columns)."""

    @property
    def origin(self) -> Size:
        """(row, column), in mosaic pixels, of the first packed pixel."""


@dataclass(frozen=True)
class Jpg:
    """A camera JPG: pixels [H, W, 3] uint8 as stored, not rotated by EXIF.

    If there is no JPG, it holds LibRaw's rendering of the camera's crop in sensor orientation, with orientation None.
    """

    stored: Image.Image | NDArray[np.uint8]
    """As decoded. A Pillow image is converted only where needed: a full copy takes half as long as decoding."""
    orientation: int | None
    """EXIF Orientation, 1 to 8; None if not stated."""
    source: str = "camera"
    """camera or rendering."""
    notes: tuple[str, ...] = ()
    """What was done to it besides decoding (picture.Picture.notes)."""

    @property
    def size(self) -> Size:
        if isinstance(self.stored, Image.Image):
            return self.stored.height, self.stored.width
        return self.stored.shape[0], self.stored.shape[1]

    @cached_property
    def pixels_HWC(self) -> NDArray[np.uint8]:
        return np.asarray(self.stored)


@dataclass(frozen=True)
class PairMaps:
    """Maps from the LR mosaic (LibRaw's visible area, sensor orientation) to the stored pixels of both JPGs."""

    lr_to_lr_jpg: Map
    lr_to_hr: Map
    """One affine for the whole shared area."""
    aligned_by: str
    """scale, ecc, scale_fallback or unaligned (schema.py)."""
    found: LensMap | None = None
    """The registered map; None if not registered."""

    @property
    def lens(self) -> LensMap:
        """LR mosaic -> HR JPG, as stored in lr_to_hr_lens: the registered map, or else the affine."""
        return self.found or LensMap(self.lr_to_hr, np.zeros(2), 1.0)

    def over(self, left: float, top: float, right: float, bottom: float) -> Map:
        """LR mosaic -> HR JPG: the affine fitted to one box of the mosaic. Lens distortion makes it vary by tile."""
        return self.found.affine_over(left, top, right, bottom) if self.found else self.lr_to_hr


def decode_jpg(data: bytes, name: str) -> Jpg:
    """Decode a JPG to sRGB; `name` is for messages. Raises TileError if it is not a JPG, damaged or truncated."""
    try:
        found = read_picture(data, name, kinds=("JPG",))
    except PictureError as error:
        raise TileError(str(error)) from error
    return Jpg(found.stored, found.orientation, notes=found.notes)  # type: ignore[arg-type]  # JPGs have 8 bits


def pair_maps(raw: RawImage, lr: Jpg, hr: Jpg, zoom: float, *, ecc: bool) -> PairMaps:
    """Compute the maps from the focal ratio `zoom`. With `ecc`, HR's map is refined by registration to the mosaic.

    If registration fails, the unrefined map is used and marked "scale_fallback".
    """
    to_lr = _nominal(raw, lr, 1.0)
    to_hr = _nominal(raw, hr, zoom)
    if not ecc:
        return PairMaps(to_lr, to_hr, "scale")
    try:
        lens = register_raw(raw, hr.pixels_HWC, to_hr)
    except RegistrationError:
        return PairMaps(to_lr, to_hr, "scale_fallback")
    return PairMaps(to_lr, lens.affine_over(*affine.footprint(lens.affine, hr.size)), "ecc", lens)


def shared_area(grid: Grid, maps: PairMaps, lr_size: Size, hr_size: Size) -> Area:
    """The packed area covered by the grid and both JPGs; height or width is 0 or less if they do not overlap."""
    rows, cols = grid.size
    boxes = [affine.footprint(maps.lr_to_lr_jpg, lr_size), _hr_footprint(maps, hr_size)]
    top, left = grid.origin
    first_col = max(0.0, *((box[0] - left) / 2 for box in boxes))
    first_row = max(0.0, *((box[1] - top) / 2 for box in boxes))
    end_col = min(float(cols), *((box[2] - left) / 2 for box in boxes))
    end_row = min(float(rows), *((box[3] - top) / 2 for box in boxes))
    row, col = int(np.ceil(first_row - 1e-6)), int(np.ceil(first_col - 1e-6))
    return row, col, int(np.floor(end_row + 1e-6)) - row, int(np.floor(end_col + 1e-6)) - col


def _hr_footprint(maps: PairMaps, hr_size: Size) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) of HR in mosaic pixels, inset by how far the lens map may deviate from the affine."""
    left, top, right, bottom = affine.footprint(maps.lr_to_hr, hr_size)
    if maps.found is None:
        return left, top, right, bottom
    reach_px = 2 * maps.found.departure(maps.lr_to_hr, left, top, right, bottom)
    inset = reach_px / float(np.sqrt(abs(np.linalg.det(maps.lr_to_hr[:, :2]))))
    return left + inset, top + inset, right - inset, bottom - inset


def mosaic_origin(grid: Grid, area: Area) -> Map:
    """Map from mosaic pixels counted from the area's corner to LibRaw's visible area."""
    return affine.translation(grid.origin[1] + 2 * area[1], grid.origin[0] + 2 * area[0])


def tile_starts(length: int, tile: int, stride: int) -> list[int]:
    """Evenly spaced starts of tiles that cover all of `length`, at most `stride` apart; [] if no tile fits."""
    if length < tile:
        return []
    count = -(-(length - tile) // stride) + 1
    return [round(start) for start in np.linspace(0, length - tile, count).tolist()]


def starts_in(area: Area, tile_px: int, stride_px: int) -> tuple[list[int], list[int]]:
    """(rows, columns) at which the area's tiles start. Raises TileError if it holds none."""
    rows, cols = tile_starts(area[2], tile_px, stride_px), tile_starts(area[3], tile_px, stride_px)
    if not rows or not cols:
        shared = f"{max(area[3], 0)}x{max(area[2], 0)}"
        raise TileError(
            f"expected a shared area of at least {tile_px}x{tile_px} packed pixels, got {shared}; use a smaller --tile"
        )
    return rows, cols


@dataclass(frozen=True)
class Cutting:
    """How a pair is aligned and cut."""

    scale: int
    tile_px: int
    """Side of a tile, packed pixels of LR."""
    stride_px: int
    """Largest distance of neighbouring tiles, packed pixels of LR."""
    ecc: bool
    """Whether the pictures are registered; else the focal lengths align them."""
    keep_unaligned: bool = False
    """Whether pictures that do not show the same thing are cut, too, and flagged."""


def cut_tiles(
    raw: RawImage,
    lr: Jpg,
    hr: Jpg,
    zoom: float,
    how: Cutting,
) -> list[dict[str, Any]]:
    """The picture columns of each tile's row.

    Raises TileError if the shared area is smaller than one tile, UnalignedError if the pictures do not show the same
    thing, unless `how` keeps them.
    """
    scale, tile_px = how.scale, how.tile_px
    maps = pair_maps(raw, lr, hr, zoom, ecc=how.ecc)
    area = shared_area(raw, maps, lr.size, hr.size)
    rows, cols = starts_in(area, tile_px, how.stride_px)
    place = mosaic_origin(raw, area)
    size = (2 * area[2], 2 * area[3])
    lr_HWC = affine.sample(lr.stored, affine.compose(maps.lr_to_lr_jpg, place), size)
    hr_place = affine.compose(place, affine.scaling(1 / scale))
    hr_HWC = resample_hr(maps, hr, hr_place, (scale * size[0], scale * size[1]))
    low_HWC = np.asarray(cv2.resize(hr_HWC, size[::-1], interpolation=cv2.INTER_AREA), np.uint8)
    counts_4HW, render_HWC = raw.counts(*area), raw.render(*area)
    wrong = _wrong_scene(raw, lr, hr, maps, zoom, (render_HWC, lr_HWC, low_HWC))
    aligned_by = flagged(maps.aligned_by, wrong, keep_unaligned=how.keep_unaligned)
    quality = Quality(lr_HWC, low_HWC, scale, tile_px)
    shared_columns = _of_frames(raw, lr, hr) | {"scale": scale, "aligned_by": aligned_by}
    shared_columns |= _corrections(raw, render_HWC, lr, hr, maps, area, lr_HWC, low_HWC)
    shared_columns |= _look_columns(raw, lr, lr_HWC, render_HWC)
    tiles = []
    for row in rows:
        for col in cols:
            score, residual_px = quality.of(row, col)
            corner = mosaic_origin(raw, (area[0] + row, area[1] + col, tile_px, tile_px))
            (left, top), side = corner[:, 2].tolist(), 2 * tile_px
            tiles.append(
                shared_columns
                | {
                    "row": area[0] + row,
                    "col": area[1] + col,
                    "lr_raw": counts_4HW[:, row : row + tile_px, col : col + tile_px],
                    "lr_render": window(render_HWC, row, col, 2, tile_px),
                    "lr_rgb": window(lr_HWC, row, col, 2, tile_px),
                    "hr_rgb": window(hr_HWC, row, col, 2 * scale, tile_px),
                    "lr_to_hr": maps.over(left, top, left + side, top + side).ravel(),
                    "lr_to_hr_lens": maps.lens.numbers(),
                    "align_score": score,
                    "residual_px": residual_px,
                }
            )
    return tiles


def flagged(aligned_by: str, wrong: str | None, *, keep_unaligned: bool) -> str:
    """The column aligned_by of a pair. `wrong`: why its pictures do not show the same thing; raises UnalignedError
    unless such pairs are kept."""
    if wrong is None:
        return aligned_by
    if keep_unaligned:
        return "unaligned"
    raise UnalignedError(
        f"{wrong}; check the files and their focal lengths, exclude the frame, or use --keep-unaligned"
    )


def _wrong_scene(
    raw: RawImage,
    lr: Jpg,
    hr: Jpg,
    maps: PairMaps,
    zoom: float,
    pictures: tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.uint8]],
) -> str | None:
    """Why the pair's pictures do not show the same thing; None if they do, or if they are flat and nothing can be said.

    pictures: LR's rendering, LR's JPG and the low-passed HR, on the area's mosaic grid.
    """
    render, lr_shown, hr_shown = (luminance(picture) for picture in pictures)
    least = f"(at least {MIN_SCORE:g})"
    if lr.source == "camera" and (own := scene_score(render, lr_shown)) < MIN_SCORE:
        return f"expected a JPG of its RAW in the short frame, got a correlation of {own:.2f} {least}"
    if maps.aligned_by == "ecc" or not (score := scene_score(lr_shown, hr_shown)) < MIN_SCORE:
        return None
    if maps.aligned_by == "scale":  # with scale_fallback, registration has failed already
        with contextlib.suppress(RegistrationError):
            register_raw(raw, hr.pixels_HWC, _nominal(raw, hr, zoom))
            return None
    return f"expected two pictures of one scene, got a correlation of {score:.2f} {least} and no registration"


def resample_hr(maps: PairMaps, hr: Jpg, to_mosaic: Map, size: Size) -> NDArray[np.uint8]:
    """Resample HR, once, onto a grid of `size`; `to_mosaic` maps that grid to the LR mosaic."""
    if maps.found is None:
        return affine.sample(hr.stored, affine.compose(maps.lr_to_hr, to_mosaic), size)
    return sample_through(hr.pixels_HWC, maps.found.after(to_mosaic), size)


def _of_frames(raw: RawImage, lr: Jpg, hr: Jpg) -> dict[str, Any]:
    """The columns that describe the two frames' files."""
    return {
        "lr_source": lr.source,
        "hr_source": hr.source,
        "black_level": raw.black_level,
        "wb": raw.wb,
        "wb_source": raw.wb_source,
        "matrix_source": raw.matrix_source,
        "white_level": raw.white_level,
        "camera": raw.camera,
        "origin_row": raw.origin[0],
        "origin_col": raw.origin[1],
    }


class Quality:
    """Registration quality of each tile: correlation and residual shift of the low-passed HR picture against LR's."""

    def __init__(self, lr_HWC: NDArray[np.uint8], low_HWC: NDArray[np.uint8], scale: int, tile_px: int) -> None:
        self._lr, self._hr = luminance(lr_HWC), luminance(low_HWC)
        self._lr_detail, self._hr_detail = map(local_detail, (self._lr, self._hr))
        self._scale, self._side = scale, 2 * tile_px

    def of(self, row: int, col: int) -> tuple[float, float]:
        """(correlation, residual shift in HR pixels) of the tile at packed (row, col), relative to the area."""
        at = (slice(2 * row, 2 * row + self._side), slice(2 * col, 2 * col + self._side))
        wide = tuple(self._widened(span, length) for span, length in zip(at, self._lr.shape, strict=True))
        shift = measure_shift(self._lr_detail[wide], self._hr_detail[wide])
        return correlation(self._lr[at], self._hr[at]), float(np.hypot(*shift)) * self._scale

    @staticmethod
    def _widened(span: slice, length: int) -> slice:
        extra = max(0, 2 * _MEASURE_PX - (span.stop - span.start)) // 2
        return slice(max(0, span.start - extra), min(length, span.stop + extra))


def _corrections(
    raw: RawImage,
    render_HWC: NDArray[np.uint8],
    lr: Jpg,
    hr: Jpg,
    maps: PairMaps,
    area: Area,
    lr_HWC: NDArray[np.uint8],
    low_HWC: NDArray[np.uint8],
) -> dict[str, Any]:
    """corrections.measure of the pair. render_HWC, lr_HWC and low_HWC (low-passed HR) are on the area's mosaic grid."""
    place = mosaic_origin(raw, area)
    # HR's frame may stay in stored orientation, because only its radius is used. LR's is in sensor orientation.
    hr_frame = affine.about_centres(affine.units_per_px(hr.size), hr.size, (0, 0))
    lr_scale = float(np.abs(maps.lr_to_lr_jpg[0, :2]).sum())
    top, left, height, width = raw.camera_crop
    lr_frame = affine.about_centres(lr_scale * affine.units_per_px(lr.size), (height, width), (0, 0))
    to_frame = affine.translation(-left, -top)
    return corrections.measure(
        corrections.Pictures(
            rendering=render_HWC,
            lr=lr_HWC,
            hr=low_HWC,
            lr_is_jpg=lr.source == "camera",
            hr_is_jpg=hr.source == "camera",
            to_lr_units=affine.compose(lr_frame, affine.compose(to_frame, place)),
            to_hr_units=affine.compose(hr_frame, affine.compose(maps.lr_to_hr, place)),
            curve=raw.sensor.curve,
        )
    )


def _look_columns(raw: RawImage, lr: Jpg, lr_HWC: NDArray[np.uint8], render_HWC: NDArray[np.uint8]) -> dict[str, Any]:
    """The columns of photometry/look.py; null where LR has no camera JPG or its look cannot be measured."""
    look = measure_look(lr_HWC, render_HWC, raw.sensor.curve) if lr.source == "camera" else None
    return look.columns() if look else dict.fromkeys(LOOK_COLUMNS)


def _nominal(raw: RawImage, jpg: Jpg, zoom: float) -> Map:
    """LR mosaic -> stored JPG pixels, by the focal ratio about the image centre."""
    top, left, *size = raw.camera_crop
    frame_size = (size[0], size[1])
    flip = affine.stored_flip(jpg.orientation, raw.flip, jpg.size, frame_size)
    return affine.compose(affine.frame_to_jpg(zoom, frame_size, jpg.size, flip), affine.translation(-left, -top))


def window(image_HWC: NDArray[np.uint8], row: int, col: int, factor: int, tile_px: int) -> NDArray[np.uint8]:
    """One tile [C, factor t, factor t] of a picture that has `factor` pixels per packed pixel."""
    top, left, side = factor * row, factor * col, factor * tile_px
    return image_HWC[top : top + side, left : left + side].transpose(2, 0, 1)

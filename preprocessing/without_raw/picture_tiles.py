"""Cuts a pair of pictures without RAW into tiles.

The LR picture takes the place of the mosaic: its pixel (x, y), turned for the viewer, is mosaic pixel (x, y), and 2 x 2
of them are a packed pixel. Where HR has fewer than `scale` times its detail, LR is first reduced to fit.

Pairs of two kinds are told apart by comparing the pictures. Most show two fields of view, as the focal lengths say.
Data sets such as City100 and RealSR have cropped both pictures to one view, as a rule on one grid.
"""

import contextlib
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from preprocessing.frames import MAX_ZOOM_EXCESS
from preprocessing.photometry import corrections
from preprocessing.photometry.look import COLUMNS as LOOK_COLUMNS
from preprocessing.raw.picture import PictureError, read_picture
from preprocessing.registration import affine
from preprocessing.registration.affine import Map, Size
from preprocessing.registration.lens import LensMap
from preprocessing.registration.register import RegistrationError, register
from preprocessing.registration.same_scene import MIN_SCORE, scene_score
from preprocessing.registration.shift import luminance
from preprocessing.tiles import (
    Area,
    Cutting,
    Jpg,
    PairMaps,
    Quality,
    TileError,
    flagged,
    mosaic_origin,
    resample_hr,
    shared_area,
    starts_in,
    window,
)

KINDS = ("JPG", "PNG", "TIFF")
RAW_COLUMNS = ("lr_raw", "lr_render", "wb_source", "matrix_source", "white_level")
"""The columns that only a RAW has, null here, but for LEVELS."""
LEVELS = ("black_level", "wb")
"""Those that are lists of four values, NaN here: pyarrow 25 cannot read a null among lists of fixed length."""
_COMPARED_PX = 256
"""Shorter side at which the fields of view are compared."""
_SLACK = 1.05
"""Relative error of a stated zoom that still counts as the scale's."""


def read_colour(data: bytes, name: str) -> Jpg:
    """Decode a JPG, PNG or TIFF to sRGB, 8 bits, turned for the viewer. Raises TileError, also for grey and CMYK."""
    try:
        found = read_picture(data, name, kinds=KINDS)
    except PictureError as error:
        raise TileError(str(error)) from error
    if found.grey:
        raise TileError(f"{name}: expected a colour picture, got a grey one; export it as RGB or exclude the frame")
    pixels = found.upright_HWC
    if pixels.dtype == np.uint8:
        return Jpg(np.asarray(pixels, np.uint8), None, notes=found.notes)
    rounded = np.asarray(cv2.convertScaleAbs(pixels, alpha=1 / 257), np.uint8)
    return Jpg(rounded, None, notes=(*found.notes, "16 bits per sample rounded to 8"))


@dataclass(frozen=True)
class _Fit:
    """The LR picture on the grid that HR has `scale` times the pixels of, or more."""

    lr_HWC: NDArray[np.uint8]
    to_lr: Map
    """Grid -> LR picture."""
    to_hr: Map
    """Grid -> HR picture, by the fields of view."""
    one_view: bool
    """Whether both pictures show the same field of view."""

    @property
    def size(self) -> Size:
        """(rows, columns), packed pixels."""
        return self.lr_HWC.shape[0] // 2, self.lr_HWC.shape[1] // 2

    @property
    def origin(self) -> Size:
        return 0, 0


def cut_picture_tiles(
    lr: Jpg,
    hr: Jpg,
    zoom: float,
    how: Cutting,
) -> list[dict[str, Any]]:
    """The picture columns of each tile's row.

    Args:
        lr, hr: as `read_colour` returns them.
        zoom: HR's focal length / LR's.

    Raises:
        TileError: the shared area is smaller than one tile, or the zoom does not fit the scale; UnalignedError: the
            pictures do not show the same thing, unless `how` keeps them.
    """
    scale, tile_px = how.scale, how.tile_px
    fit = _fit(lr, hr, zoom, scale)
    maps = _maps(fit, hr, ecc=how.ecc)
    area = shared_area(fit, maps, lr.size, hr.size)
    rows, cols = starts_in(area, tile_px, how.stride_px)
    place, size = mosaic_origin(fit, area), (2 * area[2], 2 * area[3])
    top, left = 2 * area[0], 2 * area[1]
    lr_HWC = np.ascontiguousarray(fit.lr_HWC[top : top + size[0], left : left + size[1]])
    hr_place = affine.compose(place, affine.scaling(1 / scale))
    hr_HWC = resample_hr(maps, hr, hr_place, (scale * size[0], scale * size[1]))
    low_HWC = np.asarray(cv2.resize(hr_HWC, size[::-1], interpolation=cv2.INTER_AREA), np.uint8)
    wrong = _wrong_scene(fit, hr, maps, (lr_HWC, low_HWC))
    shared = dict.fromkeys((*RAW_COLUMNS, *LOOK_COLUMNS)) | {
        **{name: [float("nan")] * 4 for name in LEVELS},
        "lr_source": "camera",
        "hr_source": "camera",
        "origin_row": 0,
        "origin_col": 0,
        "scale": scale,
        "aligned_by": flagged(maps.aligned_by, wrong, keep_unaligned=how.keep_unaligned),
        **_exposure(fit, hr, maps, place, (lr_HWC, low_HWC)),
    }
    quality = Quality(lr_HWC, low_HWC, scale, tile_px)
    return [
        shared | _tile(maps, quality, (lr_HWC, hr_HWC), area, (row, col), scale, tile_px)
        for row in rows
        for col in cols
    ]


def _tile(
    maps: PairMaps,
    quality: Quality,
    pictures: tuple[NDArray[np.uint8], NDArray[np.uint8]],
    area: Area,
    place: tuple[int, int],
    scale: int,
    tile_px: int,
) -> dict[str, Any]:
    """The columns of the tile at packed (row, col) of the area."""
    row, col = place
    score, residual_px = quality.of(row, col)
    top, left, side = 2 * (area[0] + row), 2 * (area[1] + col), 2 * tile_px
    return {
        "row": area[0] + row,
        "col": area[1] + col,
        "lr_rgb": window(pictures[0], row, col, 2, tile_px),
        "hr_rgb": window(pictures[1], row, col, 2 * scale, tile_px),
        "lr_to_hr": maps.over(left, top, left + side, top + side).ravel(),
        "lr_to_hr_lens": maps.lens.numbers(),
        "align_score": score,
        "residual_px": residual_px,
    }


def _fit(lr: Jpg, hr: Jpg, zoom: float, scale: int) -> _Fit:
    one_view = _shows_one_view(lr, hr, zoom)
    to_hr = affine.frame_to_jpg(1.0 if one_view else zoom, lr.size, hr.size, 0)
    density = float(to_hr[0, 0])  # HR pixels per LR pixel
    if not one_view and not scale / MAX_ZOOM_EXCESS / _SLACK <= density <= scale * MAX_ZOOM_EXCESS * _SLACK:
        nearest = max(2, round(density))
        raise TileError(
            f"--scale: expected about the pictures' ratio of detail, {density:.3g}, got {scale}; use --scale {nearest}"
        )
    reduction = max(1.0, scale / density)
    if reduction == 1.0:
        return _Fit(lr.pixels_HWC, affine.translation(0, 0), to_hr, one_view)
    size = (int(lr.size[0] / reduction), int(lr.size[1] / reduction))
    to_lr = affine.about_centres(reduction, size, lr.size)
    reduced = affine.sample(lr.pixels_HWC, to_lr, size)
    return _Fit(reduced, to_lr, affine.compose(to_hr, to_lr), one_view)


def _shows_one_view(lr: Jpg, hr: Jpg, zoom: float) -> bool:
    """Whether the two pictures match better as one field of view than as two whose sides differ by `zoom`."""

    def score(zoom: float) -> float:
        to_hr = affine.frame_to_jpg(zoom, lr.size, hr.size, 0)
        left, top, right, bottom = affine.footprint(to_hr, hr.size)
        box = [max(0.0, left), max(0.0, top), min(float(lr.size[1]), right), min(float(lr.size[0]), bottom)]
        width, height = box[2] - box[0], box[3] - box[1]
        shrink = _COMPARED_PX / min(width, height)
        size = (round(height * shrink), round(width * shrink))
        from_grid = np.array([[width / size[1], 0, box[0]], [0, height / size[0], box[1]]])
        planes = [
            luminance(affine.sample(picture.pixels_HWC, to_picture, size))
            for picture, to_picture in ((lr, from_grid), (hr, affine.compose(to_hr, from_grid)))
        ]
        return scene_score(planes[0], planes[1])

    return bool(score(1.0) > score(zoom))  # NaN, of flat pictures, says no


def _maps(fit: _Fit, hr: Jpg, *, ecc: bool) -> PairMaps:
    to_grid = affine.translation(0, 0)
    if not ecc:
        return PairMaps(to_grid, fit.to_hr, "scale")
    try:
        lens = _register(fit, hr)
    except RegistrationError:
        return PairMaps(to_grid, fit.to_hr, "scale_fallback")
    return PairMaps(to_grid, lens.affine_over(*affine.footprint(lens.affine, hr.size)), "ecc", lens)


def _register(fit: _Fit, hr: Jpg) -> LensMap:
    # Pictures that were cropped to one view have lost the centre that radial distortion refers to.
    return register(luminance(fit.lr_HWC), hr.pixels_HWC, fit.to_hr, lens=not fit.one_view)


def _wrong_scene(
    fit: _Fit, hr: Jpg, maps: PairMaps, pictures: tuple[NDArray[np.uint8], NDArray[np.uint8]]
) -> str | None:
    """Why the pictures do not show the same thing; None if they do, or if they are flat and nothing can be said."""
    if maps.aligned_by == "ecc" or not (score := scene_score(*map(luminance, pictures))) < MIN_SCORE:
        return None
    if maps.aligned_by == "scale":  # with scale_fallback, registration has failed already
        with contextlib.suppress(RegistrationError):
            _register(fit, hr)
            return None
    least = f"(at least {MIN_SCORE:g})"
    return f"expected two pictures of one scene, got a correlation of {score:.2f} {least} and no registration"


def _exposure(
    fit: _Fit, hr: Jpg, maps: PairMaps, place: Map, pictures: tuple[NDArray[np.uint8], NDArray[np.uint8]]
) -> dict[str, float | None]:
    """Exposure of HR against LR in sRGB-decoded light; the columns that compare a JPG with its RAW are null."""
    lr_HWC, low_HWC = pictures
    size = fit.lr_HWC.shape[:2]
    lr_frame = affine.about_centres(affine.units_per_px(size), size, (0, 0))
    hr_frame = affine.about_centres(affine.units_per_px(hr.size), hr.size, (0, 0))
    found = corrections.measure(
        corrections.Pictures(
            rendering=lr_HWC,
            lr=lr_HWC,
            hr=low_HWC,
            lr_is_jpg=False,
            hr_is_jpg=False,
            to_lr_units=affine.compose(lr_frame, place),
            to_hr_units=affine.compose(hr_frame, affine.compose(maps.lr_to_hr, place)),
        )
    )
    return {name: None if name.startswith("jpg_") else value for name, value in found.items()}

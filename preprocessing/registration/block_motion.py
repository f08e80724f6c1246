"""How blocks of two pictures moved against each other, and the one lens map that most of them follow.

Each block of a short-focal picture says how far the long-focal one, seen through the present map, still lies off, and
how well it knows (Lucas and Kanade's normal equations). A robust fit joins them: what stands nearer moves on its own
and is left out, as are highlights, noise and moire.
"""

from dataclasses import dataclass, replace

import cv2
import numpy as np
from numpy.typing import NDArray

from preprocessing.colour import GAMMA_BYTE_TO_LINEAR, linear_to_gamma
from preprocessing.registration.affine import Map, Size, apply, compose
from preprocessing.registration.lens import LensMap, Points

Plane = NDArray[np.float32]

OVERSAMPLING = 2.0
"""Long-focal pixels per short-focal one: bilinear sampling is then exact enough, and moves nothing (OpenCV's bicubic
kernel is up to 0.05 px off)."""
_LENS_PX = 0.55
"""Point spread of a lens; the pixel's own area comes to it."""
_MOSAIC_WEIGHTS = np.array([0.25, 0.5, 0.25], np.float32)
_JPG_WEIGHTS = np.array([0.299, 0.587, 0.114], np.float32)
_NEIGHBOURHOOD_PX = 1.5
"""Fine detail decides: tones and colours differ between the pictures in large structures, not in small ones."""
_DETAIL_REACH_PX = 3
"""How far from an edge detail is not what it would be were there more to see."""
_NOISE = 1.0
"""Of 255: contrast below this is not raised to the rank of detail."""
_PIXELS_PER_SAMPLE = 4.0
"""Neighbouring residuals are alike: so many pixels count as one independent observation."""
_MODEL_ERROR_PX = 0.05
"""What a block is trusted with at best: aliasing moves it by about this much."""
_DARKEST = 10.0
"""Of 255: what pushes edges is not thought greater in darker places than here."""
_TUKEY = 3.0
"""Blocks farther off than so many standard deviations are another motion."""
_RADIAL_SD = 0.03
_TILT_SD = 0.0005
"""What lenses and hands make likely (LensMap's units); they hold where a picture has too little detail to say."""
_EQUAL_PX = 0.25
"""Blocks known better than this have an equal say at first: most of the area decides which motion is the map's, not a
few sharp leaves before a soft background."""
_ROUNDS = 6


@dataclass(frozen=True)
class LongLight:
    """The long-focal picture in linear light at OVERSAMPLING times the short one's density: what levels are made of."""

    colours_HW3: Plane
    """As the short picture's sensor sees them, where that is a mosaic."""
    is_mosaic: bool
    to_pixels: Map
    """From the short picture's coordinates, as the nominal map sees them, to pixels here."""

    @classmethod
    def prepare(cls, long_HWC: NDArray[np.uint8], nominal: Map, sensor: NDArray[np.float64] | None) -> "LongLight":
        """From a JPG [H, W, 3]; `sensor`: see `registration.register`."""
        height, width = long_HWC.shape[:2]
        zoom = float(np.sqrt(abs(np.linalg.det(nominal[:, :2]))))
        size = (max(8, round(width * OVERSAMPLING / zoom)), max(8, round(height * OVERSAMPLING / zoom)))
        channels = [cv2.LUT(np.ascontiguousarray(long_HWC[..., channel]), GAMMA_BYTE_TO_LINEAR) for channel in range(3)]
        small = np.dstack([cv2.resize(light, size, interpolation=cv2.INTER_AREA) for light in channels])
        if sensor is not None:
            small = np.maximum(cv2.transform(small, sensor.astype(np.float32)), 0)
        to_pixels = compose(np.array([[size[0] / width, 0, 0], [0, size[1] / height, 0]]), nominal)
        return cls(np.asarray(small, np.float32), sensor is not None, to_pixels)


@dataclass(frozen=True)
class LongPicture:
    """The long-focal picture of one level, as soft as the short one, with its slopes."""

    planes_HW3: Plane
    """Luminance in [0, 255], and its slopes along x and y of the short picture's coordinates."""
    colours_HW3: Plane | None
    """Linear light, without the mosaic's mean over neighbours: where the short picture is a mosaic at full size."""
    to_pixels: Map

    @property
    def size(self) -> Size:
        return self.planes_HW3.shape[0], self.planes_HW3.shape[1]

    @classmethod
    def of_level(cls, long: LongLight, shrink: float) -> "LongPicture":
        """For a short picture that was shrunk by `shrink`."""
        height, width = long.colours_HW3.shape[:2]
        size = (max(8, round(width / shrink)), max(8, round(height / shrink)))
        small = long.colours_HW3 if shrink == 1 else cv2.resize(long.colours_HW3, size, interpolation=cv2.INTER_AREA)
        density = OVERSAMPLING / shrink
        # Averages over shrink x shrink pixels there, over 1 / density here.
        variance = _LENS_PX**2 + shrink**2 / 12 - 1 / (12 * density**2)
        small = cv2.GaussianBlur(small, (0, 0), density * variance**0.5)
        light = cv2.transform(small, (_MOSAIC_WEIGHTS if long.is_mosaic else _JPG_WEIGHTS)[None])
        if long.is_mosaic:
            light = cv2.GaussianBlur(light, (0, 0), density * 0.5**0.5)
        values = linear_to_gamma(np.asarray(light, np.float32))
        slope_x = cv2.Sobel(values, cv2.CV_32F, 1, 0, ksize=1, scale=0.5)
        slope_y = cv2.Sobel(values, cv2.CV_32F, 0, 1, ksize=1, scale=0.5)
        to_pixels = compose(np.array([[size[0] / width, 0, 0], [0, size[1] / height, 0]]), long.to_pixels)
        (xx, xy), (yx, yy) = to_pixels[:, :2].tolist()
        planes = np.dstack([values, slope_x * xx + slope_y * yx, slope_x * xy + slope_y * yy])
        colours = np.asarray(small, np.float32) if long.is_mosaic and shrink == 1 else None
        return cls(np.asarray(planes, np.float32), colours, to_pixels)

    def seen(self, mapping: LensMap, at_HW2: Points) -> tuple[Plane, Plane]:
        """(detail, its slopes and its push [H, W, 4], inside [H, W] as 0 or 1) at mapping(at).

        The push: tones that are bent before a lens's blur, and sharpening, move edges towards their darker side, the
        more so the higher their contrast (0.05 px from a tenth of white to four fifths of it): to first order by
        |slope|^2 / value, times a number that holds for all of the picture. Inside is what shows the long picture and
        is not next to its edge, or to that of `at`.
        """
        height, width = self.size
        pixels = apply(self.to_pixels, mapping(at_HW2.reshape(-1, 2))).reshape(at_HW2.shape)
        shown = np.asarray(((pixels > 2) & (pixels < np.array([width, height]) - 2)).all(-1), np.float32)
        x, y = np.moveaxis((pixels - 0.5).astype(np.float32), -1, 0)
        planes = cv2.remap(self.planes_HW3, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        if self.colours_HW3 is not None:
            first = np.floor(at_HW2[0, 0]).astype(int)
            colours = cv2.remap(self.colours_HW3, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
            mosaic = _as_mosaic(np.asarray(colours, np.float32), int(first[1]) % 2, int(first[0]) % 2)
            planes[..., 0] = linear_to_gamma(mean_over_neighbours(mosaic))
        push = (planes[..., 1] ** 2 + planes[..., 2] ** 2) / (planes[..., 0] + _DARKEST)
        planes = np.dstack([planes, push])
        window = np.ones((2 * _DETAIL_REACH_PX + 1,) * 2, np.uint8)
        inside = cv2.erode(shown, window, borderType=cv2.BORDER_CONSTANT, borderValue=(0,))
        return fine_detail(np.asarray(planes, np.float32)), np.asarray(inside, np.float32)


def _as_mosaic(colours_HW3: Plane, row: int, col: int) -> Plane:
    """[H, W]: of each pixel what an RGGB sensor keeps; the corner is at (row, col) of its 2 x 2 block.

    A mosaic sees a red edge on every other row alone: what that does to its place, it does to both pictures.
    """
    mosaic = colours_HW3[..., 1].copy()
    mosaic[row::2, col::2] = colours_HW3[row::2, col::2, 0]
    mosaic[1 - row :: 2, 1 - col :: 2] = colours_HW3[1 - row :: 2, 1 - col :: 2, 2]
    return mosaic


def mean_over_neighbours(mosaic: Plane) -> Plane:
    """(R + 2 G + B) / 4 about every pixel: the kernel 1 2 1 each way weighs colours alike at all places of a mosaic, so
    nothing is moved."""
    kernel = np.array([0.25, 0.5, 0.25], np.float32)
    return np.asarray(
        cv2.sepFilter2D(mosaic, cv2.CV_32F, kernel, kernel, borderType=cv2.BORDER_REFLECT_101), np.float32
    )


def fine_detail(planes: Plane) -> Plane:
    """[H, W] or [H, W, C]: what stands out from its close neighbourhood, in units of the first plane's contrast."""
    high = planes - _near_mean(planes)
    first = high if high.ndim == 2 else high[..., 0]
    contrast = np.sqrt(np.maximum(_near_mean(first * first), 0)) + _NOISE
    return np.asarray(high / (contrast if high.ndim == 2 else contrast[..., None]), np.float32)


def _near_mean(values: Plane) -> Plane:
    return np.asarray(cv2.GaussianBlur(values, (0, 0), _NEIGHBOURHOOD_PX), np.float32)


@dataclass(frozen=True)
class Blocks:
    """Per block: the normal equations of its shift, the residual's mean square, the covered share, its centre."""

    normal_N3: NDArray[np.float64]
    """xx, xy, yy"""
    right_N2: NDArray[np.float64]
    power_N: NDArray[np.float64]
    cover_N: NDArray[np.float64]
    centre_N2: Points
    pixels: int

    @classmethod
    def measure(
        cls, fixed: Plane, seen: tuple[Plane, Plane], at_HW2: Points, side: int, *, least_cover: float = 0.5
    ) -> "Blocks":
        """Of a short picture's detail [H, W] (multiples of `side`) and what the long one shows there."""
        planes, inside = seen
        moving = planes[..., 0] * inside
        gain = float((fixed * moving).sum() / max(float((moving * moving).sum()), 1e-9))
        gain = float(np.clip(gain, 0.2, 3.0))  # before the pictures meet, the fit is near 0 and would stop the steps
        residual = fixed * inside - gain * moving
        x, y = gain * planes[..., 1] * inside, gain * planes[..., 2] * inside
        push = planes[..., 3] * inside
        normal = _block_means([x * x, x * y, y * y], side)
        rest = _block_means([x * residual, y * residual, residual * residual, inside], side)
        pushed = _block_means([x * push, y * push, push * residual, push * push], side)
        centre = _block_means([at_HW2[..., 0], at_HW2[..., 1]], side)
        used = rest[:, 3] > least_cover
        blocks = cls(normal[used], rest[used, :2], rest[used, 2], rest[used, 3], centre[used], side * side)
        return blocks._without_push(pushed[used])

    def _without_push(self, pushed_N4: NDArray[np.float64]) -> "Blocks":
        """Less what one number times the push explains in all of them, each free to shift as it likes.

        pushed_N4: the means of the push times the slopes, the residual and itself.
        """
        if not len(pushed_N4):
            return self
        along, with_residual, with_itself = pushed_N4[:, :2], pushed_N4[:, 2], pushed_N4[:, 3]
        taken = np.einsum("nij,nj->ni", self.inverse_N22(), along)
        weight = 1 / np.maximum(self.power_N, 1e-6)
        weight = np.minimum(weight, 3 * np.median(weight))
        about = weight @ (with_residual - (taken * self.right_N2).sum(1))
        amount = about / (weight @ (with_itself - (taken * along).sum(1)) + 1e-12)
        power = self.power_N - 2 * amount * with_residual + amount**2 * with_itself
        return replace(self, right_N2=self.right_N2 - amount * along, power_N=power)

    def inverse_N22(self) -> NDArray[np.float64]:
        """The inverse of the normal equations' matrices, tame where a block has no detail."""
        xx, xy, yy = self.normal_N3.T
        normal = np.stack([np.stack([xx, xy], -1), np.stack([xy, yy], -1)], -1)
        tame = (1e-4 * float(np.median(xx + yy)) + 1e-9) * np.eye(2)
        return np.asarray(np.linalg.inv(normal + tame), np.float64)


@dataclass(frozen=True)
class Fit:
    """A step of the map's parameters, and how well it is known."""

    step: NDArray[np.float64]
    """(9,)"""
    error_px: float
    """Standard error of the mapped point, at 95 % of the blocks, short-focal pixels."""
    kept: float
    """Share of the blocks that follow the map."""


def fit(blocks: Blocks, mapping: LensMap, *, px: float, lens: bool) -> Fit:
    """The step that most blocks ask for. px: size of the level's pixels; lens: tilt and radial distortion, too."""
    count = 9 if lens else 6
    shift, certain = _block_shifts(blocks, px)
    slopes = mapping.slopes(blocks.centre_N2)[:, :, :count]
    prior = np.array([0.0] * 6 + [_RADIAL_SD**-2, _TILT_SD**-2, _TILT_SD**-2])[:count]
    present = np.array([0.0] * 6 + [mapping.radial, *mapping.tilt])[:count]
    weighted = np.einsum("nip,nij->npj", slopes, certain)
    information = np.trace(certain, axis1=1, axis2=2) / 2
    weight, spread = 1 / np.maximum(information * (_EQUAL_PX * px) ** 2, 1), 1.0
    step, normal = np.zeros(count), np.eye(count)
    for _ in range(_ROUNDS):
        kept = weighted * (weight / spread)[:, None, None]
        normal = np.einsum("npj,njq->pq", kept, slopes) + np.diag(prior)
        normal += 1e-9 * np.trace(normal) * np.eye(count)
        step = np.linalg.solve(normal, np.einsum("npj,nj->p", kept, shift) - prior * present)
        off = shift - slopes @ step
        distance = np.einsum("ni,nij,nj->n", off, certain, off)
        spread = max(float(np.median(distance)) / 1.386, 0.02)  # the median of chi square with two degrees
        weight = np.clip(1 - distance / (2 * spread * _TUKEY**2), 0, None) ** 2
    variance = np.einsum("nip,pq,niq->n", slopes, np.linalg.inv(normal), slopes)
    whole = np.zeros(9)
    whole[:count] = step
    return Fit(whole, float(np.sqrt(np.percentile(variance, 95))), float((weight > 0.1).mean()))


def _block_shifts(blocks: Blocks, px: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """([N, 2] shifts, [N, 2, 2] inverse covariances)."""
    inverse = blocks.inverse_N22()
    shift = np.einsum("nij,nj->ni", inverse, blocks.right_N2)
    explained = np.einsum("ni,ni->n", blocks.right_N2, shift)
    left = np.maximum(blocks.power_N - explained, 0.1 * blocks.power_N) + 1e-6
    samples = blocks.pixels * blocks.cover_N / _PIXELS_PER_SAMPLE
    covariance = inverse * (left / samples)[:, None, None] + (_MODEL_ERROR_PX * px) ** 2 * np.eye(2)
    return np.clip(shift, -2 * px, 2 * px), np.linalg.inv(covariance)


def _block_means(planes: list[NDArray[np.floating]], side: int) -> NDArray[np.float64]:
    """[blocks, planes]"""
    size = (planes[0].shape[1] // side, planes[0].shape[0] // side)
    means = [cv2.resize(plane.astype(np.float32), size, interpolation=cv2.INTER_AREA).ravel() for plane in planes]
    return np.stack(means, axis=1).astype(np.float64)

"""How blocks of two pictures moved against each other, and the one lens map that most of them follow.

Each block of a short-focal picture says how far the long-focal one, seen through the present map, still lies off, and
how well it knows (Lucas and Kanade's normal equations). A robust fit joins them: what stands nearer moves on its own
and is left out, as are highlights, noise and moire.
"""

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from preprocessing.geometry import Map, Size, apply, compose
from preprocessing.lens import LensMap, Points

Plane = NDArray[np.float32]

OVERSAMPLING = 2.0
"""Long-focal pixels per short-focal one: bilinear sampling is then exact enough, and moves nothing (OpenCV's bicubic
kernel is up to 0.05 px off)."""
_NEIGHBOURHOOD_PX = 1.5
"""Fine detail decides: tones and colours differ between the pictures in large structures, not in small ones."""
_NOISE = 1.0
"""Of 255: contrast below this is not raised to the rank of detail."""
_PIXELS_PER_SAMPLE = 4.0
"""Neighbouring residuals are alike: so many pixels count as one independent observation."""
_MODEL_ERROR_PX = 0.05
"""What a block is trusted with at best: aliasing moves it by about this much."""
_TUKEY = 3.0
"""Blocks farther off than so many standard deviations are another motion."""
_RADIAL_SD = 0.03
_TILT_SD = 0.0005
"""What lenses and hands make likely (LensMap's units); they hold where a picture has too little detail to say."""
_ROUNDS = 6


@dataclass(frozen=True)
class LongPicture:
    """The long-focal picture, low-passed to the short one's sharpness, with slopes, at OVERSAMPLING times the density.

    to_pixels leads from the short picture's coordinates, as the nominal map sees them, to this picture's pixels.
    """

    planes_HW3: Plane
    """Detail, and its slope along x and y of the short picture's coordinates."""
    to_pixels: Map

    @property
    def size(self) -> Size:
        return self.planes_HW3.shape[0], self.planes_HW3.shape[1]

    @classmethod
    def prepare(cls, light: Plane, nominal: Map, blur_px: float, shrink: float) -> "LongPicture":
        """From linear light [H, W]; for a short picture shrunk by `shrink` and a Gaussian of `blur_px` before that."""
        height, width = light.shape
        zoom = float(np.sqrt(abs(np.linalg.det(nominal[:, :2]))))
        density = OVERSAMPLING / shrink
        small_w, small_h = (max(8, round(side * density / zoom)) for side in (width, height))
        small = cv2.resize(light, (small_w, small_h), interpolation=cv2.INTER_AREA)
        # Averages over shrink x shrink pixels there, over 1 / density here.
        variance = blur_px**2 + (shrink**2 - 1) / 12 - 1 / (12 * density**2)
        small = cv2.GaussianBlur(small, (0, 0), density * max(variance, 0.01) ** 0.5)
        detail = fine_detail(encode(np.asarray(small, np.float32)), OVERSAMPLING)
        slope_x = cv2.Sobel(detail, cv2.CV_32F, 1, 0, ksize=1, scale=0.5)
        slope_y = cv2.Sobel(detail, cv2.CV_32F, 0, 1, ksize=1, scale=0.5)
        to_pixels = compose(np.array([[small_w / width, 0, 0], [0, small_h / height, 0]]), nominal)
        (xx, xy), (yx, yy) = to_pixels[:, :2].tolist()
        planes = np.dstack([detail, slope_x * xx + slope_y * yx, slope_x * xy + slope_y * yy])
        return cls(planes.astype(np.float32), to_pixels)

    def seen(self, mapping: LensMap, at_HW2: Points) -> tuple[Plane, Plane]:
        """(planes [H, W, 3], inside [H, W] as 0 or 1) at mapping(at)."""
        height, width = self.size
        pixels = apply(self.to_pixels, mapping(at_HW2.reshape(-1, 2))).reshape(at_HW2.shape)
        inside = ((pixels > 2) & (pixels < np.array([width, height]) - 2)).all(-1)
        index = (pixels - 0.5).astype(np.float32)
        planes = cv2.remap(
            self.planes_HW3, index[..., 0], index[..., 1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
        )
        return np.asarray(planes, np.float32), np.asarray(inside, np.float32)


def fine_detail(plane: Plane, density: float) -> Plane:
    """What stands out from its close neighbourhood, in units of its contrast there; density: pixels per short pixel."""

    def low(values: Plane) -> Plane:
        return np.asarray(cv2.GaussianBlur(values, (0, 0), _NEIGHBOURHOOD_PX * density), np.float32)

    high = plane - low(plane)
    return np.asarray(high / (np.sqrt(np.maximum(low(high * high), 0)) + _NOISE), np.float32)


def encode(light: Plane) -> Plane:
    """Linear light in [0, 1] -> about what a JPG holds, [0, 255]."""
    return np.asarray(255 * np.power(np.maximum(light, 0), np.float32(1 / 2.2)), np.float32)


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
        normal = _block_means([x * x, x * y, y * y], side)
        rest = _block_means([x * residual, y * residual, residual * residual, inside], side)
        centre = _block_means([at_HW2[..., 0], at_HW2[..., 1]], side)
        used = rest[:, 3] > least_cover
        normal, rest, centre = normal[used], rest[used], centre[used]
        return cls(normal, rest[:, :2], rest[:, 2], rest[:, 3], centre, side * side)


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
    weight, spread = np.ones(len(shift)), 1.0
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
    xx, xy, yy = blocks.normal_N3.T
    normal = np.stack([np.stack([xx, xy], -1), np.stack([xy, yy], -1)], -1)
    inverse = np.linalg.inv(normal + (1e-4 * float(np.median(xx + yy)) + 1e-9) * np.eye(2))
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

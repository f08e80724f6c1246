"""Measures how blocks of two pictures moved, and fits the one lens map that most blocks follow.

Each block of the short-focal picture yields the shift that remains under the current map, and its precision (Lucas and
Kanade's normal equations). A robust fit combines them and leaves out blocks that disagree: nearer objects, highlights,
noise and moire.
"""

from dataclasses import dataclass, replace

import cv2
import numpy as np
from numpy.typing import NDArray

from preprocessing.colour import GAMMA_BYTE_TO_LINEAR, linear_to_gamma
from preprocessing.registration.affine import Map, Size, apply, compose
from preprocessing.registration.lens import LensMap, Points
from preprocessing.registration.shift import Plane

OVERSAMPLING = 2.0
"""Long-focal pixels per short-focal pixel. At this density bilinear sampling is accurate enough and unbiased (OpenCV's
bicubic kernel is up to 0.05 px off)."""
_LENS_PX = 0.55
"""Standard deviation of the lens's point spread, without the pixel's area."""
_MOSAIC_WEIGHTS = np.array([0.25, 0.5, 0.25], np.float32)
_JPG_WEIGHTS = np.array([0.299, 0.587, 0.114], np.float32)
_NEIGHBOURHOOD_PX = 1.5
"""Standard deviation of the local mean. Only fine detail is compared: tones and colours of the two pictures differ on a
larger scale."""
_DETAIL_REACH_PX = 3
"""Detail within this distance of an edge is unreliable."""
_NOISE = 1.0
"""Of 255, added to the local contrast so that noise is not amplified."""
_PIXELS_PER_SAMPLE = 4.0
"""Neighbouring residuals are correlated: this many pixels count as one independent observation."""
_MODEL_ERROR_PX = 0.05
"""Least standard deviation of a block's shift: aliasing moves blocks by about this much."""
_EDGE_BIAS_FLOOR = 10.0
"""Of 255, added to the value in the edge bias, which would otherwise grow without limit in dark places."""
_TUKEY = 3.0
"""Blocks farther off than this many standard deviations follow another motion."""
_RADIAL_SD = 0.03
_TILT_SD = 0.0005
"""Priors for the lens and the hand's motion (LensMap's units). They decide where a picture has too little detail."""
_EQUAL_WEIGHT_PX = 0.25
"""Blocks known better than this start with equal weights. The map then follows the motion of the largest area, not that
of a few sharp leaves in front of a soft background."""
_ROUNDS = 6
"""Rounds of reweighted least squares."""


@dataclass(frozen=True)
class PyramidBase:
    """The long-focal picture in linear light at OVERSAMPLING times the short one's density; the base of all levels."""

    colours_HW3: Plane
    """Camera colours if the short picture is a mosaic, else sRGB primaries."""
    is_mosaic: bool
    """Whether the short picture is a mosaic."""
    to_pixels: Map
    """The nominal map, scaled to this picture's pixels. Its input is (x, y) after the map being fitted."""

    @classmethod
    def prepare(
        cls, long_HWC: NDArray[np.uint8], nominal: Map, camera_matrix: NDArray[np.float64] | None
    ) -> "PyramidBase":
        """From a JPG [H, W, 3]; `nominal` and `camera_matrix` as for `register`."""
        height, width = long_HWC.shape[:2]
        zoom = float(np.sqrt(abs(np.linalg.det(nominal[:, :2]))))
        size = (max(8, round(width * OVERSAMPLING / zoom)), max(8, round(height * OVERSAMPLING / zoom)))
        channels = [cv2.LUT(np.ascontiguousarray(long_HWC[..., channel]), GAMMA_BYTE_TO_LINEAR) for channel in range(3)]
        small = np.dstack([cv2.resize(light, size, interpolation=cv2.INTER_AREA) for light in channels])
        if camera_matrix is not None:
            small = np.maximum(cv2.transform(small, camera_matrix.astype(np.float32)), 0)
        to_pixels = compose(np.array([[size[0] / width, 0, 0], [0, size[1] / height, 0]]), nominal)
        return cls(np.asarray(small, np.float32), camera_matrix is not None, to_pixels)


@dataclass(frozen=True)
class PyramidLevel:
    """The long-focal picture at one level, blurred like the short one, with its gradient."""

    planes_HW3: Plane
    """Luminance in [0, 255], and its derivatives along x and y of the short picture's coordinates."""
    colours_HW3: Plane | None
    """Linear light before the mean over neighbours, if the short picture is a mosaic at full size; else None."""
    to_pixels: Map
    """As in PyramidBase."""

    @property
    def size(self) -> Size:
        return self.planes_HW3.shape[0], self.planes_HW3.shape[1]

    @classmethod
    def of(cls, base: PyramidBase, shrink: float) -> "PyramidLevel":
        """The level for a short picture shrunk by `shrink`."""
        height, width = base.colours_HW3.shape[:2]
        size = (max(8, round(width / shrink)), max(8, round(height / shrink)))
        small = base.colours_HW3 if shrink == 1 else cv2.resize(base.colours_HW3, size, interpolation=cv2.INTER_AREA)
        density = OVERSAMPLING / shrink
        # The short picture averages over shrink x shrink pixels; here a pixel averages over 1 / density.
        variance = _LENS_PX**2 + shrink**2 / 12 - 1 / (12 * density**2)
        small = cv2.GaussianBlur(small, (0, 0), density * variance**0.5)
        light = cv2.transform(small, (_MOSAIC_WEIGHTS if base.is_mosaic else _JPG_WEIGHTS)[None])
        if base.is_mosaic:
            light = cv2.GaussianBlur(light, (0, 0), density * 0.5**0.5)
        values = linear_to_gamma(np.asarray(light, np.float32))
        gradient_x = cv2.Sobel(values, cv2.CV_32F, 1, 0, ksize=1, scale=0.5)
        gradient_y = cv2.Sobel(values, cv2.CV_32F, 0, 1, ksize=1, scale=0.5)
        to_pixels = compose(np.array([[size[0] / width, 0, 0], [0, size[1] / height, 0]]), base.to_pixels)
        (xx, xy), (yx, yy) = to_pixels[:, :2].tolist()
        planes = np.dstack([values, gradient_x * xx + gradient_y * yx, gradient_x * xy + gradient_y * yy])
        colours = np.asarray(small, np.float32) if base.is_mosaic and shrink == 1 else None
        return cls(np.asarray(planes, np.float32), colours, to_pixels)

    def warped(self, mapping: LensMap, at_HW2: Points) -> tuple[Plane, Plane]:
        """([H, W, 4] detail, its gradient and its edge bias, at mapping(at); [H, W] 1 where they are valid, else 0).

        Edge bias: sharpening, and a tone curve applied before a lens's blur, move edges towards their darker side, by
        more at higher contrast (0.05 px from a tenth of white to four fifths of it). To first order the shift is
        |gradient|^2 / value times one coefficient for the whole picture, which `Blocks` fits.
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
        edge_bias = (planes[..., 1] ** 2 + planes[..., 2] ** 2) / (planes[..., 0] + _EDGE_BIAS_FLOOR)
        planes = np.dstack([planes, edge_bias])
        window = np.ones((2 * _DETAIL_REACH_PX + 1,) * 2, np.uint8)
        inside = cv2.erode(shown, window, borderType=cv2.BORDER_CONSTANT, borderValue=(0,))
        return fine_detail(np.asarray(planes, np.float32)), np.asarray(inside, np.float32)


def _as_mosaic(colours_HW3: Plane, row: int, col: int) -> Plane:
    """[H, W] an RGGB mosaic of the colours; (row, col) is the corner's place in its 2 x 2 block.

    A mosaic has red on every other row only, which displaces red edges. Both pictures must have this error.
    """
    mosaic = colours_HW3[..., 1].copy()
    mosaic[row::2, col::2] = colours_HW3[row::2, col::2, 0]
    mosaic[1 - row :: 2, 1 - col :: 2] = colours_HW3[1 - row :: 2, 1 - col :: 2, 2]
    return mosaic


def mean_over_neighbours(mosaic: Plane) -> Plane:
    """(R + 2 G + B) / 4 around every pixel. The kernel 1 2 1 weights the colours equally at all places of a mosaic, so
    it shifts no edge."""
    kernel = np.array([0.25, 0.5, 0.25], np.float32)
    return np.asarray(
        cv2.sepFilter2D(mosaic, cv2.CV_32F, kernel, kernel, borderType=cv2.BORDER_REFLECT_101), np.float32
    )


def fine_detail(planes: Plane) -> Plane:
    """[H, W] or [H, W, C]: the planes minus their local means, divided by the first plane's local contrast."""
    high = planes - _local_mean(planes)
    first = high if high.ndim == 2 else high[..., 0]
    contrast = np.sqrt(np.maximum(_local_mean(first * first), 0)) + _NOISE
    return np.asarray(high / (contrast if high.ndim == 2 else contrast[..., None]), np.float32)


def _local_mean(values: Plane) -> Plane:
    return np.asarray(cv2.GaussianBlur(values, (0, 0), _NEIGHBOURHOOD_PX), np.float32)


@dataclass(frozen=True)
class Blocks:
    """Normal equations of the shift of N blocks, as means over each block's pixels."""

    normal_N3: NDArray[np.float64]
    """Gradient products xx, xy, yy: the matrix."""
    right_N2: NDArray[np.float64]
    """Gradient times residual: the right-hand side."""
    power_N: NDArray[np.float64]
    """Mean square of the residual."""
    cover_N: NDArray[np.float64]
    """Share of the block that the long picture covers."""
    centre_N2: Points
    """(x, y) in full-size coordinates."""
    pixels: int
    """Pixels per block."""

    @classmethod
    def measure(
        cls, fixed: Plane, warped: tuple[Plane, Plane], at_HW2: Points, side: int, *, min_cover: float = 0.5
    ) -> "Blocks":
        """From the short picture's detail [H, W] (multiples of `side`) and `PyramidLevel.warped` at the same pixels."""
        planes, inside = warped
        moving = planes[..., 0] * inside
        gain = float((fixed * moving).sum() / max(float((moving * moving).sum()), 1e-9))
        gain = float(np.clip(gain, 0.2, 3.0))  # far from the match the gain is near 0, which would stop the steps
        residual = fixed * inside - gain * moving
        x, y = gain * planes[..., 1] * inside, gain * planes[..., 2] * inside
        edge_bias = planes[..., 3] * inside
        normal = _block_means([x * x, x * y, y * y], side)
        rest = _block_means([x * residual, y * residual, residual * residual, inside], side)
        biased = _block_means([x * edge_bias, y * edge_bias, edge_bias * residual, edge_bias * edge_bias], side)
        centre = _block_means([at_HW2[..., 0], at_HW2[..., 1]], side)
        used = rest[:, 3] > min_cover
        blocks = cls(normal[used], rest[used, :2], rest[used, 2], rest[used, 3], centre[used], side * side)
        return blocks._without_edge_bias(biased[used])

    def _without_edge_bias(self, biased_N4: NDArray[np.float64]) -> "Blocks":
        """Remove the part of the residuals that one coefficient times the edge bias explains.

        The coefficient is fitted over all blocks together with a free shift for each.
        biased_N4: means of the edge bias times each derivative, times the residual, and times itself.
        """
        if not len(biased_N4):
            return self
        with_gradient, with_residual, with_itself = biased_N4[:, :2], biased_N4[:, 2], biased_N4[:, 3]
        shift = np.einsum("nij,nj->ni", self.inverse_N22(), with_gradient)
        weight = 1 / np.maximum(self.power_N, 1e-6)
        weight = np.minimum(weight, 3 * np.median(weight))
        numerator = weight @ (with_residual - (shift * self.right_N2).sum(1))
        coefficient = numerator / (weight @ (with_itself - (shift * with_gradient).sum(1)) + 1e-12)
        power = self.power_N - 2 * coefficient * with_residual + coefficient**2 * with_itself
        return replace(self, right_N2=self.right_N2 - coefficient * with_gradient, power_N=power)

    def inverse_N22(self) -> NDArray[np.float64]:
        """Inverse matrices of the normal equations, regularised for blocks without detail."""
        xx, xy, yy = self.normal_N3.T
        normal = np.stack([np.stack([xx, xy], -1), np.stack([xy, yy], -1)], -1)
        regulariser = (1e-4 * float(np.median(xx + yy)) + 1e-9) * np.eye(2)
        return np.asarray(np.linalg.inv(normal + regulariser), np.float64)


@dataclass(frozen=True)
class Fit:
    """A step of the map's parameters and its precision."""

    step: NDArray[np.float64]
    """(9,), for `LensMap.updated`."""
    error_px: float
    """95th percentile over blocks of the mapped point's standard error, short-focal pixels."""


def fit(blocks: Blocks, mapping: LensMap, *, px: float, lens: bool) -> Fit:
    """The step that most blocks agree on. px: size of the level's pixels; lens: fit tilt and radial distortion, too."""
    count = 9 if lens else 6
    shift, precision = _block_shifts(blocks, px)
    jacobian = mapping.jacobian(blocks.centre_N2)[:, :, :count]
    prior = np.array([0.0] * 6 + [_RADIAL_SD**-2, _TILT_SD**-2, _TILT_SD**-2])[:count]
    present = np.array([0.0] * 6 + [mapping.radial, *mapping.tilt])[:count]
    weighted = np.einsum("nip,nij->npj", jacobian, precision)
    information = np.trace(precision, axis1=1, axis2=2) / 2
    weight, spread = 1 / np.maximum(information * (_EQUAL_WEIGHT_PX * px) ** 2, 1), 1.0
    step, normal = np.zeros(count), np.eye(count)
    for _ in range(_ROUNDS):
        kept = weighted * (weight / spread)[:, None, None]
        normal = np.einsum("npj,njq->pq", kept, jacobian) + np.diag(prior)
        normal += 1e-9 * np.trace(normal) * np.eye(count)
        step = np.linalg.solve(normal, np.einsum("npj,nj->p", kept, shift) - prior * present)
        off = shift - jacobian @ step
        distance = np.einsum("ni,nij,nj->n", off, precision, off)
        spread = max(float(np.median(distance)) / 1.386, 0.02)  # the median of chi-squared with two degrees
        weight = np.clip(1 - distance / (2 * spread * _TUKEY**2), 0, None) ** 2
    variance = np.einsum("nip,pq,niq->n", jacobian, np.linalg.inv(normal), jacobian)
    whole = np.zeros(9)
    whole[:count] = step
    return Fit(whole, float(np.sqrt(np.percentile(variance, 95))))


def _block_shifts(blocks: Blocks, px: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """([N, 2] shifts, [N, 2, 2] their inverse covariances)."""
    inverse = blocks.inverse_N22()
    shift = np.einsum("nij,nj->ni", inverse, blocks.right_N2)
    explained = np.einsum("ni,ni->n", blocks.right_N2, shift)
    left = np.maximum(blocks.power_N - explained, 0.1 * blocks.power_N) + 1e-6
    samples = blocks.pixels * blocks.cover_N / _PIXELS_PER_SAMPLE
    covariance = inverse * (left / samples)[:, None, None] + (_MODEL_ERROR_PX * px) ** 2 * np.eye(2)
    return np.clip(shift, -2 * px, 2 * px), np.linalg.inv(covariance)


def _block_means(planes: list[NDArray[np.floating]], side: int) -> NDArray[np.float64]:
    """[blocks, planes]: the mean of each plane over each block."""
    size = (planes[0].shape[1] // side, planes[0].shape[0] // side)
    means = [cv2.resize(plane.astype(np.float32), size, interpolation=cv2.INTER_AREA).ravel() for plane in planes]
    return np.stack(means, axis=1).astype(np.float64)

"""Renders a scene to the sensor's RAW mosaic, the camera's JPG and the ideal picture.

    scene --geometry, blur--> linear sRGB at each pixel --vignetting, camera matrix, exposure--> light per Bayer site
          --Poisson and read noise, levels--> RAW mosaic
          --demosaic, tone curve, chroma smoothing, sharpening--> camera JPG

The ideal picture is rendered on a finer grid and gets only exposure, vignetting and the JPG's tone curve: no noise,
mosaic or sharpening.
"""

import io
from collections.abc import Iterator
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image, TiffImagePlugin

from preprocessing.colour import ILCE_7SM2_XYZ_TO_CAMERA, linear_to_srgb, srgb_to_camera
from preprocessing.raw.dng import Mosaic
from preprocessing.simulator.scenery.canvas import Canvas
from preprocessing.simulator.scenes import Scene, to_linear
from preprocessing.truth.frame import FAR, NEAR, Exposure, FrameGeometry, Window

Picture = npt.NDArray[np.float32]

RGB_TO_CAMERA = srgb_to_camera(ILCE_7SM2_XYZ_TO_CAMERA).astype(np.float32)
CAMERA_TO_RGB = np.linalg.inv(RGB_TO_CAMERA.astype(np.float64)).astype(np.float32)

# A pixel integrates over its area. A Gaussian of the same variance (1/12) approximates this, so that one blur covers
# pixel and lens.
PIXEL_VARIANCE = 1.0 / 12.0
# Point spread of the ideal picture, fine pixels. With the pixel's area this is 0.58, the sharpest without aliasing.
IDEAL_PSF_PX = 0.5

BAND_ROWS = 128
FULL_WELL_E = 52_000.0
READ_NOISE_E = 4.0
BLACK_LEVEL = 512
WHITE_LEVEL = 16383


def render_linear(
    scene: Scene,
    geometry: FrameGeometry,
    *,
    psf_px: float,
    scale: int = 1,
    window: Window | None = None,
) -> Iterator[tuple[int, Picture]]:
    """Yield (first row, linear sRGB [rows, W, 3], about [0, 1]) in bands, to bound the memory.

    psf_px  standard deviation of the point spread, fine pixels
    scale   fine pixels per RAW pixel, along each axis
    window  part to render; None: the whole visible area
    """
    top, left, height, width = window or (0, 0, geometry.raw_height, geometry.raw_width)
    sigma_units = float(np.hypot(psf_px, PIXEL_VARIANCE**0.5)) / (scale * geometry.magnification)
    x_W = (np.arange(width * scale, dtype=np.float32) + 0.5) / scale + left
    for first in range(0, height * scale, BAND_ROWS):
        rows = min(BAND_ROWS, height * scale - first)
        y_H = (np.arange(first, first + rows, dtype=np.float32) + 0.5) / scale + top
        rays = geometry.rays(np.stack(np.meshgrid(x_W, y_H), axis=-1))
        density = scale * geometry.magnification
        band = _sample(scene.far, geometry.on_plane(rays, FAR), density, sigma_units)
        over = _sample(scene.near, geometry.on_plane(rays, NEAR), density, sigma_units) if scene.near else None
        if band is None:
            raise AssertionError("the far plane has no alpha")
        if over is not None:
            band *= 1 - over[..., 3:]
            band += over[..., :3]
        yield first, band


def _sample(
    levels: list[Canvas], at: npt.NDArray[np.floating[Any]], density: float, sigma_units: float
) -> Picture | None:
    """Sample a plane at scene coordinates `at` [H, W, 2]: linear light, [H, W, 3], or [H, W, 4] with alpha.

    The coarsest canvas that covers the area with 1.15 times the `density` (samples per scene unit) is blurred and
    sampled. None if the plane is transparent there.
    """
    # The map is smooth and the band convex, so the extremes are on the border.
    border = np.concatenate([at[0], at[-1], at[:, 0], at[:, -1]])
    (x0, y0), (x1, y1) = border.min(axis=0).tolist(), border.max(axis=0).tolist()
    covering = [level for level in levels if level.covers(x0, y0, x1, y1)] or levels[-1:]
    canvas = next((level for level in reversed(covering) if level.density >= 1.15 * density), covering[0])
    sigma = sigma_units * canvas.density
    reach = int(np.ceil(3 * sigma))
    margin = reach + 4
    height, width = canvas.pixels.shape[:2]
    row0 = int(np.clip(np.floor((y0 - canvas.y0) * canvas.density) - margin, 0, height - 1))
    row1 = int(np.clip(np.ceil((y1 - canvas.y0) * canvas.density) + margin, row0 + 1, height))
    col0 = int(np.clip(np.floor((x0 - canvas.x0) * canvas.density) - margin, 0, width - 1))
    col1 = int(np.clip(np.ceil((x1 - canvas.x0) * canvas.density) + margin, col0 + 1, width))
    part = canvas.pixels[row0:row1, col0:col1]
    if part.shape[2] == 4 and not part[..., 3].any():
        return None
    kernel = (2 * reach + 1, 2 * reach + 1)
    light = cv2.GaussianBlur(to_linear(part), kernel, sigma, borderType=cv2.BORDER_REPLICATE)
    # Canvas pixel i covers [i, i + 1) / density; OpenCV's coordinate i is its centre.
    offset = np.array([canvas.x0 * canvas.density + 0.5 + col0, canvas.y0 * canvas.density + 0.5 + row0])
    grid = _unbiased(np.asarray(at * canvas.density - offset, np.float32))
    sampled = cv2.remap(light, grid, np.empty(0), cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE)
    return np.asarray(sampled, np.float32)


def _unbiased(grid: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Coordinates to pass to OpenCV's bicubic remap (a = -0.75) to sample at `grid`.

    Its kernel does not reproduce a ramp: at the fraction f it reads f + f (1 - f) (1 - 2 f) / 2, up to 0.05 px off.
    One Newton step reduces the error below 0.003 px.
    """
    whole = np.floor(grid)
    part = grid - whole
    error = 0.5 * part * (1 - part) * (1 - 2 * part)
    part -= error / (1.5 - 3 * part * (1 - part))
    return np.asarray(whole + part, np.float32)


def exposed(
    band: Picture, first: int, geometry: FrameGeometry, exposure: Exposure, scale: int = 1, left: int = 0
) -> Picture:
    """Apply exposure and vignetting in place.

    first   the band's first row, fine pixels of the visible area
    left    the band's first column, RAW pixels
    """
    half = 0.25 * (geometry.jpg_width**2 + geometry.jpg_height**2)
    y = (np.arange(first, first + band.shape[0], dtype=np.float32) + 0.5) / scale - geometry.raw_height / 2
    x = (np.arange(left * scale, left * scale + band.shape[1], dtype=np.float32) + 0.5) / scale - geometry.raw_width / 2
    falloff = 1.0 - exposure.vignetting * ((y * y)[:, None] + (x * x)[None]) / half
    np.maximum(band, 0, out=band)  # the cubic kernel undershoots next to black edges
    band *= (exposure.gain * falloff)[..., None].astype(np.float32)
    return band


def expose(scene: Scene, geometry: FrameGeometry, exposure: Exposure, rng: np.random.Generator) -> Mosaic:
    """The RAW mosaic uint16 [H, W] (RGGB, 14 bit) that the sensor reads out."""
    mosaic = np.empty((geometry.raw_height, geometry.raw_width), np.uint16)
    counts_per_unit = WHITE_LEVEL - BLACK_LEVEL
    electrons_per_count = FULL_WELL_E * 100 / exposure.iso / counts_per_unit
    rgb_to_sites = RGB_TO_CAMERA / np.array(exposure.wb, np.float32)[:, None]
    for first, band in render_linear(scene, geometry, psf_px=exposure.psf_px):
        camera = cv2.transform(exposed(band, first, geometry, exposure), rgb_to_sites)
        light = camera[..., 1].copy()
        light[0::2, 0::2] = camera[0::2, 0::2, 0]
        light[1::2, 1::2] = camera[1::2, 1::2, 2]
        electrons = np.maximum(light, 0) * np.float32(counts_per_unit * electrons_per_count)
        noisy = rng.poisson(electrons).astype(np.float32)
        noisy += READ_NOISE_E * rng.standard_normal(electrons.shape, dtype=np.float32)
        counts = np.rint(noisy / np.float32(electrons_per_count) + BLACK_LEVEL)
        mosaic[first : first + band.shape[0]] = np.clip(counts, 0, WHITE_LEVEL)
    return mosaic


def tone_curve(linear: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The camera's curve from linear [0, 1] to encoded [0, 1]: sRGB's gamma and a mild S for contrast."""
    linear = np.clip(linear, 0.0, 1.0)
    encoded = linear_to_srgb(linear)
    return encoded + 0.02 * np.sin(2 * np.pi * (encoded - 0.5))


# 65536 steps of linear light; fine enough that its 8-bit output is exact.
_TONE_TABLE = (255.0 * tone_curve(np.arange(65536) / 65535.0)).astype(np.float32)


def camera_picture(mosaic_HW: Mosaic, geometry: FrameGeometry, exposure: Exposure) -> npt.NDArray[np.uint8]:
    """The camera's rendering, uint8 [jpg_height, jpg_width, 3]: demosaicing, tone, chroma smoothing, sharpening."""
    gains = np.ones((2, 2), np.float32)
    gains[0, 0], gains[1, 1] = exposure.wb[0], exposure.wb[2]
    gains *= 65535.0 / (WHITE_LEVEL - BLACK_LEVEL)
    height, width = mosaic_HW.shape
    counts = np.maximum(mosaic_HW, BLACK_LEVEL) - np.uint16(BLACK_LEVEL)
    balanced = counts.reshape(height // 2, 2, width // 2, 2) * gains[None, :, None, :]
    balanced16 = np.minimum(balanced, 65535).astype(np.uint16).reshape(height, width)
    # OpenCV names a Bayer pattern by the second and third pixel of its second row: RGGB is BayerBG.
    camera = cv2.cvtColor(balanced16, cv2.COLOR_BayerBG2RGB_EA)
    left, top = (int(side) for side in geometry.jpg_origin)
    camera = camera[top : top + geometry.jpg_height, left : left + geometry.jpg_width]
    linear = cv2.transform(camera, CAMERA_TO_RGB)  # saturates to [0, 65535]
    ycc = cv2.cvtColor(_TONE_TABLE[linear] / np.float32(255), cv2.COLOR_RGB2YCrCb)
    chroma = cv2.GaussianBlur(ycc[..., 1:], (0, 0), 1.2)
    luma = ycc[..., 0]
    luma = luma + 0.45 * (luma - cv2.GaussianBlur(luma, (0, 0), 1.0))
    rgb = cv2.cvtColor(np.dstack([luma, chroma]), cv2.COLOR_YCrCb2RGB)
    return np.asarray(np.rint(np.clip(rgb, 0, 1) * 255), np.uint8)


def ideal_picture(
    scene: Scene, geometry: FrameGeometry, exposure: Exposure, scale: int, window: Window
) -> npt.NDArray[np.uint8]:
    """The scene in this frame's geometry and JPG tone at `scale` times its density, uint8 [scale h, scale w, 3]."""
    top, left, height, width = window
    picture = np.empty((height * scale, width * scale, 3), np.uint8)
    for first, band in render_linear(scene, geometry, psf_px=IDEAL_PSF_PX, scale=scale, window=window):
        light = exposed(band, first + top * scale, geometry, exposure, scale, left)
        index = np.minimum(light * np.float32(65535) + np.float32(0.5), 65535).astype(np.uint16)
        picture[first : first + band.shape[0]] = np.rint(_TONE_TABLE[index])
    return picture


def encode_jpg(
    picture_HW3: npt.NDArray[np.uint8],
    geometry: FrameGeometry,
    exposure: Exposure,
    make: str,
    model: str,
    *,
    quality: int = 92,
    subsampling: str = "4:2:2",
) -> bytes:
    """JPEG with the camera's EXIF."""
    exif = Image.Exif()
    exif[271], exif[272], exif[274], exif[305] = make, model, 1, "SDAN simulator"
    details = exif.get_ifd(0x8769)
    details[33434] = TiffImagePlugin.IFDRational(*_fraction(exposure.exposure_s))
    details[33437] = TiffImagePlugin.IFDRational(*_fraction(exposure.f_number))
    details[34855] = exposure.iso
    details[37386] = TiffImagePlugin.IFDRational(*_fraction(geometry.focal_mm))
    buffer = io.BytesIO()
    Image.fromarray(picture_HW3).save(buffer, "JPEG", quality=quality, subsampling=subsampling, exif=exif)
    return buffer.getvalue()


def _fraction(value: float) -> tuple[int, int]:
    return (1, round(1 / value)) if value < 0.5 else (round(value * 10), 10)


def near_coverage(scene: Scene, geometry: FrameGeometry, shrink: int) -> Picture:
    """The near plane's coverage of each block of shrink x shrink JPG px: [ceil(h/shrink), ceil(w/shrink)], 0 to 1."""
    rows, columns = -(-geometry.jpg_height // shrink), -(-geometry.jpg_width // shrink)
    left, top = geometry.jpg_origin
    x = (np.arange(columns, dtype=np.float32) + 0.5) * shrink + np.float32(left)
    y = (np.arange(rows, dtype=np.float32) + 0.5) * shrink + np.float32(top)
    at = geometry.to_scene(np.stack(np.meshgrid(x, y), axis=-1), NEAR)
    sigma = shrink * PIXEL_VARIANCE**0.5 / geometry.magnification
    shown = _sample(scene.near, at, geometry.magnification / shrink, sigma) if scene.near else None
    return np.zeros((rows, columns), np.float32) if shown is None else shown[..., 3]

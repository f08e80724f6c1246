"""The preset wide: renders a scene through a drawn camera to its mosaic, its JPG and the ideal picture.

scene --blur by field--> linear sRGB --halo, lateral colour, motion--> light --camera matrix--> sites
      --photons, read, row and hot pixel noise, levels--> mosaic --camera_jpg--> JPG
"""

from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

from preprocessing.raw.dng import Mosaic, cfa_channels
from preprocessing.simulator import camera_jpg, sensor
from preprocessing.simulator.camera_jpg import JpgLook
from preprocessing.simulator.scenes import Scene
from preprocessing.simulator.sensor import Picture
from preprocessing.simulator.wide import CameraModel
from preprocessing.truth.frame import Exposure, FrameGeometry, Window

_BLOCK_PX = (sensor.BAND_ROWS, 256)
"""(rows, columns) of the parts of a frame that have one blur each."""


@dataclass(frozen=True)
class WideCamera:
    """A drawn camera and the look of its JPGs."""

    model: CameraModel
    look: JpgLook

    def expose(
        self,
        scene: Scene,
        geometry: FrameGeometry,
        exposure: Exposure,
        rng: np.random.Generator,
        scale: int = 1,
        window: Window | None = None,
    ) -> Mosaic:
        """uint16 [scale h, scale w] counts of a window (None: the whole frame), sampled `scale` times as finely."""
        window = window or (0, 0, geometry.raw_height, geometry.raw_width)
        light = seen_light(scene, geometry, exposure, self.model, scale, window)
        return read_out(light, self.model, exposure, rng)

    def picture(
        self,
        mosaic_HW: Mosaic,
        scene: Scene,
        geometry: FrameGeometry,
        exposure: Exposure,
        rng: np.random.Generator,
        used: Window | None,
    ) -> npt.NDArray[np.uint8]:
        """The camera's JPG before it is encoded, uint8 [jpg_height, jpg_width, 3].

        used   the part of the frame that pairs use; only there a resized look is worth its finer rendering
        """
        left, top = (int(side) for side in geometry.jpg_origin)
        rows, columns = slice(top, top + geometry.jpg_height), slice(left, left + geometry.jpg_width)
        picture = camera_jpg.develop(mosaic_HW, self.model, exposure, self.look)[rows, columns]
        if used and self.look.resized > 1:
            fine = self.expose(scene, geometry, exposure, rng, self.look.resized, used)
            patch = camera_jpg.resize(camera_jpg.develop(fine, self.model, exposure, self.look), self.look)
            whole = np.zeros((geometry.raw_height, geometry.raw_width, 3), np.uint8)
            whole[rows, columns] = picture
            whole[used[0] : used[0] + used[2], used[1] : used[1] + used[3]] = patch
            picture = whole[rows, columns]
        return camera_jpg.compressed_before(np.ascontiguousarray(picture), self.look)

    def ideal_picture(
        self, scene: Scene, geometry: FrameGeometry, exposure: Exposure, scale: int, window: Window
    ) -> npt.NDArray[np.uint8]:
        """The scene in this frame's geometry and the JPG's tones at `scale` times its density, uint8 [.., .., 3].

        Highlights clip as they do in the file: each camera colour by itself.
        """
        top, left, height, width = window
        matrix = self.model.rgb_to_camera
        to_camera = matrix.astype(np.float32)
        picture = np.empty((height * scale, width * scale, 3), np.uint8)
        bands = sensor.render_linear(scene, geometry, psf_px=sensor.IDEAL_PSF_PX, scale=scale, window=window)
        for first, band in bands:
            light = sensor.exposed(band, first + top * scale, geometry, exposure, scale, left)
            camera = np.clip(cv2.transform(light, to_camera), 0, 1)
            shown = camera_jpg.toned(np.asarray(camera, np.float32), matrix, self.look)
            picture[first : first + len(band)] = np.rint(255 * shown)
        return picture


def seen_light(
    scene: Scene, geometry: FrameGeometry, exposure: Exposure, camera: CameraModel, scale: int, window: Window
) -> Picture:
    """Linear sRGB [scale h, scale w, 3] behind the lens, with exposure and vignetting."""
    top, left, height, width = window
    light = np.empty((height * scale, width * scale, 3), np.float32)
    step_rows, step_cols = max(1, _BLOCK_PX[0] // scale), max(1, _BLOCK_PX[1] // scale)
    for row in range(0, height, step_rows):
        for col in range(0, width, step_cols):
            part = (top + row, left + col, min(step_rows, height - row), min(step_cols, width - col))
            field = _field(geometry, camera, part[1] + part[3] / 2, part[0] + part[2] / 2)
            psf_px = exposure.psf_px * (1 + camera.psf_rise * float(np.hypot(*field)) ** 2)
            for first, band in sensor.render_linear(scene, geometry, psf_px=psf_px, scale=scale, window=part):
                lit = sensor.exposed(band, first + part[0] * scale, geometry, exposure, scale, part[1])
                light[row * scale + first :, col * scale :][: band.shape[0], : band.shape[1]] = lit
    if camera.halo:
        light += np.float32(camera.halo) * (cv2.GaussianBlur(light, (0, 0), camera.halo_px) - light)
    light = _lateral_colour(light, geometry, camera, scale, window)
    if camera.motion_px:
        light = np.asarray(cv2.filter2D(light, cv2.CV_32F, _path(camera), borderType=cv2.BORDER_REFLECT), np.float32)
    return np.maximum(light, 0)


def _field(geometry: FrameGeometry, camera: CameraModel, x: float, y: float) -> tuple[float, float]:
    half = 0.5 * float(np.hypot(geometry.raw_width, geometry.raw_height))
    return (
        (x - geometry.raw_width / 2) / half + camera.axis[0],
        (y - geometry.raw_height / 2) / half + camera.axis[1],
    )


def _lateral_colour(
    light: Picture, geometry: FrameGeometry, camera: CameraModel, scale: int, window: Window
) -> Picture:
    """Red and blue moved away from the axis by `lateral_px` times the field; pixels are those of the output."""
    half = 0.5 * float(np.hypot(geometry.raw_width, geometry.raw_height))
    at_x, at_y = _field(geometry, camera, window[1], window[0])
    for channel, moved_px in ((0, camera.lateral_px[0]), (2, camera.lateral_px[1])):
        # Output pixel i shows what was at i - shift(i): a scaling about the axis.
        per_px = moved_px / (half * scale)
        offset = np.array([at_x, at_y]) * moved_px
        affine = np.array([[1 - per_px, 0, -offset[0]], [0, 1 - per_px, -offset[1]]])
        light[..., channel] = cv2.warpAffine(
            light[..., channel],
            affine,
            light.shape[1::-1],
            flags=cv2.INTER_LANCZOS4 | cv2.WARP_INVERSE_MAP,
            borderMode=cv2.BORDER_REPLICATE,
        )
    return light


def _path(camera: CameraModel) -> npt.NDArray[np.float32]:
    """The motion as a kernel: a line of `motion_px` through the centre, sum 1."""
    reach = int(np.ceil(camera.motion_px / 2)) + 1
    kernel = np.zeros((2 * reach + 1, 2 * reach + 1), np.float32)
    for t in np.linspace(-0.5, 0.5, 33) * camera.motion_px:
        x, y = reach + t * np.cos(camera.motion_rad), reach + t * np.sin(camera.motion_rad)
        col, row = int(np.floor(x)), int(np.floor(y))
        fx, fy = x - col, y - row
        kernel[row : row + 2, col : col + 2] += np.outer([1 - fy, fy], [1 - fx, fx]).astype(np.float32)
    return kernel / kernel.sum()


def read_out(light_HW3: Picture, camera: CameraModel, exposure: Exposure, rng: np.random.Generator) -> Mosaic:
    """Linear sRGB [H, W, 3] to counts uint16 [H, W], with all noise."""
    height, width = light_HW3.shape[:2]
    to_sites = camera.rgb_to_camera / np.array(exposure.wb)[:, None]
    colours = cv2.transform(light_HW3, to_sites.astype(np.float32))
    sites = np.empty((height, width), np.float32)
    for place, channel in enumerate(cfa_channels(camera.cfa)):
        cell = (slice(place // 2, None, 2), slice(place % 2, None, 2))
        sites[cell] = colours[cell][..., (0, 1, 1, 2)[channel]]
    per_count = camera.electrons_per_count(exposure.iso)
    span = camera.white_level - camera.black_level
    electrons = rng.poisson(np.maximum(sites, 0) * np.float32(span * per_count)).astype(np.float32)
    hot = rng.random((height, width), dtype=np.float32) < camera.hot_share
    electrons[hot] += rng.exponential(0.1 * span * per_count, int(hot.sum())).astype(np.float32)
    noise = camera.read_noise_counts(exposure.iso)
    counts = electrons / np.float32(per_count) + camera.black_level
    counts += np.float32(noise) * rng.standard_normal(counts.shape, dtype=np.float32)
    counts += np.float32(noise * camera.row_share) * rng.standard_normal((height, 1), dtype=np.float32)
    return np.asarray(np.clip(np.rint(counts), 0, camera.white_level), np.uint16)

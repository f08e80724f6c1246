"""Draws the geometry and the exposure of a sequence's frames: hand motion, lens errors, light.

The presets set how much of each; `preprocessing.truth.frame` holds the result and its exact maps.
"""

from dataclasses import dataclass

import numpy as np

from preprocessing.truth.frame import Exposure, FrameGeometry

FOCALS_MM = (240.0, 150.0, 100.0, 70.0, 50.0, 35.0, 24.0)
"""Focal lengths of a sequence's frames, in their order."""


@dataclass(frozen=True)
class Preset:
    """How much frames differ. Fields are standard deviations per frame unless their docstrings say otherwise."""

    rotation_rad: float
    """Pitch and yaw between frames."""
    roll_rad: float
    translation_mm: float
    principal_px: float
    """Jitter of the principal point, pixels of a 768 px wide frame."""
    drift_px: float
    """Drift of the principal point over the whole zoom range, pixels of a 768 px wide frame; one draw per sequence."""
    focal_error: float
    """Relative error of the engraved focal length."""
    distortion: float
    """Factor on the lens's radial distortion: 1 is the real lens, 0 an ideal one."""
    exposure_ev: float
    """Scatter of the light meter."""


# Misalignment of 4x pairs in HR pixels at 768 px wide, 5/50/95 %: tripod 0.8/2.8/6.5, default 2.4/9.6/24,
# handheld 4.3/18/46 (tests/preprocessing/simulator/test_optics.py). Rotations are angles, so a frame twice as wide
# moves by twice as many pixels.
PRESETS = {
    # The lens is ideal and nothing moves. Photon and read noise, Bayer sampling and JPEG are as in the other presets.
    "perfect": Preset(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0),
    "tripod": Preset(0.00013, 0.0002, 0.3, 0.45, 0.9, 0.001, 1.0, 0.02),
    "default": Preset(0.0016, 0.0018, 2.0, 0.6, 1.5, 0.002, 1.0, 0.04),
    "handheld": Preset(0.0032, 0.0036, 5.0, 0.8, 2.0, 0.003, 1.0, 0.06),
    # The misalignment of default; each sequence has another camera (wide.py).
    "wide": Preset(0.0016, 0.0018, 2.0, 0.6, 1.5, 0.002, 1.0, 0.04),
}


def distortion_k1(focal_mm: float) -> float:
    """Radial coefficient (r in half diagonals), linear in log focal length: barrel at 24 mm, pincushion at 240 mm."""
    return float(np.interp(np.log(focal_mm), np.log([24.0, 240.0]), [-0.035, 0.012]))


def draw_geometries(
    rng: np.random.Generator,
    preset: Preset,
    *,
    jpg_size: tuple[int, int],
    raw_size: tuple[int, int],
) -> list[FrameGeometry]:
    """One geometry per focal length in FOCALS_MM; sizes are (width, height) in pixels."""
    depths = (float(rng.uniform(25_000, 60_000)), float(rng.uniform(5_000, 12_000)))
    per_768 = jpg_size[0] / 768
    drift = preset.drift_px * per_768 * rng.normal(size=2)
    frames = []
    for focal in FOCALS_MM:
        # Every preset makes the same draws, so that it changes the size of a motion but not its direction.
        pitch, yaw, roll, tx, ty, tz, jx, jy, zoom = rng.normal(size=9)
        along = np.log(focal / 24.0) / np.log(10.0)
        principal = preset.principal_px * per_768 * np.array([jx, jy]) + drift * along
        frames.append(
            FrameGeometry(
                focal_mm=focal,
                true_focal_mm=focal * (1 + preset.focal_error * float(zoom)),
                raw_width=raw_size[0],
                raw_height=raw_size[1],
                jpg_width=jpg_size[0],
                jpg_height=jpg_size[1],
                principal_x=float(principal[0]),
                principal_y=float(principal[1]),
                k1=preset.distortion * distortion_k1(focal),
                pitch=preset.rotation_rad * float(pitch),
                yaw=preset.rotation_rad * float(yaw),
                roll=preset.roll_rad * float(roll),
                translation_mm=tuple(preset.translation_mm * float(t) for t in (tx, ty, tz)),  # type: ignore[arg-type]
                depths_mm=depths,
            )
        )
    return frames


def draw_exposures(rng: np.random.Generator, preset: Preset) -> list[Exposure]:
    """One exposure per focal length in FOCALS_MM: the same light and settings, with the light meter's scatter."""
    iso = int(rng.choice([100, 200, 400, 800]))
    red, blue = rng.uniform(1.7, 2.4), rng.uniform(1.35, 1.9)
    gain, f_number = rng.uniform(0.72, 0.92), float(rng.choice([5.6, 6.3, 7.1, 8.0]))
    shutter = float(rng.choice([60, 100, 160, 250]))
    exposures = []
    for focal in FOCALS_MM:
        scatter, psf, falloff = rng.normal(), rng.uniform(0.5, 0.75), rng.uniform(0.85, 1.15)
        step = 2.0 ** (preset.exposure_ev * float(scatter))
        exposures.append(
            Exposure(
                iso=iso,
                exposure_s=1.0 / round(shutter / step),
                f_number=f_number,
                gain=float(gain) * step,
                # ARW stores gains as multiples of 1/1024.
                wb=(round(1024 * float(red)) / 1024, 1.0, round(1024 * float(blue)) / 1024),
                psf_px=float(psf),
                vignetting=float(falloff) * float(np.interp(focal, [24, 70, 240], [0.32, 0.16, 0.24])),
            )
        )
    return exposures

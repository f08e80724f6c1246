"""Where a simulated frame looks: the lens, the hand that holds it, and the two planes of the scene.

Coordinates
    pixel   (x, y) in the RAW's visible area, sensor orientation; pixel i covers [i, i + 1)
    scene   (x, y) on one plane seen from the nominal camera, in pixels of a perfect 240 mm frame, (0, 0) on the axis
The backward map (pixel -> scene) is closed form and is what the renderer samples; the forward map inverts it.

    pixel -> principal point (jitter, drift with zoom) -> radial distortion -> rotation -> translation -> plane
"""

from dataclasses import dataclass

import numpy as np

from preprocessing.truth.frame import FrameGeometry

FOCALS_MM = (240.0, 150.0, 100.0, 70.0, 50.0, 35.0, 24.0)


@dataclass(frozen=True)
class Preset:
    """How badly a sequence is aligned; every field is one standard deviation per frame unless it says otherwise."""

    rotation_rad: float
    """Pitch and yaw between frames."""
    roll_rad: float
    translation_mm: float
    principal_px: float
    """Jitter of the principal point, pixels of a 768 px wide frame."""
    drift_px: float
    """Drift of the principal point over the whole zoom range, pixels of a 768 px wide frame."""
    focal_error: float
    """Relative error of the engraved focal length."""
    distortion: float
    """1: the lens's own radial distortion, 0: none."""
    exposure_ev: float
    """The meter's scatter."""


# Misalignment of 4x pairs in HR pixels at 768 px wide, 5/50/95 %: tripod 0.8/2.8/6.5, default 2.4/9.6/24,
# handheld 4.3/18/46 (tests/preprocessing/simulator/test_sequences.py). The motion is an angle: a frame twice as wide
# moves by twice the pixels.
PRESETS = {
    # The lens is ideal and nothing moves; photon and read noise, Bayer sampling and JPEG stay as in every preset.
    "perfect": Preset(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0),
    "tripod": Preset(0.00013, 0.0002, 0.3, 0.45, 0.9, 0.001, 1.0, 0.02),
    "default": Preset(0.0016, 0.0018, 2.0, 0.6, 1.5, 0.002, 1.0, 0.04),
    "handheld": Preset(0.0032, 0.0036, 5.0, 0.8, 2.0, 0.003, 1.0, 0.06),
}


def distortion_k1(focal_mm: float) -> float:
    """Barrel at the short end, pincushion at the long one, linear in log focal length (r in half diagonals)."""
    return float(np.interp(np.log(focal_mm), np.log([24.0, 240.0]), [-0.035, 0.012]))


def draw_geometries(
    rng: np.random.Generator,
    preset: Preset,
    *,
    jpg_size: tuple[int, int],
    raw_size: tuple[int, int],
) -> list[FrameGeometry]:
    """Seven frames, the longest focal length first; sizes are (width, height) in pixels."""
    depths = (float(rng.uniform(25_000, 60_000)), float(rng.uniform(5_000, 12_000)))
    per_768 = jpg_size[0] / 768
    drift = preset.drift_px * per_768 * rng.normal(size=2)
    frames = []
    for focal in FOCALS_MM:
        # Always the same number of draws, so that a preset changes the size of a motion but not the scene behind it.
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

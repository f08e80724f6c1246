"""Where a simulated frame looks: the lens, the hand that holds it, and the two planes of the scene.

Coordinates
    pixel   (x, y) in the RAW's visible area, sensor orientation; pixel i covers [i, i + 1)
    scene   (x, y) on one plane seen from the nominal camera, in pixels of a perfect 240 mm frame, (0, 0) on the axis
The backward map (pixel -> scene) is closed form and is what the renderer samples; the forward map inverts it.

    pixel -> principal point (jitter, drift with zoom) -> radial distortion -> rotation -> translation -> plane
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Points = npt.NDArray[np.floating[Any]]  # [..., 2], (x, y)

FOCALS_MM = (240.0, 150.0, 100.0, 70.0, 50.0, 35.0, 24.0)
NATIVE_MM = 240.0
SENSOR_WIDTH_MM = 36.0
FAR, NEAR = 0, 1


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
# handheld 4.3/18/46 (tests/preprocessing/test_simulate.py). The motion is an angle: twice the width, twice the pixels.
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


@dataclass(frozen=True)
class FrameGeometry:
    """One frame's exact geometry; plain numbers, so that it is stored as JSON beside the frame."""

    focal_mm: float
    """As engraved and written to EXIF."""
    true_focal_mm: float
    raw_width: int
    raw_height: int
    jpg_width: int
    jpg_height: int
    principal_x: float
    """Offset of the principal point from the centre, pixels."""
    principal_y: float
    k1: float
    pitch: float
    yaw: float
    roll: float
    translation_mm: tuple[float, float, float]
    depths_mm: tuple[float, float]
    """Far plane, near plane."""

    @property
    def native_focal_px(self) -> float:
        """Focal length of the scene's coordinates: a perfect 240 mm frame of the JPG's width."""
        return NATIVE_MM / SENSOR_WIDTH_MM * self.jpg_width

    @property
    def jpg_origin(self) -> tuple[float, float]:
        """(x, y) of the JPG's top left corner in the RAW's visible area: centre to centre."""
        return (self.raw_width - self.jpg_width) / 2, (self.raw_height - self.jpg_height) / 2

    @property
    def magnification(self) -> float:
        """Pixels per scene unit in the centre."""
        return self.true_focal_mm / NATIVE_MM

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "FrameGeometry":
        tuples = {key: tuple(value) for key, value in values.items() if isinstance(value, list)}
        return cls(**{**values, **tuples})

    def rays(self, xy: Points) -> Points:
        """Directions (x/z, y/z) in the nominal camera's orientation of RAW pixels [..., 2]; dtype kept."""
        scale = SENSOR_WIDTH_MM / (self.true_focal_mm * self.jpg_width)
        half_diagonal = 0.5 * float(np.hypot(self.jpg_width, self.jpg_height))
        dx = xy[..., 0] - (self.raw_width / 2 + self.principal_x)
        dy = xy[..., 1] - (self.raw_height / 2 + self.principal_y)
        # Backward: a barrel (k1 < 0) shows more of the scene at the edge than an ideal lens.
        factor = scale * (1.0 - (self.k1 / half_diagonal**2) * (dx * dx + dy * dy))
        dx, dy = dx * factor, dy * factor
        (r00, r01, r02), (r10, r11, r12), (r20, r21, r22) = self._rotation().tolist()
        z = r20 * dx + r21 * dy + r22
        return np.stack([(r00 * dx + r01 * dy + r02) / z, (r10 * dx + r11 * dy + r12) / z], axis=-1)

    def on_plane(self, rays: Points, plane: int) -> Points:
        """Where rays [..., 2] meet a plane (FAR or NEAR): scene coordinates [..., 2]; affine in the rays."""
        depth = self.depths_mm[plane]
        tx, ty, tz = self.translation_mm
        focal = self.native_focal_px
        gain, shift_x, shift_y = focal * (depth - tz) / depth, focal * tx / depth, focal * ty / depth
        return np.stack([rays[..., 0] * gain + shift_x, rays[..., 1] * gain + shift_y], axis=-1)

    def to_scene(self, xy: Points, plane: int = FAR) -> Points:
        """The backward map: RAW pixels [..., 2] -> scene coordinates [..., 2] on a plane."""
        return self.on_plane(self.rays(xy), plane)

    def from_scene(self, scene: Points, plane: int = FAR) -> npt.NDArray[np.float64]:
        """The forward map: scene coordinates [..., 2] -> RAW pixels [..., 2], exact to 1e-6 px inside the frame."""
        target = np.asarray(scene, np.float64)
        centre = np.array([self.raw_width / 2 + self.principal_x, self.raw_height / 2 + self.principal_y])
        step = self.magnification
        xy = centre + target * step
        # The map is nearly a scaling, so the error shrinks by the distortion (below 0.12) at each step.
        for _ in range(12):
            xy = xy - step * (self.to_scene(xy, plane) - target)
        return xy

    def _rotation(self) -> npt.NDArray[np.float64]:
        (cp, sp), (cy, sy), (cr, sr) = ((np.cos(a), np.sin(a)) for a in (self.pitch, self.yaw, self.roll))
        pitch = np.array([[1, 0, 0], [0, cp, -sp], [0, sp, cp]])
        yaw = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
        roll = np.array([[cr, -sr, 0], [sr, cr, 0], [0, 0, 1]])
        return yaw @ pitch @ roll


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


def nominal_lr_to_hr(lr: FrameGeometry, hr: FrameGeometry) -> npt.NDArray[np.float64]:
    """The [2, 3] affine a user would assume from EXIF alone: LR RAW pixels -> HR JPG pixels, centre to centre."""
    ratio = hr.focal_mm / lr.focal_mm
    return np.array(
        [
            [ratio, 0, hr.jpg_width / 2 - ratio * lr.raw_width / 2],
            [0, ratio, hr.jpg_height / 2 - ratio * lr.raw_height / 2],
        ]
    )

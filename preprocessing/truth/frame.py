"""The exact geometry and exposure of one simulated frame, stored as JSON beside it.

Coordinates
    pixel   (x, y) in the RAW's visible area, sensor orientation; pixel i covers [i, i + 1)
    scene   (x, y) on one plane seen from the nominal camera, in pixels of a perfect 240 mm frame, (0, 0) on the axis

The backward map (pixel -> scene), which the simulator renders through, is closed form; the forward map inverts it.

    pixel -> principal point (jitter, drift with zoom) -> radial distortion -> rotation -> translation -> plane
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Points = npt.NDArray[np.floating[Any]]
"""[..., 2], (x, y)."""
Window = tuple[int, int, int, int]
"""(top, left, height, width) in RAW pixels of the visible area, sensor orientation."""

NATIVE_MM = 240.0
SENSOR_WIDTH_MM = 36.0
FAR, NEAR = 0, 1
"""Numbers of the scene's two planes."""


@dataclass(frozen=True)
class FrameGeometry:
    """One frame's exact geometry. Sizes are in pixels, angles in radians."""

    focal_mm: float
    """Focal length as engraved on the lens and written to EXIF."""
    true_focal_mm: float
    raw_width: int
    raw_height: int
    jpg_width: int
    jpg_height: int
    principal_x: float
    """Offset of the principal point from the centre, pixels."""
    principal_y: float
    k1: float
    """Radial distortion at half the JPG's diagonal: positive is pincushion."""
    pitch: float
    yaw: float
    roll: float
    translation_mm: tuple[float, float, float]
    """Camera position relative to the nominal camera."""
    depths_mm: tuple[float, float]
    """Distances of the far and the near plane."""

    @property
    def native_focal_px(self) -> float:
        """Focal length of the scene's coordinates: a perfect 240 mm frame of the JPG's width."""
        return NATIVE_MM / SENSOR_WIDTH_MM * self.jpg_width

    @property
    def jpg_origin(self) -> tuple[float, float]:
        """(x, y) of the JPG's top left corner in the RAW's visible area; both have the same centre."""
        return (self.raw_width - self.jpg_width) / 2, (self.raw_height - self.jpg_height) / 2

    @property
    def magnification(self) -> float:
        """Pixels per scene unit at the centre."""
        return self.true_focal_mm / NATIVE_MM

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "FrameGeometry":
        tuples = {key: tuple(value) for key, value in values.items() if isinstance(value, list)}
        return cls(**{**values, **tuples})

    def rays(self, xy: Points) -> Points:
        """RAW pixels [..., 2] -> directions (x/z, y/z) in the nominal camera's orientation [..., 2], same dtype."""
        scale = SENSOR_WIDTH_MM / (self.true_focal_mm * self.jpg_width)
        half_diagonal = 0.5 * float(np.hypot(self.jpg_width, self.jpg_height))
        dx = xy[..., 0] - (self.raw_width / 2 + self.principal_x)
        dy = xy[..., 1] - (self.raw_height / 2 + self.principal_y)
        # This is the backward map: a barrel (k1 < 0) shows more of the scene at the edge than an ideal lens.
        factor = scale * (1.0 - (self.k1 / half_diagonal**2) * (dx * dx + dy * dy))
        dx, dy = dx * factor, dy * factor
        (r00, r01, r02), (r10, r11, r12), (r20, r21, r22) = self._rotation().tolist()
        z = r20 * dx + r21 * dy + r22
        return np.stack([(r00 * dx + r01 * dy + r02) / z, (r10 * dx + r11 * dy + r12) / z], axis=-1)

    def on_plane(self, rays: Points, plane: int) -> Points:
        """Rays [..., 2] -> scene coordinates [..., 2] where they meet a plane (FAR or NEAR); affine in the rays."""
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
        # The map is nearly a scaling: each step multiplies the error by less than 0.12, the distortion.
        for _ in range(12):
            xy = xy - step * (self.to_scene(xy, plane) - target)
        return xy

    def _rotation(self) -> npt.NDArray[np.float64]:
        (cp, sp), (cy, sy), (cr, sr) = ((np.cos(a), np.sin(a)) for a in (self.pitch, self.yaw, self.roll))
        pitch = np.array([[1, 0, 0], [0, cp, -sp], [0, sp, cp]])
        yaw = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
        roll = np.array([[cr, -sr, 0], [sr, cr, 0], [0, 0, 1]])
        return yaw @ pitch @ roll


@dataclass(frozen=True)
class Exposure:
    """One frame's camera settings and the optical properties that affect its brightness and sharpness."""

    iso: int
    exposure_s: float
    f_number: float
    gain: float
    """Scene white (linear 1.0) as a fraction of the sensor's white in the green channel."""
    wb: tuple[float, float, float]
    """White-balance gains (R, G, B), green = 1."""
    psf_px: float
    """Standard deviation of the lens's point spread, RAW pixels."""
    vignetting: float
    """Fraction of light lost in the corner."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Exposure":
        return cls(**{**values, "wb": tuple(values["wb"])})


def nominal_lr_to_hr(lr: FrameGeometry, hr: FrameGeometry) -> npt.NDArray[np.float64]:
    """[2, 3] affine LR RAW pixels -> HR JPG pixels from EXIF focal lengths alone, with the centres aligned."""
    ratio = hr.focal_mm / lr.focal_mm
    return np.array(
        [
            [ratio, 0, hr.jpg_width / 2 - ratio * lr.raw_width / 2],
            [0, ratio, hr.jpg_height / 2 - ratio * lr.raw_height / 2],
        ]
    )

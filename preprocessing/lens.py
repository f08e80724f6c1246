"""The map of a registered pair: what a zoom lens and a hand do to a plane that is far away.

No affine follows it: the radial distortion of a long and a short focal length differ (up to 7 px at the corners of a
4240 px wide frame), and a turned camera tilts the plane. So a pair has a `LensMap`, through which its pictures are
sampled; each tile is also told the affine nearest to it over that tile.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from preprocessing.geometry import Map, apply, compose

Points = NDArray[np.float64]

NUM_PARAMETERS = 9
_GRID = 11


@dataclass(frozen=True)
class LensMap:
    """(x, y) -> (X, Y): an affine, then a tilt and a radial distortion about `centre`. Conventions of geometry.py."""

    affine: Map
    centre: NDArray[np.float64]
    """(2,) of the long frame, where the affine leads to."""
    unit_px: float
    """Half the long frame's diagonal, in the pixels of (X, Y): the unit of q below."""
    radial: float = 0.0
    """k of X = h + unit q k |q|^2, with h the affine's point and q = (h - centre) / unit."""
    tilt: tuple[float, float] = (0.0, 0.0)
    """t of X = h + unit q (t . q): the perspective of a camera that was turned."""

    @classmethod
    def from_numbers(cls, numbers: ArrayLike) -> "LensMap":
        """The map that `numbers` wrote down."""
        n = np.asarray(numbers, np.float64)
        return cls(n[:6].reshape(2, 3), n[6:8], float(n[8]), float(n[9]), (float(n[10]), float(n[11])))

    def numbers(self) -> NDArray[np.float64]:
        """(12,): the affine's six, row by row; centre x, y; unit; k; t."""
        return np.array([*self.affine.ravel(), *self.centre, self.unit_px, self.radial, *self.tilt])

    def __call__(self, points_N2: Points) -> Points:
        """[N, 2] points through the map."""
        at = apply(self.affine, points_N2)
        q = (at - self.centre) / self.unit_px
        bend = self.radial * (q * q).sum(1) + q @ np.array(self.tilt)
        return np.asarray(at + self.unit_px * q * bend[:, None], np.float64)

    def slopes(self, points_N2: Points) -> NDArray[np.float64]:
        """[N, 2, 9]: how (X, Y) change with the parameters that `moved` takes (in (X, Y)'s pixels, near upright)."""
        u = (points_N2 - self.centre) / self.unit_px
        q = (apply(self.affine, points_N2) - self.centre) / self.unit_px
        slopes = np.zeros((len(points_N2), 2, NUM_PARAMETERS))
        for axis, first in ((0, 0), (1, 3)):
            slopes[:, axis, first], slopes[:, axis, first + 1 : first + 3] = 1, u
        slopes[:, :, 6] = self.unit_px * q * (q * q).sum(1, keepdims=True)
        slopes[:, :, 7], slopes[:, :, 8] = self.unit_px * q * q[:, :1], self.unit_px * q * q[:, 1:]
        return slopes

    def moved(self, step: NDArray[np.float64]) -> "LensMap":
        """The map whose parameters differ by `step` (9,): the affine's six about the centre, radial, tilt."""
        linear = np.array([[step[1], step[2]], [step[4], step[5]]]) / self.unit_px
        offset = np.array([step[0], step[3]]) - linear @ self.centre
        tilt = (self.tilt[0] + float(step[7]), self.tilt[1] + float(step[8]))
        affine = self.affine + np.concatenate([linear, offset[:, None]], axis=1)
        return LensMap(affine, self.centre, self.unit_px, self.radial + float(step[6]), tilt)

    def then(self, similarity: Map) -> "LensMap":
        """This map, then a similarity (zoom, turns, mirrors, shift)."""
        zoom = float(np.sqrt(abs(np.linalg.det(similarity[:, :2]))))
        x, y = (similarity[:, :2] / zoom) @ np.array(self.tilt)
        centre = apply(similarity, self.centre[None])[0]
        tilt = (float(x), float(y))
        return LensMap(compose(similarity, self.affine), centre, self.unit_px * zoom, self.radial, tilt)

    def after(self, inner: Map) -> "LensMap":
        """`inner` first, then this map."""
        return LensMap(compose(self.affine, inner), self.centre, self.unit_px, self.radial, self.tilt)

    def affine_over(self, left: float, top: float, right: float, bottom: float) -> Map:
        """The affine nearest to this map (least squares) over a box of (x, y)."""
        # The grid reaches the edges, which so count double: there an affine is farthest off (1.8 px instead of 2.2).
        points, here = _grid(left, top, right, bottom), np.array([(left + right) / 2, (top + bottom) / 2])
        matrix = np.concatenate([points - here, np.ones((len(points), 1))], axis=1)
        found = np.linalg.lstsq(matrix, self(points), rcond=None)[0]
        linear = found[:2].T
        return np.concatenate([linear, (found[2] - linear @ here)[:, None]], axis=1)

    def departure(self, affine: Map, left: float, top: float, right: float, bottom: float) -> float:
        """The largest distance between this map and `affine` over a box of (x, y), in (X, Y)'s pixels."""
        points = _grid(left, top, right, bottom)
        return float(np.hypot(*(self(points) - apply(affine, points)).T).max())


def _grid(left: float, top: float, right: float, bottom: float) -> Points:
    x, y = np.meshgrid(np.linspace(left, right, _GRID), np.linspace(top, bottom, _GRID))
    return np.stack([x.ravel(), y.ravel()], axis=1)

"""The matrix and curves of an ICC profile (ICC.1:2022), for 16-bit pictures: device RGB -> linear light -> sRGB."""

import struct
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from preprocessing.colour import linear_to_srgb

_SRGB_TO_XYZ_D50 = np.array(
    [[0.4360747, 0.3850649, 0.1430804], [0.2225045, 0.7168786, 0.0606169], [0.0139322, 0.0971045, 0.7141733]]
)
"""sRGB's primaries adapted to D50, the white of ICC's connection space (B. Lindbloom)."""
_STEPS = 65536


@dataclass(frozen=True)
class MatrixProfile:
    """An RGB space: a curve per channel, then a matrix."""

    to_xyz_33: NDArray[np.float64]
    """Linear device RGB -> XYZ, D50."""
    curves: tuple[NDArray[np.float64], ...]
    """Linear light in [0, 1] of 65536 equidistant device values, one table each for R, G, B."""

    @cached_property
    def _to_linear_srgb(self) -> NDArray[np.float32]:
        return np.asarray(np.linalg.inv(_SRGB_TO_XYZ_D50) @ self.to_xyz_33, np.float32)

    @cached_property
    def _encoded(self) -> NDArray[np.float32]:
        """sRGB's encoding in [0, 1] of 65536 equidistant steps of the square root of linear light, which gives the
        shadows enough steps."""
        return linear_to_srgb(np.square(np.linspace(0, 1, _STEPS))).astype(np.float32)

    def to_srgb(self, rgb_HWC: NDArray[Any]) -> NDArray[Any]:
        """Convert uint8 or uint16 [H, W, 3]; colours outside sRGB are clipped, as littlecms does."""
        top = np.iinfo(rgb_HWC.dtype).max
        step = (_STEPS - 1) // top
        linear = np.stack(
            [curve[rgb_HWC[..., channel].astype(np.int32) * step] for channel, curve in enumerate(self.curves)], -1
        ).astype(np.float32)
        linear = np.clip(linear @ self._to_linear_srgb.T, 0, 1)
        encoded = self._encoded[np.rint(np.sqrt(linear) * (_STEPS - 1)).astype(np.int32)]
        return np.rint(encoded * top).astype(rgb_HWC.dtype)


def gamma_curve(gamma: float) -> NDArray[np.float64]:
    return np.asarray(np.linspace(0, 1, _STEPS) ** gamma, np.float64)


ADOBE_RGB_TO_XYZ_D50 = np.array(
    [[0.6097559, 0.2052401, 0.1492240], [0.3111242, 0.6256560, 0.0632197], [0.0194811, 0.0608902, 0.7448387]]
)
ADOBE_RGB = MatrixProfile(ADOBE_RGB_TO_XYZ_D50, (gamma_curve(563 / 256),) * 3)
"""Adobe RGB (1998), for files that state it without a profile."""


def read_matrix_profile(profile: bytes) -> MatrixProfile | None:
    """The profile's matrix and curves; None if it has none (a table of colours) or is damaged."""
    try:
        count = int.from_bytes(profile[128:132], "big")
        table = (struct.unpack_from(">4sII", profile, 132 + 12 * number) for number in range(min(count, 100)))
        tags = {name: profile[start : start + size] for name, start, size in table}
        columns = [np.frombuffer(tags[name], ">i4", 3, 8) / 65536 for name in (b"rXYZ", b"gXYZ", b"bXYZ")]
        curves = tuple(_curve(tags[name]) for name in (b"rTRC", b"gTRC", b"bTRC"))
    except (KeyError, ValueError, struct.error):
        return None
    return MatrixProfile(np.stack(columns, 1), curves)


def _curve(tag: bytes) -> NDArray[np.float64]:
    """65536 values of a curve of type "curv" or "para". Raises ValueError or struct.error for another or damaged."""
    x = np.linspace(0, 1, _STEPS)
    if tag[:4] == b"curv":
        count = int.from_bytes(tag[8:12], "big")
        if count == 0:
            return x
        values = np.frombuffer(tag, ">u2", count, 12)
        if count == 1:
            return np.asarray(x ** (values[0] / 256), np.float64)
        return np.interp(x, np.linspace(0, 1, count), values / 65535)
    if tag[:4] != b"para":
        raise ValueError("unknown curve")
    kind = int.from_bytes(tag[8:10], "big")
    lengths = (1, 3, 4, 5, 7)
    if kind >= len(lengths):
        raise ValueError("unknown curve")
    numbers = [value / 65536 for value in struct.unpack_from(f">{lengths[kind]}i", tag, 12)]
    g, a, b, c, d, e, f = _seven(kind, numbers)
    curved = np.maximum(a * x + b, 0) ** g + e
    return np.clip(np.where(x >= d, curved, c * x + f), 0, 1)


def _seven(kind: int, numbers: list[float]) -> tuple[float, ...]:
    """Parameters of the most general parametric curve: y = (a x + b)^g + e for x >= d, c x + f below."""
    g, a, b, c, d, e, f = (*numbers, *[0.0] * 7)[:7]
    if kind == 0:
        return g, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0
    if kind in (1, 2):
        offset = c if kind == 2 else 0.0
        return g, a, b, 0.0, -b / a if a else 0.0, offset, offset
    return g, a, b, c, d, e if kind == 4 else 0.0, f if kind == 4 else 0.0

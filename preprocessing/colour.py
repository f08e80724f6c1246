"""Transfer curves, colour matrices and exposure gain for NumPy pictures. Tensors have their own curves in `sdan`.

"Linear" is proportional to light, in [0, 1]; "encoded" is what an 8-bit picture stores divided by 255, in [0, 1].
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray


def srgb_to_linear(encoded: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
    """sRGB's curve (IEC 61966-2-1), encoded -> linear."""
    return np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)


def linear_to_srgb(linear: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
    """The inverse of `srgb_to_linear`; negative values continue the linear segment at 0."""
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * np.maximum(linear, 1e-9) ** (1 / 2.4) - 0.055)


def bt709_to_linear(encoded: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
    """BT.709's curve, LibRaw's default and that of renderings made before version 0.3, encoded -> linear."""
    return np.where(encoded < 0.081, encoded / 4.5, ((encoded + 0.099) / 1.099) ** (1 / 0.45))


_GAMMA = 2.2
_BYTES = np.arange(256) / 255
# Look-up tables for cv2.LUT: (256,) float32, linear light of each byte.
SRGB_BYTE_TO_LINEAR = srgb_to_linear(_BYTES).astype(np.float32)
BT709_BYTE_TO_LINEAR = bt709_to_linear(_BYTES).astype(np.float32)
GAMMA_BYTE_TO_LINEAR = (_BYTES**_GAMMA).astype(np.float32)
"""A pure power. Registration uses it for JPGs, because the tone curves of cameras are unknown."""

RenderingCurve = Literal["srgb", "bt709"]
"""The curve that encodes a rendering of RAW. srgb: as camera JPGs and viewers have it. bt709: LibRaw's default, up to
13 of 255 darker in the shadows; only for shards and models made before version 0.3, which state no curve."""
LIBRAW_GAMMA: Mapping[RenderingCurve, tuple[float, float]] = MappingProxyType(
    {"srgb": (2.4, 12.92), "bt709": (2.222, 4.5)}
)
"""LibRaw's `gamma` (exponent, slope of the linear part at black) for each curve."""
RENDERING_BYTE_TO_LINEAR: Mapping[RenderingCurve, NDArray[np.float32]] = MappingProxyType(
    {"srgb": SRGB_BYTE_TO_LINEAR, "bt709": BT709_BYTE_TO_LINEAR}
)

_SRGB_STEPS = 4095
_LINEAR_TO_SRGB_BYTE = np.rint(255 * linear_to_srgb(np.arange(_SRGB_STEPS + 1) / _SRGB_STEPS)).astype(np.uint8)


def linear_to_srgb_bytes(linear: NDArray[np.floating[Any]]) -> NDArray[np.uint8]:
    """Linear, at least 0 -> sRGB bytes, from a table of 4096 steps; values above 1 clip."""
    index = np.minimum(linear * np.float32(_SRGB_STEPS) + np.float32(0.5), _SRGB_STEPS).astype(np.uint16)
    return _LINEAR_TO_SRGB_BYTE[index]


def linear_to_gamma(linear: NDArray[np.float32]) -> NDArray[np.float32]:
    """Linear -> [0, 255] (not rounded), the inverse of `GAMMA_BYTE_TO_LINEAR`; negative values become 0."""
    return np.asarray(255 * np.power(np.maximum(linear, 0), np.float32(1 / _GAMMA)), np.float32)


def divide_exposure(image: NDArray[np.uint8], ratio: float | None) -> NDArray[np.uint8]:
    """An sRGB picture with its light divided by `ratio`; unchanged if the ratio is unknown (None or NaN).

    Applied to a target with `ratio` times the input's light, it gives the input's exposure. Exact for sRGB; cameras'
    curves differ from it, which matters little for the small ratios within one sequence.
    """
    if ratio is None or not ratio > 0:
        return image
    encoded = linear_to_srgb(srgb_to_linear(_BYTES) / ratio)
    table: NDArray[np.uint8] = (255 * encoded).round().clip(0, 255).astype(np.uint8)
    return table[image]


SRGB_TO_XYZ = np.array([[0.412453, 0.357580, 0.180423], [0.212671, 0.715160, 0.072169], [0.019334, 0.119193, 0.950227]])
"""D65, as OpenCV rounds it. Used by registration and by the simulator."""
LIBRAW_SRGB_TO_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)
"""The same matrix with LibRaw's digits, to undo LibRaw's own multiplication to the last bit. Stored maps and simulated
files depend on the digits of `SRGB_TO_XYZ`, so the two cannot be merged."""

ILCE_7SM2_XYZ_TO_CAMERA = np.array([[0.5838, -0.1430, -0.0246], [-0.3497, 1.1477, 0.2297], [-0.0748, 0.1885, 0.5778]])
"""Sony's ILCE-7SM2 in LibRaw's table, which is also the simulated camera. LibRaw decodes its ARW with these numbers and
ignores the file's, so our DNG states the same ones."""


def srgb_to_camera(xyz_to_camera: NDArray[np.float64] | None) -> NDArray[np.float64]:
    """[3, 3] linear sRGB -> white-balanced camera colours. Rows sum to 1, as in LibRaw, so white stays white.

    The identity for an unknown camera (None).
    """
    if xyz_to_camera is None:
        return np.eye(3)
    matrix = np.asarray(xyz_to_camera, np.float64) @ SRGB_TO_XYZ
    return np.asarray(matrix / matrix.sum(axis=1, keepdims=True), np.float64)

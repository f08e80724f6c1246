"""LibRaw's rendering, with one fixed set of options, of a Bayer mosaic or of a window of it.

LibRaw renders whole frames only, but a 4x pair needs a twentieth of its frame. Therefore the window's counts, with a
margin, are passed to LibRaw as a DNG in memory that states the file's levels and colour matrix. Whole frames are
rendered the same way, so a window equals the same part of the whole rendering byte for byte.
"""

import io
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import rawpy
from numpy.typing import NDArray

from preprocessing.colour import LIBRAW_GAMMA, LIBRAW_SRGB_TO_XYZ, RenderingCurve
from preprocessing.raw.dng import bare_dng, cfa_channels

_OPTIONS: Mapping[str, Any] = MappingProxyType(
    {
        "demosaic_algorithm": rawpy.DemosaicAlgorithm.AHD,
        "output_color": rawpy.ColorSpace.sRGB,
        "output_bps": 8,
        "no_auto_bright": True,
        "bright": 1.0,
        "highlight_mode": rawpy.HighlightMode.Clip,
        "adjust_maximum_thr": 0.0,
        "user_flip": 0,
    }
)

_MARGIN_PX = 16
"""Margin around a window. Even, and larger than AHD's reach: 5 px for its border rule, about 4 px for its decisions."""
_MIN_PX = 64
"""Smallest side. LibRaw does not recognise a file of only a few pixels as RAW."""

_XYZ_TO_SRGB = np.linalg.inv(LIBRAW_SRGB_TO_XYZ)


@dataclass(frozen=True)
class SensorData:
    """Everything that a rendering depends on. Per-channel values are (4,), in the order R, G1, G2, B."""

    mosaic_HW: NDArray[np.uint16]
    """Counts of LibRaw's visible area."""
    cfa: str
    """Colours of its top left 2x2, row by row, e.g. "RGGB"."""
    black_level: NDArray[np.float32]
    """Counts."""
    white_level: float
    """Counts at which the sensor clips."""
    wb: NDArray[np.float32]
    """Gains of the file's white balance, green = 1."""
    xyz_to_camera: NDArray[np.float64] | None
    """[3, 3]; None (unknown camera) leaves the colours as the camera measured them."""
    curve: RenderingCurve = "srgb"
    """The curve of the rendering."""

    def render(self, top: int, left: int, height: int, width: int) -> NDArray[np.uint8]:
        """uint8 [height, width, 3], that window of the whole frame's rendering; mosaic pixels."""
        first_row, end_row = _widened(top, height, self.mosaic_HW.shape[0])
        first_col, end_col = _widened(left, width, self.mosaic_HW.shape[1])
        window = self.mosaic_HW[first_row:end_row, first_col:end_col]
        by_place = [self.black_level[channel] for channel in cfa_channels(self.cfa)]
        file = bare_dng(window, self.cfa, [int(level) for level in by_place], int(self.white_level), self.xyz_to_camera)
        with rawpy.imread(io.BytesIO(file)) as raw:
            gains = np.ones(4)
            gains[raw.raw_colors_visible[:2, :2].ravel()] = self.wb[cfa_channels(self.cfa)]
            picture = raw.postprocess(user_wb=gains.tolist(), **render_options(self.curve))
        return picture[top - first_row :, left - first_col :][:height, :width]


def render_options(curve: RenderingCurve) -> dict[str, Any]:
    """LibRaw's options: AHD demosaic, sRGB primaries, `curve`, 8 bit, no automatic brightening, the file's white level
    instead of the picture's maximum (adjust_maximum_thr=0: otherwise one bright pixel changes the whole rendering), the
    sensor's orientation (user_flip=0). The white balance comes on top.
    """
    return {**_OPTIONS, "gamma": LIBRAW_GAMMA[curve]}


def _widened(start: int, length: int, limit: int) -> tuple[int, int]:
    """(start, end) of an interval with its margin, within the frame and starting on a 2x2 cell."""
    first = max(0, min(start - _MARGIN_PX, limit - _MIN_PX)) // 2 * 2
    return first, min(limit, max(start + length + _MARGIN_PX, first + _MIN_PX))


def xyz_to_camera_from_libraw(color_matrix: NDArray[np.floating]) -> NDArray[np.float64]:
    """XYZ -> camera [3, 3] from which LibRaw computes its own float32 `color_matrix` (camera -> sRGB) to within a bit.

    LibRaw scales each row to sum to 1. Rounding to float32 has changed the sums, so the difference is spread over the
    row first, at most half a bit per value.
    """
    rounded = np.asarray(color_matrix, np.float32)
    bits = np.spacing(np.abs(rounded)).astype(np.float64)
    whole = rounded.astype(np.float64)
    whole += (1 - whole.sum(axis=1, keepdims=True)) * bits / bits.sum(axis=1, keepdims=True)
    return np.asarray(np.linalg.inv(whole) @ _XYZ_TO_SRGB, np.float64)

"""LibRaw's one rendering of a Bayer mosaic, or of a window of it.

LibRaw renders whole frames only, and a 4x pair needs a twentieth of its frame. So the window's counts, with a margin,
go to LibRaw as a DNG in memory that states the file's own levels and colour matrix. Whole frames take the same road:
a window is, byte for byte, a part of the whole rendering.
"""

import io
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import rawpy
from numpy.typing import NDArray

from preprocessing.colour import LIBRAW_SRGB_TO_XYZ
from preprocessing.raw.dng import bare_dng

RENDER_OPTIONS: Mapping[str, Any] = MappingProxyType(
    {
        "demosaic_algorithm": rawpy.DemosaicAlgorithm.AHD,
        "output_color": rawpy.ColorSpace.sRGB,
        "output_bps": 8,
        "gamma": (2.222, 4.5),
        "no_auto_bright": True,
        "bright": 1.0,
        "highlight_mode": rawpy.HighlightMode.Clip,
        "adjust_maximum_thr": 0.0,
        "user_flip": 0,
    }
)
"""LibRaw's options for the rendering: AHD demosaic, sRGB primaries, BT.709 curve, 8 bit, the file's own white balance
(given as user_wb), no automatic brightening, the file's white level and not the picture's maximum
(adjust_maximum_thr=0: else one bright pixel changes the whole rendering), the sensor's orientation (user_flip=0)."""

_MARGIN_PX = 16
"""Even, and more than AHD looks round a pixel (its border rule reaches 5 px in, its decisions some 4 px further)."""
_LEAST_PX = 64
"""LibRaw does not take files of a few pixels for RAW."""

_XYZ_TO_SRGB = np.linalg.inv(LIBRAW_SRGB_TO_XYZ)


@dataclass(frozen=True)
class Negative:
    """All that a rendering depends on. Per-channel values are in the order R, G1, G2, B."""

    mosaic_HW: NDArray[np.uint16]
    """Counts of LibRaw's visible area."""
    cfa: str
    """Colours of its top left 2x2, row by row, e.g. "RGGB"."""
    black_level: NDArray[np.float32]
    white_level: float
    wb: NDArray[np.float32]
    xyz_to_camera: NDArray[np.float64] | None
    """[3, 3]; None renders the camera's own colours."""

    def render(self, top: int, left: int, height: int, width: int) -> NDArray[np.uint8]:
        """[height, width, 3] sRGB in [0, 255]: that window of the whole frame's rendering."""
        first_row, end_row = _widened(top, height, self.mosaic_HW.shape[0])
        first_col, end_col = _widened(left, width, self.mosaic_HW.shape[1])
        window = self.mosaic_HW[first_row:end_row, first_col:end_col]
        by_place = [self.black_level[channel] for channel in channels_of(self.cfa)]
        file = bare_dng(window, self.cfa, [int(level) for level in by_place], int(self.white_level), self.xyz_to_camera)
        with rawpy.imread(io.BytesIO(file)) as raw:
            gains = np.ones(4)
            gains[raw.raw_colors_visible[:2, :2].ravel()] = self.wb[channels_of(self.cfa)]
            picture = raw.postprocess(user_wb=gains.tolist(), **RENDER_OPTIONS)
        return picture[top - first_row :, left - first_col :][:height, :width]


def _widened(start: int, length: int, limit: int) -> tuple[int, int]:
    """(start, end) with the margin, on a whole 2x2 cell and within the frame."""
    first = max(0, min(start - _MARGIN_PX, limit - _LEAST_PX)) // 2 * 2
    return first, min(limit, max(start + length + _MARGIN_PX, first + _LEAST_PX))


def channels_of(cfa: str) -> list[int]:
    """Index in R, G1, G2, B of each place of the 2x2 cell; G1 is the green beside red."""
    red_row = cfa.index("R") // 2
    return [{"R": 0, "B": 3}.get(colour, 1 if place // 2 == red_row else 2) for place, colour in enumerate(cfa)]


def xyz_to_camera_of(camera_to_srgb: NDArray[np.floating]) -> NDArray[np.float64]:
    """A matrix from which LibRaw derives the float32 [3, 3] `camera_to_srgb` (its `color_matrix`), at most a bit off.

    LibRaw makes rows sum to 1. What rounding to float32 took from that is given back, within half a bit of each value.
    """
    rounded = np.asarray(camera_to_srgb, np.float32)
    bits = np.spacing(np.abs(rounded)).astype(np.float64)
    whole = rounded.astype(np.float64)
    whole += (1 - whole.sum(axis=1, keepdims=True)) * bits / bits.sum(axis=1, keepdims=True)
    return np.asarray(np.linalg.inv(whole) @ _XYZ_TO_SRGB, np.float64)

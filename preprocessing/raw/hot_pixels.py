"""Finds single photosites that are too bright or too dark (hot, dead), and replaces them by their neighbours' median.

Used where a photograph is zoomed, which would make a visible blob of each. Training data keep theirs: the simulator's
hot pixels teach the network to bear the weak ones that are left here.

A photosite counts as defective if it is far outside the range of the eight nearest ones of its colour, while the eight
around it, of other colours, do not stand out with it. A lens spreads even a star over several photosites, so a real
point of light stays.
"""

import cv2
import numpy as np
from numpy.typing import NDArray

Counts = NDArray[np.uint16]

_LEAST = 0.01
"""Share of the range from black to white by which a defect leaves its neighbours' range, at least,"""
_RANGES = 2.0
"""and this many times that range more. Of flat areas with noise of standard deviation s, about 7 s in all."""
_SHARED = 0.15
"""A neighbour of another colour that stands out by more than this share means light and not a defect."""
_AROUND = np.array([(row, col) for row in (-1, 0, 1) for col in (-1, 0, 1) if row or col])
_KERNEL = np.array([[1, 1, 1], [1, 0, 1], [1, 1, 1]], np.uint8)


def without_defects(
    mosaic_HW: Counts, black: float, white: float, gains_22: NDArray[np.floating]
) -> tuple[Counts, int]:
    """The counts without defective photosites, and their number. The same array if there are none.

    Args:
        mosaic_HW: Bayer counts in any phase, at least 4x4.
        black, white: levels, counts.
        gains_22: white-balance gains of the 2x2 cell's places, to compare colours.
    """
    least = _LEAST * (white - black)
    found = [_outside(mosaic_HW[row::2, col::2], least) * 2 + (row, col) for row in (0, 1) for col in (0, 1)]
    places = np.concatenate(found)
    if not len(places):
        return mosaic_HW, 0
    around = _median_and_rise(mosaic_HW, places)
    rise = around[1] * _gains(gains_22, places)
    beside = _mirrored(places[:, None] + _AROUND, mosaic_HW).reshape(-1, 2)
    others = (_median_and_rise(mosaic_HW, beside)[1] * _gains(gains_22, beside)).reshape(len(places), -1)
    defective = (np.sign(rise)[:, None] * others).max(axis=1) < _SHARED * np.abs(rise)
    if not defective.any():
        return mosaic_HW, 0
    rows, cols = places[defective].T
    done = mosaic_HW.copy()
    done[rows, cols] = around[0][defective]
    return done, len(rows)


def _outside(plane: Counts, least: float) -> NDArray[np.int64]:
    """[n, 2] (row, col) of the values of one colour that are far outside their neighbours' range."""
    plane = np.ascontiguousarray(plane)
    high, low = cv2.dilate(plane, _KERNEL), cv2.erode(plane, _KERNEL)  # the picture's border counts for neither
    margin = _RANGES * (high.astype(np.float32) - low) + np.float32(least)
    return np.argwhere((plane > high + margin) | (plane < low - margin))


def _median_and_rise(mosaic: Counts, places: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """For each place the median of its eight neighbours of the same colour, and how far its value is above that."""
    at = _mirrored(places[:, None] + 2 * _AROUND, mosaic)
    median = np.median(mosaic[at[..., 0], at[..., 1]], axis=1)
    return median, mosaic[places[:, 0], places[:, 1]] - median


def _mirrored(places: NDArray[np.int64], mosaic: Counts) -> NDArray[np.int64]:
    """Places outside the mosaic mirrored at its outer photosites, which keeps their colours."""
    last = np.array(mosaic.shape) - 1
    places = np.where(places < 0, -places, places)
    return np.where(places > last, 2 * last - places, places)


def _gains(gains_22: NDArray[np.floating], places: NDArray[np.int64]) -> NDArray[np.floating]:
    return gains_22[places[:, 0] % 2, places[:, 1] % 2]

"""Sample a long-focal picture through the map of its pair, once, along the lens's own curves.

Two one-dimensional passes (Catmull and Smith), columns first, as `geometry.sample` does for an affine: here a target
row crosses the source's columns on a curve.
"""

import numpy as np
from numpy.typing import NDArray

from preprocessing.geometry import LANCZOS_LOBES, STRIP_ROWS, Map, Size, resample_columns, translation, turn
from preprocessing.lens import LensMap

_SWAP: Map = np.array([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])


def sample(image_HWC: NDArray[np.uint8], to_source: LensMap, size: Size) -> NDArray[np.uint8]:
    """The picture of `size` whose pixel at (x, y) is `image_HWC` at to_source(x, y), uint8 [h, w, C].

    The window is geometry.sample's: Lanczos, three lobes, stretched where the map shrinks. The border repeats.
    """
    crop, mapping = _upright(*_cropped(image_HWC, to_source, size))
    height, width = size
    linear = mapping.affine_over(0, 0, width, height)
    (a, b), (d, e) = linear[:, :2]
    step = e - d * b / a
    out = np.empty((height, width, crop.shape[2]), np.uint8)
    x_source = np.arange(crop.shape[1]) + 0.5
    # Columns beyond the target's edges are needed, too: as far as the window of the second pass reaches.
    beyond = int(np.ceil((LANCZOS_LOBES * max(1.0, a) + 2) / a))
    reach = int(np.ceil(LANCZOS_LOBES * max(1.0, step))) + 1
    u = np.arange(-beyond, width + beyond) + 0.5
    for first in range(0, height, STRIP_ROWS):
        v = np.arange(first, min(first + STRIP_ROWS, height)) + 0.5
        points = np.stack(np.broadcast_arrays(u[None], v[:, None]), axis=-1).reshape(-1, 2)
        x, y = mapping(points).reshape(len(v), len(u), 2).transpose(2, 0, 1)
        crossing = np.stack([np.interp(x_source, row_x, row_y) for row_x, row_y in zip(x, y, strict=True)])
        top = max(0, int(crossing.min()) - reach)
        part = np.ascontiguousarray(crop[top : int(crossing.max()) + reach + 1], np.float32)
        columns = resample_columns(part, crossing - top, step)
        inside = x[:, beyond : beyond + width]
        rows = resample_columns(columns.swapaxes(0, 1), inside.T, a).swapaxes(0, 1)
        out[first : first + len(v)] = np.clip(np.rint(rows), 0, 255)
    return out


def _cropped(image_HWC: NDArray[np.uint8], to_source: LensMap, size: Size) -> tuple[NDArray[np.uint8], LensMap]:
    """The part of the source that the target can reach, and the map into it."""
    height, width = size
    x, y = np.meshgrid(np.linspace(0, width, 33), np.linspace(0, height, 33))
    points = to_source(np.stack([x.ravel(), y.ravel()], axis=1))
    zoom = float(np.sqrt(abs(np.linalg.det(to_source.affine[:, :2]))))
    margin = int(np.ceil(LANCZOS_LOBES * max(1.0, zoom))) + 4
    left, top = np.maximum(np.floor(points.min(0)).astype(int) - margin, 0)
    right, bottom = np.ceil(points.max(0)).astype(int) + margin
    return image_HWC[top:bottom, left:right], to_source.then(translation(-left, -top))


def _upright(crop: NDArray[np.uint8], mapping: LensMap) -> tuple[NDArray[np.uint8], LensMap]:
    """Source and map turned so that x runs to the right and y down."""
    linear = mapping.affine[:, :2]
    if abs(linear[0, 0]) < abs(linear[0, 1]):
        crop, mapping = crop.swapaxes(0, 1), mapping.then(_SWAP)
    if mapping.affine[0, 0] < 0:
        crop, mapping = crop[:, ::-1], mapping.then(turn(1, (crop.shape[0], crop.shape[1])))
    if mapping.affine[1, 1] < 0:
        crop, mapping = crop[::-1], mapping.then(turn(2, (crop.shape[0], crop.shape[1])))
    return crop, mapping

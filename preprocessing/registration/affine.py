"""Affine maps between two pictures, and resampling a picture once through one.

Conventions: a map is float64 [2, 3], (x, y) -> (X, Y). Coordinates are continuous: pixel i covers [i, i + 1), so its
centre is i + 0.5. Sizes are (height, width). Pictures are HWC.
"""

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

Map = NDArray[np.float64]
Size = tuple[int, int]

LANCZOS_LOBES = 3
_PHASES = 1024
"""Steps per pixel of the tabulated Lanczos weights."""
STRIP_ROWS = 64
"""Target rows per pass, to bound memory."""


def compose(outer: Map, inner: Map) -> Map:
    """The map that applies `inner` first: outer(inner(x, y))."""
    return np.asarray(_square(outer)[:2] @ _square(inner), np.float64)


def invert(mapping: Map) -> Map:
    return np.asarray(np.linalg.inv(_square(mapping))[:2], np.float64)


def apply(mapping: Map, points_N2: NDArray[np.float64]) -> NDArray[np.float64]:
    """[N, 2] points (x, y) through the map."""
    return points_N2 @ mapping[:, :2].T + mapping[:, 2]


def scaling(factor: float) -> Map:
    return np.array([[factor, 0, 0], [0, factor, 0]], np.float64)


def translation(x: float, y: float) -> Map:
    return np.array([[1, 0, x], [0, 1, y]], np.float64)


def about_centres(factor: float, from_size: Size, to_size: Size) -> Map:
    """Scale by `factor`, mapping the centre of one picture to the centre of the other."""
    (height, width), (to_height, to_width) = from_size, to_size
    return np.array(
        [[factor, 0, (to_width - factor * width) / 2], [0, factor, (to_height - factor * height) / 2]], np.float64
    )


def units_per_px(size: Size) -> float:
    """The length of a pixel in half diagonals of the frame, the unit of radial models."""
    return 2 / float(np.hypot(*size))


def turn(flip: int, size: Size) -> Map:
    """Coordinates in a picture of `size` -> in `raw.decode.upright(picture, flip)`."""
    height, width = size
    x = [-1.0, 0.0, width] if flip & 1 else [1.0, 0.0, 0.0]
    y = [0.0, -1.0, height] if flip & 2 else [0.0, 1.0, 0.0]
    return np.array([y, x] if flip & 4 else [x, y], np.float64)


def stored_flip(orientation: int | None, flip: int, jpg_size: Size, frame_size: Size) -> int:
    """How the stored pixels of a camera JPG are turned relative to the sensor, as a LibRaw flip.

    orientation: the JPG's EXIF tag or None; flip: the RAW's. Cameras store pixels in the sensor's orientation and a tag
    that says how to turn them; software that has turned the pixels writes 1. If the tag is missing, the JPG's shape
    decides.
    """
    if orientation not in (None, 1) or flip == 0:
        return 0
    transposed = (jpg_size[0] > jpg_size[1]) != (frame_size[0] > frame_size[1])
    if flip & 4:
        return flip if transposed else 0
    return flip if orientation == 1 else 0


def jpg_scale(jpg_size: Size, frame_size: Size) -> float:
    """JPG pixels per sensor pixel; both sizes in sensor orientation.

    1 for a full-size JPG (cameras crop up to a few per cent of the frame). For a smaller in-camera JPG, perhaps 16:9,
    the ratio of the sides that are not cropped.
    """
    ratio = max(jpg_size[0] / frame_size[0], jpg_size[1] / frame_size[1])
    return 1.0 if 0.95 <= ratio <= 1.05 else ratio


def frame_to_jpg(zoom: float, frame_size: Size, jpg_size: Size, flip: int) -> Map:
    """Map from the LR mosaic to the stored pixels of a JPG with `zoom` times its focal length, by the fields of view.

    The mosaic's coordinates start at the camera's crop (`RawImage.camera_crop`), which has `frame_size`, in sensor
    orientation. jpg_size: as stored; flip: the JPG's `stored_flip`.
    """
    size = (jpg_size[1], jpg_size[0]) if flip & 4 else jpg_size
    return compose(turn(flip, size), about_centres(zoom * jpg_scale(size, frame_size), frame_size, size))


def footprint(mapping: Map, size: Size) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) of the largest upright box that `mapping` takes into a picture of `size`.

    For maps that are nearly upright except for quarter turns. An empty box has right <= left or bottom <= top.
    """
    height, width = size
    corners = np.array([[0, 0], [width, 0], [0, height], [width, height]], np.float64)
    points = apply(invert(mapping), corners)
    xs, ys = np.sort(points[:, 0]), np.sort(points[:, 1])
    return float(xs[1]), float(ys[1]), float(xs[2]), float(ys[2])


def sample(image_HWC: NDArray[np.uint8] | Image.Image, to_source: Map, size: Size) -> NDArray[np.uint8]:
    """The picture of `size` whose pixel at (x, y) is `image_HWC` at to_source(x, y), uint8 [h, w, C].

    A Lanczos window of three lobes, stretched when the map shrinks the picture (low-pass), placed to a thousandth of a
    pixel. Raises ValueError if the target reaches outside the source.
    """
    height, width = size
    source = image_HWC.size if isinstance(image_HWC, Image.Image) else image_HWC.shape[1::-1]
    corners = apply(to_source, np.array([[0, 0], [width, 0], [0, height], [width, height]], np.float64))
    low, high = corners.min(0), corners.max(0)
    if (low < -1e-6).any() or (high > np.array(source) + 1e-6).any():
        raise ValueError(
            f"target: expected within the source's {source[0]}x{source[1]} px, got {low.round(2).tolist()} to "
            f"{high.round(2).tolist()}"
        )
    stretch = max(1.0, float(np.abs(to_source[:, :2]).sum(1).max()))
    margin = int(np.ceil(LANCZOS_LOBES * stretch)) + 1
    left, top = np.maximum(np.floor(low).astype(int) - margin, 0)
    right, bottom = np.ceil(high).astype(int) + margin
    mapping = compose(translation(-left, -top), to_source)
    if isinstance(image_HWC, Image.Image):
        box = (int(left), int(top), min(int(right), source[0]), min(int(bottom), source[1]))
        part = image_HWC if box == (0, 0, *source) else image_HWC.crop(box)  # cropping would copy the whole picture
        if _is_upright(mapping, size) and min(mapping[0, 0], mapping[1, 1]) > 0:
            return _resize(part, mapping, size)  # avoids a copy into an array
        crop = np.asarray(part)
    else:
        crop = image_HWC[top:bottom, left:right]
    if abs(mapping[0, 0]) < abs(mapping[0, 1]):
        crop, mapping = crop.swapaxes(0, 1), mapping[::-1]
    if mapping[0, 0] < 0:
        crop, mapping = crop[:, ::-1], compose(turn(1, crop.shape[:2]), mapping)
    if mapping[1, 1] < 0:
        crop, mapping = crop[::-1], compose(turn(2, crop.shape[:2]), mapping)
    if _is_upright(mapping, size):
        return _resize(Image.fromarray(np.ascontiguousarray(crop)), mapping, size)
    return _sample_sheared(np.ascontiguousarray(crop, np.float32), mapping, size)


def _is_upright(mapping: Map, size: Size) -> bool:
    return bool(abs(mapping[0, 1]) * size[0] < 1e-6 and abs(mapping[1, 0]) * size[1] < 1e-6)


def _resize(picture: Image.Image, mapping: Map, size: Size) -> NDArray[np.uint8]:
    """Scale and shift only: Pillow's resampler, whose box may start at a fraction of a pixel."""
    height, width = size
    box = (
        max(mapping[0, 2], 0.0),
        max(mapping[1, 2], 0.0),
        min(mapping[0, 2] + mapping[0, 0] * width, picture.width),
        min(mapping[1, 2] + mapping[1, 1] * height, picture.height),
    )
    return np.asarray(picture.resize((width, height), Image.Resampling.LANCZOS, box=box))


def _sample_sheared(crop: NDArray[np.float32], mapping: Map, size: Size) -> NDArray[np.uint8]:
    """Any nearly upright affine in two one-dimensional passes (Catmull and Smith), columns first, then rows, without
    rounding in between. Column X of the source crosses target row v at Y(X, v) = d/a X + (e - d b / a) v + ..."""
    height, width = size
    (a, b, c), (d, e, f) = mapping
    slope, step, start = d / a, e - d * b / a, f - d * c / a
    out = np.empty((height, width, crop.shape[2]), np.uint8)
    x_source = np.arange(crop.shape[1]) + 0.5
    u = np.arange(width) + 0.5
    for first in range(0, height, STRIP_ROWS):
        v = np.arange(first, min(first + STRIP_ROWS, height)) + 0.5
        columns = resample_columns(crop, slope * x_source[None] + step * v[:, None] + start, step)
        rows = resample_columns(columns.swapaxes(0, 1), (a * u[None] + b * v[:, None] + c).T, a).swapaxes(0, 1)
        out[first : first + len(v)] = np.clip(np.rint(rows), 0, 255)
    return out


def resample_columns(
    image_HWC: NDArray[np.float32], position_MW: NDArray[np.float64], step: float
) -> NDArray[np.float32]:
    """[M, W, C]: column w of the result is column w of the image at rows position_MW[:, w]; the border repeats."""
    weights_PK, reach = _lanczos_table(abs(step))
    base = np.floor(position_MW - 0.5)
    phase = np.rint((position_MW - 0.5 - base) * _PHASES).astype(np.int32)
    image = np.ascontiguousarray(image_HWC)
    first = base.astype(np.float32)
    column = np.ascontiguousarray(np.broadcast_to(np.arange(image.shape[1], dtype=np.float32), first.shape))
    out = np.zeros((*first.shape, image.shape[2]), np.float32)
    for tap in range(weights_PK.shape[1]):
        row = first + np.float32(tap - reach + 1)  # at whole numbers remap only copies, twice as fast as indexing
        taken = cv2.remap(image, column, row, cv2.INTER_NEAREST, borderMode=cv2.BORDER_REPLICATE)
        out += taken.reshape(out.shape) * weights_PK[phase, tap][..., None]
    return out


def _lanczos_table(step: float) -> tuple[NDArray[np.float32], int]:
    """([phases + 1, taps] weights, reach): row p weights pixels floor - reach + 1 ... floor + reach at phase p/1024."""
    stretch = max(1.0, step)
    reach = int(np.ceil(LANCZOS_LOBES * stretch))
    offset = np.arange(-reach + 1, reach + 1)[None] - np.linspace(0, 1, _PHASES + 1)[:, None]
    x = offset / stretch
    weights = np.sinc(x) * np.sinc(x / LANCZOS_LOBES) * (np.abs(x) < LANCZOS_LOBES)
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32), reach


def _square(mapping: Map) -> NDArray[np.float64]:
    return np.vstack([mapping, [0.0, 0.0, 1.0]])

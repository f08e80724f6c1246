"""How SDAN's released code makes a training crop, reimplemented for comparison by benchmarks/preprocess.py.

Like its `SRRawDataset`, for each crop: decode the whole RAW and pack it as float; decode both JPGs; crop all three to
the field of view of the longest focal length; resize the float target up to that frame's resolution, warp it by the
sequence's registration, resize it back and then to the exact scale; resize the input JPG, too (it is loaded even if the
input is RAW); divide by the white balance; cut one crop. Axes are H W C.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import rawpy
import torch
from numpy.typing import NDArray
from PIL import Image

Picture = NDArray[Any]
"""float32 [H, W, C]; OpenCV's annotations do not say which type it returns."""
TOLERANCE_PX = 32


@dataclass(frozen=True)
class Pair:
    """Files and focal lengths of one pair; `to_reference` [2, 3] is the content of SR-RAW's tform.txt."""

    lr_raw: Path
    lr_jpg: Path
    hr_jpg: Path
    focal_lr_mm: float
    focal_hr_mm: float
    focal_longest_mm: float
    to_reference: NDArray[np.float32]


def crop(pair: Pair, random: np.random.Generator, *, scale: int = 4, crop_px: int = 512) -> tuple[Any, Any]:
    """(mosaic [1, h, w], target [3, H, W]) tensors; the target is crop_px plus the tolerance on each side."""
    longest_lr, longest_hr = pair.focal_longest_mm / pair.focal_lr_mm, pair.focal_longest_mm / pair.focal_hr_mm
    packed = _centre(_packed(pair.lr_raw), 1 / longest_lr)
    target = _float(_centre(np.array(Image.open(pair.hr_jpg)), 1 / longest_hr))
    input_jpg = _float(_centre(np.array(Image.open(pair.lr_jpg)), 1 / longest_lr))
    target = cv2.resize(target, None, fx=longest_hr, fy=longest_hr, interpolation=cv2.INTER_CUBIC)
    height, width = target.shape[:2]
    target = cv2.warpAffine(target, pair.to_reference, (width, height), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP)
    target = cv2.resize(target, None, fx=1 / longest_hr, fy=1 / longest_hr, interpolation=cv2.INTER_CUBIC)
    size = (packed.shape[1] * 2 * scale, packed.shape[0] * 2 * scale)
    target = cv2.resize(target, size, interpolation=cv2.INTER_CUBIC)
    input_jpg = cv2.resize(input_jpg, (size[0] // scale, size[1] // scale), interpolation=cv2.INTER_CUBIC)
    pictures: tuple[Picture, ...] = (target, input_jpg)
    for picture in pictures:
        for channel, gain in enumerate((2.0, 1.0, 1.6)):
            picture[..., channel] /= np.power(gain, 1 / 2.2)
        np.clip(picture, 0.0, 1.0, out=picture)
    raw_part, target_part = _cut(packed, target, random, scale, crop_px)
    return _tensor(_mosaic(raw_part)), _tensor(target_part)


def _packed(path: Path) -> Picture:
    with rawpy.imread(str(path)) as raw:
        bayer = (raw.raw_image_visible.astype(np.float32) - 512) / (16383 - 512)
    planes = (bayer[0::2, 0::2], bayer[0::2, 1::2], bayer[1::2, 1::2], bayer[1::2, 0::2])
    return np.concatenate([plane[..., None] for plane in planes], axis=2)


def _mosaic(packed: Picture) -> Picture:
    mosaic = np.zeros((2 * packed.shape[0], 2 * packed.shape[1], 1), np.float32)
    for channel, (row, col) in enumerate(((0, 0), (0, 1), (1, 1), (1, 0))):
        mosaic[row::2, col::2, 0] = packed[..., channel]
    return mosaic


def _centre(picture: NDArray[Any], part: float) -> NDArray[Any]:
    (height, width) = picture.shape[:2]
    top, left = int(np.ceil(height * (1 - part) / 2)), int(np.ceil(width * (1 - part) / 2))
    return picture[top : int(np.floor(height * (1 + part) / 2)), left : int(np.floor(width * (1 + part) / 2))]


def _float(picture: NDArray[np.uint8]) -> Picture:
    return picture.astype(np.float32) / 255


def _cut(
    packed: Picture, target: Picture, random: np.random.Generator, scale: int, crop_px: int
) -> tuple[Picture, Picture]:
    side = crop_px + 2 * TOLERANCE_PX
    top, left = (int((length - side) * random.random()) for length in target.shape[:2])
    factor = 2 * scale
    return (
        packed[top // factor : (top + side) // factor, left // factor : (left + side) // factor],
        target[top : top + side, left : left + side],
    )


def _tensor(picture: Picture) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(picture.transpose(2, 0, 1)))

"""Augmenting a decoded photograph: rendering an augmented RAW crop gives the augmented crop of the rendering."""

import itertools

import cv2
import numpy as np
import pytest
import torch

from preprocessing.raw import decode
from preprocessing.raw.dng import write_dng
from sdan import augment

SIDE, CROP_PX, EDGE = 160, 64, 8
WB = (2.0, 1.0, 1.5)


def scene(rows: int, cols: int) -> np.ndarray:
    """Smooth coloured waves, different along rows and columns; [rows, cols, 3] in (0, 1)."""
    y, x = np.mgrid[:rows, :cols]
    waves = [np.sin(x / 5.1 + 0.3 * np.cos(y / 9)), np.cos(y / 6.3 + x / 23), np.sin((x + 2 * y) / 11.7)]
    return 0.45 + 0.3 * np.stack(waves, axis=-1)


@pytest.fixture(scope="module")
def developed(tmp_path_factory):
    """{lr_raw uint16 [4,t,t], lr_render uint8 [3,2t,2t]} as LibRaw decodes and renders a DNG."""
    linear = scene(SIDE, SIDE) ** 2.2
    mosaic = np.empty((SIDE, SIDE))
    for row, col, colour in ((0, 0, 0), (0, 1, 1), (1, 0, 1), (1, 1, 2)):
        mosaic[row::2, col::2] = linear[row::2, col::2, colour] / WB[colour]
    path = tmp_path_factory.mktemp("dng") / "x.dng"
    write_dng(path, np.rint(512 + mosaic * (16383 - 512)).astype(np.uint16), wb=WB)
    image = decode.load(path)
    return {
        "lr_raw": torch.from_numpy(image.packed.astype(np.uint16).copy()),
        "lr_render": torch.from_numpy(np.ascontiguousarray(image.rendering.transpose(2, 0, 1))),
    }


def develop(packed: np.ndarray, path) -> np.ndarray:
    """LibRaw's rendering of an RGGB crop, uint8 [H, W, 3]."""
    mosaic = np.empty((2 * packed.shape[1], 2 * packed.shape[2]), np.uint16)
    for plane, (row, col) in zip(packed, ((0, 0), (0, 1), (1, 0), (1, 1)), strict=True):
        mosaic[row::2, col::2] = plane
    write_dng(path, mosaic, wb=WB)
    return decode.load(path).rendering


@pytest.mark.parametrize("turns", itertools.product((False, True), repeat=3))
def test_an_augmented_crop_renders_as_its_rendering(developed, turns, tmp_path):
    flip_rows, flip_cols, transpose = turns
    plan = augment.CropPlan(6 + flip_rows, 10 + flip_cols, flip_rows, flip_cols, transpose)
    crop = augment.apply(developed, plan, CROP_PX, scale=4)
    inside = (slice(EDGE, -EDGE), slice(EDGE, -EDGE))
    rendered = crop["lr_render"].permute(1, 2, 0).numpy()[inside].astype(np.float32)
    anew = develop(crop["lr_raw"].numpy(), tmp_path / "crop.dng")[inside].astype(np.float32)
    assert np.abs(anew - rendered).mean() < 1.5  # of 255; a wrong Bayer phase swaps colours and gives over 50
    window = cv2.createHanningWindow(rendered.shape[1::-1], cv2.CV_32F)
    for channel in range(3):
        (dx, dy), _ = cv2.phaseCorrelate(
            np.ascontiguousarray(rendered[..., channel]), np.ascontiguousarray(anew[..., channel]), window
        )
        assert np.hypot(dx, dy) < 0.05, (channel, dx, dy)

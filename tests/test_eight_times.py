"""8x from RAW to pictures. The authors' released loader for 8x is missing, so the paper's 8x could not be trained."""

import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from preprocessing.raw import decode

SDAN = str(Path(sys.executable).with_name("sdan"))
SMALL = (
    *("model.features=8", "model.blocks=1", "train.epochs=1", "train.crops_per_epoch=4"),
    *("train.crop_px=32", "train.batch_per_worker=2", "train.val_crops=2"),
)
TARGET_PX = 8 * 2 * 32
"""Side of a target crop: 8 times the 64 mosaic pixels of 32 packed pixels."""

CROP = "200,150,320,240"
"""Left, top, width and height, in pixels of the photograph: all of it at 8x would be 44 megapixels."""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """RAW and shards at 8x, a small model, and the pictures of evaluate and zoom, all made by the command."""
    folder = tmp_path_factory.mktemp("eight")

    def sdan(*arguments):
        done = subprocess.run(
            [SDAN, "--data", "data", *arguments], cwd=folder, capture_output=True, text=True, timeout=500
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    sdan("simulate", "raw", "--sequences", "2", "--width", "1024", "--preset", "tripod", "--seed", "11")
    said = sdan("preprocess", "raw", "shards", "--scale", "8", "--tile", "32", "--val", "00002")
    assert said.startswith("2 pairs: 2 written")
    changes = [word for value in SMALL for word in ("--set", value)]
    sdan("train", "shards", "--config", "srraw_8x", *changes, "--name", "eight", "--workers", "1")
    sdan("evaluate", "shards", "--model", "data/runs/eight/model", "-o", "scores", "--crops", "2")
    sdan("zoom", "raw/00002/00005.dng", "-o", "zoomed.png", "--model", "data/runs/eight/model", "--crop", CROP)
    return folder


def error(a, b):
    """Mean absolute difference of two 8-bit pictures."""
    return np.abs(a.astype(float) - b).mean()


def test_crops_are_eight_times_as_large_and_resemble_the_target(folder):
    sheet = cv2.imread(str(folder / "scores" / "examples.png"))
    step = TARGET_PX + 8
    assert sheet.shape[1] == 4 * step + 8  # camera JPG, rendering, SDAN, target
    row = sheet[-step:-8]
    _, _, ours, target = (row[:, 8 + step * column :][:, :TARGET_PX] for column in range(4))
    noise = np.random.default_rng(0).permutation(target.reshape(-1, 3)).reshape(target.shape)  # the target's own tones
    assert error(ours, target) < 0.5 * error(noise, target)
    assert error(ours, target) < error(ours[:, ::-1], target)  # the same place, not only the same tones


def test_a_photograph_becomes_eight_times_as_large(folder):
    rendering = decode.load(folder / "raw" / "00002" / "00005.dng").rendering[..., ::-1]
    zoomed = cv2.imread(str(folder / "zoomed.png"))
    left, top, width, height = map(int, CROP.split(","))
    rendering = rendering[top : top + height, left : left + width]
    assert zoomed.shape == (8 * height, 8 * width, 3)
    small = cv2.resize(zoomed, (width, height), interpolation=cv2.INTER_AREA)
    assert error(small, rendering) < 0.2 * error(small[:, ::-1], rendering)

"""8x from end to end: the paper could not train it, its loader was missing."""

import subprocess
import sys
from pathlib import Path

import pytest

SDAN = str(Path(sys.executable).with_name("sdan"))
SMALL = (
    *("model.features=8", "model.blocks=1", "train.epochs=1", "train.crops_per_epoch=4"),
    *("train.crop_px=32", "train.batch_per_worker=2", "train.val_crops=2"),
)


@pytest.mark.slow
def test_eight_times_is_trained_and_evaluated(tmp_path):
    def sdan(*arguments):
        done = subprocess.run(
            [SDAN, "--data", "data", *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=500
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    sdan("simulate", "raw", "--sequences", "2", "--width", "1024", "--preset", "tripod", "--seed", "11")
    said = sdan("preprocess", "raw", "shards", "--scale", "8", "--tile", "32", "--val", "00002")
    assert said.startswith("2 pairs: 2 written")
    changes = [word for value in SMALL for word in ("--set", value)]
    sdan("train", "shards", "--config", "srraw_8x", *changes, "--name", "eight", "--workers", "1")
    table = sdan("evaluate", "shards", "--model", "data/runs/eight/model")
    assert "bicubic of the camera JPG" in table and "SDAN (self)" in table

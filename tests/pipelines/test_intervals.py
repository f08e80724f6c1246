"""Confidence intervals over sequences, and the scores of single tiles."""

import math

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from pipelines.scoring.bootstrap import LEVEL, difference_interval, mean_interval
from pipelines.scoring.tile_scores import group_tables, write_tiles
from sdan.metrics import alignment_gain
from sdan.resample import bicubic, low_pass


def test_intervals_cover_the_true_mean_as_often_as_they_say():
    """30 sequences of 4 tiles that share their sequence's level: single tiles would give intervals half as wide."""
    random = np.random.default_rng(0)
    hits = 0
    names = [str(number // 4) for number in range(120)]
    for _ in range(100):
        values = np.repeat(random.normal(size=30), 4) + 0.1 * random.normal(size=120)
        found = mean_interval(values.tolist(), names)
        hits += found.low <= 0 <= found.high
    assert 88 <= hits <= 99 and LEVEL == 0.95


def test_differences_are_taken_tile_by_tile():
    random = np.random.default_rng(1)
    base = 25 + 5 * random.normal(size=40)
    better = base + 0.3 + 0.05 * random.normal(size=40)
    names = [str(number // 2) for number in range(40)]
    found = difference_interval(better.tolist(), base.tolist(), names)
    assert found.certain and 0.25 < found.low < found.mean < found.high < 0.35
    own = mean_interval(better.tolist(), names)
    assert own.high - own.low > 1  # scenes vary far more than the methods
    assert difference_interval(better.tolist(), base.tolist(), names) == found


def test_unknown_values_and_one_sequence():
    found = mean_interval([1.0, math.nan, 3.0, math.inf], ["a", "a", "a", "b"])
    assert (found.mean, found.sequences) == (2.0, 1) and math.isnan(found.low) and not found.certain
    assert math.isnan(mean_interval([math.nan], ["a"]).mean)


def test_equal_tiles_weigh_equally_whatever_their_sequence():
    assert mean_interval([0, 0, 0, 4], ["a", "a", "a", "b"]).mean == 1


def rows():
    shared = {"sequence": "00001", "pair": "2-1", "camera": "A", "iso_lr": 100.0}
    first = shared | {"focal_lr_mm": 50.0, "focal_hr_mm": 240.0}
    second = shared | {"sequence": "00002", "camera": "B", "focal_lr_mm": None, "focal_hr_mm": None}
    return [
        {"method": "bicubic", "raw_psnr": 20.0, **first},
        {"method": "bicubic", "raw_psnr": 30.0, **second},
        {"method": "SDAN", "raw_psnr": 21.0, "offset_px": 1.5, **first},
        {"method": "SDAN", "raw_psnr": math.nan, "offset_px": 0.5, **second},
    ]


def test_means_by_pair_camera_and_focal_lengths():
    text = group_tables(rows(), "raw_psnr")
    for line in (
        "| pair | tiles | bicubic | SDAN |",
        "| 00001 / 2-1 | 1 | 20.00 | 21.00 |",
        "| B | 1 | 30.00 | n/a |",
        "| 50 / 240 | 1 | 20.00 | 21.00 |",
        "| unknown / unknown | 1 | 30.00 | n/a |",
    ):
        assert f"\n{line}\n" in text
    assert "ISO" not in text  # all tiles have one


def test_tiles_are_written_as_parquet(tmp_path):
    write_tiles(tmp_path / "tiles.parquet", rows())
    table = pq.read_table(tmp_path / "tiles.parquet").to_pylist()
    assert [row["offset_px"] for row in table] == [None, None, 1.5, 0.5]
    assert table[0]["focal_hr_mm"] == 240 and table[1]["focal_hr_mm"] is None


@pytest.mark.parametrize("seed", [0, 1])
def test_the_seed_decides_the_interval(seed):
    values, names = np.random.default_rng(2).normal(size=10).tolist(), list("abcdefghij")
    assert mean_interval(values, names, seed=seed) == mean_interval(values, names, seed=seed)
    assert mean_interval(values, names, seed=seed) != mean_interval(values, names, seed=seed + 1)


@pytest.mark.parametrize("cells", [1, 2])
def test_only_offsets_that_align_have_an_alignment_gain(cells):
    """The target is the scene moved by (3, -2) input pixels; `cells`: input pixels per offset pixel."""
    noise = torch.randn(1, 3, 320, 320, generator=torch.Generator().manual_seed(0))
    wide = (0.5 + 0.5 * bicubic(low_pass(noise, 8), 8)).clamp(0, 1)
    camera, target = low_pass(wide[..., 32:288, 32:288], 4), wide[..., 44:300, 24:280]
    offset = torch.tensor([3.0, -2.0]).view(1, 2, 1, 1).expand(1, 2, 64 // cells, 64 // cells) / cells
    assert float(alignment_gain(camera, offset, target, border_px=8)) > 10
    assert float(alignment_gain(camera, -offset, target, border_px=8)) < 1
    none = alignment_gain(camera, torch.zeros_like(offset), target)
    assert float(none) == pytest.approx(0, abs=1e-4)  # whatever a network's output copies
    assert math.isnan(float(alignment_gain(camera, offset.repeat(1, 9, 1, 1), target)))

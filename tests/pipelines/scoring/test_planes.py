"""PSNR of the far plane, the near plane and the depth edges, on a picture whose error in each is known."""

import math

import pytest
import torch

from pipelines.scoring.held_out import HeldOut
from pipelines.scoring.scores import PLANES, plane_masks, score_images
from pipelines.scoring.tile_scores import group_tables

SIDE, SCALE = 16, 4
ERRORS = {"far": 0.01, "near": 0.1, "edges": 0.04}


def two_planes(boundary):
    """[1, SIDE, SIDE]: the near plane left of the column `boundary`."""
    near = torch.zeros(1, SIDE, SIDE, dtype=torch.uint8)
    near[:, :, :boundary] = 1
    return near


def crop(**more):
    size = 2 * SCALE * SIDE
    picture = torch.full((1, 3, size, size), 128, dtype=torch.uint8)
    batch = {"hr_rgb": picture, "true_rgb": picture, **more}
    return HeldOut(batch, ("a",), ({"sequence": "1"},), None, None)


def test_every_pixel_belongs_to_one_plane():
    """Two packed pixels on each side of the boundary are edges; a tile of one plane has none."""
    masks = plane_masks(two_planes(6), 2 * SCALE * SIDE)
    assert list(masks) == list(PLANES)
    columns = {plane: mask[0, 0, 0].nonzero().flatten() // (2 * SCALE) for plane, mask in masks.items()}
    assert columns["near"].unique().tolist() == list(range(4))
    assert columns["edges"].unique().tolist() == [4, 5, 6, 7]
    assert columns["far"].unique().tolist() == list(range(8, SIDE))
    assert torch.equal(sum(masks.values()), torch.ones_like(masks["far"]))
    flat = plane_masks(two_planes(0), 2 * SCALE * SIDE)
    assert flat["far"].all() and not flat["near"].any() and not flat["edges"].any()


def test_the_error_of_each_plane_is_its_own():
    """true is seen from the short frame, raw from the long one, where the near plane lies elsewhere."""
    near = torch.stack([two_planes(6), two_planes(10)], dim=1)
    held = crop(true_near=near)
    for view, target in enumerate(("true", "raw")):
        masks = plane_masks(near[:, view], held.batch["hr_rgb"].shape[-1])
        images = held.batch["hr_rgb"] / 255 + sum(ERRORS[plane] * mask for plane, mask in masks.items())
        scores = score_images(images, held, by_plane=True)
        for plane, error in ERRORS.items():
            assert scores[f"{target}_psnr_{plane}"] == pytest.approx([-20 * math.log10(error)], abs=1e-3)
        other = {"true": "raw", "raw": "true"}[target]
        assert abs(scores[f"{other}_psnr_near"][0] + 20 * math.log10(ERRORS["near"])) > 0.1 or target == "raw"


def test_planes_are_scored_only_where_they_are_known():
    images = torch.full((1, 3, 2 * SCALE * SIDE, 2 * SCALE * SIDE), 0.5)
    plain = score_images(images, crop(), by_plane=True)
    assert not any("far" in name for name in plain)
    assert score_images(images, crop(true_near=torch.stack([two_planes(6)] * 2, 1))) == plain
    one = score_images(images, crop(true_near=torch.stack([two_planes(0)] * 2, 1)), by_plane=True)
    assert math.isnan(one["raw_psnr_near"][0]) and one["raw_psnr_far"] == pytest.approx(plain["raw_psnr"], abs=1e-9)


def test_the_page_of_means_has_planes_of_simulated_data_only():
    rows = [
        {"method": method, "sequence": "1", "pair": "5-1", "camera": "c", "focal_lr_mm": 50.0, "focal_hr_mm": 240.0}
        | {"iso_lr": 100.0, "raw_psnr": 25.0, "raw_psnr_far": 26.0 + number, "raw_psnr_near": near}
        for number, near in enumerate((math.nan, 20.0))
        for method in ("bicubic", "SDAN")
    ]
    text = group_tables(rows, "raw_psnr")
    assert "| far | 2 | 26.50 | 26.50 |" in text and "| near | 1 | 20.00 | 20.00 |" in text and "| edges |" not in text
    assert "Edges: at most 2 packed pixels" in text
    for row in rows:
        del row["raw_psnr_far"], row["raw_psnr_near"]
    assert "plane" not in group_tables(rows, "raw_psnr")

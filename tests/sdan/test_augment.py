"""Every crop, flip and transpose keeps the Bayer phase and keeps all pictures registered.

The scene is a linear function of continuous position and colour, and each picture of the tile samples it. After
augmentation all pictures must still sample one common, flipped and transposed scene.
"""

import itertools

import numpy as np
import pytest
import torch

from sdan.augment import CropPlan, apply, random_plan

TILE, CROP, SCALE = 12, 8, 4
SLOPES = torch.tensor([[3.0, 7.0], [-2.0, 5.0], [4.0, -6.0]])  # of R, G, B, per mosaic row and column
OFFSETS = torch.tensor([1000.0, 3000.0, 5000.0])


def centres(count, step):
    """Positions of pixel centres, in mosaic pixels, of a grid with `step` mosaic pixels per pixel."""
    return (torch.arange(count) + 0.5) * step


def ramp(rows, cols):
    """[3, len(rows), len(cols)]: the linear scene at these positions."""
    slope_row, slope_col = SLOPES[:, 0, None, None], SLOPES[:, 1, None, None]
    return OFFSETS[:, None, None] + slope_row * rows[None, :, None] + slope_col * cols[None, None, :]


def mosaic_channels(image):
    """The RGGB mosaic's four packed channels of an RGB picture at mosaic size."""
    return torch.stack([image[0, ::2, ::2], image[1, ::2, 1::2], image[1, 1::2, ::2], image[2, 1::2, 1::2]])


def tile():
    fine = centres(2 * TILE * SCALE, 1 / SCALE)
    middle = centres(2 * TILE, 1.0)
    coarse = centres(TILE, 2.0)
    low = ramp(middle, middle)
    flow = torch.stack([0.5 * coarse[:, None] + 0.25 * coarse, -0.125 * coarse[:, None] + coarse])
    high = ramp(fine, fine)
    return {
        "lr_raw": mosaic_channels(low),
        "lr_render": low,
        "lr_rgb": low + 1,
        "hr_rgb": high,
        "true_rgb": high + 2,
    } | {"true_flow": flow.double()}


def plans():
    """Every combination of flips and transpose, at two corners of the tile and inside it."""
    last = 2 * (TILE - CROP)
    for flip_rows, flip_cols, transpose in itertools.product((False, True), repeat=3):
        for row, col in ((0, 0), (last, last), (2, 4)):
            start_row = min(row + 1, last - 1) if flip_rows else row
            start_col = min(col + 1, last - 1) if flip_cols else col
            yield CropPlan(start_row, start_col, flip_rows, flip_cols, transpose)


def source_axes(plan, positions):
    """(rows, cols) in the tile of the crop's `positions`, both in mosaic pixels."""
    rows = plan.row + (2 * CROP - positions if plan.flip_rows else positions)
    cols = plan.col + (2 * CROP - positions if plan.flip_cols else positions)
    return rows, cols


def seen(plan, positions):
    """The scene that the augmented crop must show on a grid with these centres."""
    image = ramp(*source_axes(plan, positions))
    return image.transpose(1, 2) if plan.transpose else image


@pytest.mark.parametrize("plan", list(plans()), ids=str)
def test_every_plan_keeps_pictures_registered_and_the_phase(plan):
    result = apply(tile(), plan, CROP, SCALE)
    middle, fine = centres(2 * CROP, 1.0), centres(2 * CROP * SCALE, 1 / SCALE)
    assert torch.allclose(result["lr_render"], seen(plan, middle))
    assert torch.allclose(result["lr_rgb"], seen(plan, middle) + 1)
    assert torch.allclose(result["hr_rgb"], seen(plan, fine))
    assert torch.allclose(result["true_rgb"], seen(plan, fine) + 2)
    # Phase: each photosite still samples its own colour, at the same position as in the rendering.
    assert torch.equal(result["lr_raw"], mosaic_channels(result["lr_render"]))
    assert all(value.is_contiguous() for value in result.values())


@pytest.mark.parametrize("plan", plans())
def test_the_near_plane_stays_on_its_pixels(plan):
    """Each packed pixel of the crop keeps the mark of the nearest packed pixel of the tile."""
    numbers = torch.arange(TILE * TILE).reshape(TILE, TILE)
    found = apply({"true_near": torch.stack([numbers, -numbers])}, plan, CROP, SCALE)["true_near"]
    rows, columns = (start // 2 + torch.arange(CROP) for start in (plan.row, plan.col))
    rows = rows.flip(0) if plan.flip_rows else rows
    columns = columns.flip(0) if plan.flip_cols else columns
    expected = numbers[rows][:, columns]
    expected = expected.T if plan.transpose else expected
    assert torch.equal(found, torch.stack([expected, -expected]))


@pytest.mark.parametrize("plan", list(plans()), ids=str)
def test_the_true_flow_still_points_at_the_same_position(plan):
    """The field is flipped and transposed with the pictures: both ends of a displacement keep their scene position."""
    flow = apply(tile(), plan, CROP, SCALE)["true_flow"]
    assert flow.shape == (2, CROP, CROP) and flow.dtype == torch.float64
    here = centres(CROP, 2.0)
    rows, cols = source_axes(plan, here)
    expected = torch.stack([0.5 * rows[:, None] + 0.25 * cols, -0.125 * rows[:, None] + cols])
    expected[0] *= -1 if plan.flip_rows else 1
    expected[1] *= -1 if plan.flip_cols else 1
    if plan.transpose:
        expected = expected.transpose(1, 2).flip(0)
    assert torch.allclose(flow.float(), expected, atol=1e-4)


def test_dtypes_are_kept_and_a_transpose_swaps_the_greens():
    sample = {name: value.round().to(torch.uint8) for name, value in tile().items() if name.startswith(("lr_r", "hr_"))}
    sample["lr_raw"] = tile()["lr_raw"].round().int().to(torch.uint16)
    sample["true_flow"] = tile()["true_flow"].half()
    sample["black_level"], sample["wb"] = torch.tensor([1.0, 2, 3, 4]), torch.tensor([2.0, 1.0, 1.1, 1.5])
    result = apply(sample, CropPlan(1, 2, True, False, True), CROP, SCALE)
    assert {name: value.dtype for name, value in result.items()} == {
        name: value.dtype for name, value in sample.items()
    }
    assert result["black_level"].tolist() == [1, 3, 2, 4]
    assert torch.allclose(result["wb"], torch.tensor([2.0, 1.1, 1.0, 1.5]))
    untransposed = apply(sample, CropPlan(1, 1, True, True, False), CROP, SCALE)
    assert untransposed["black_level"].tolist() == [1, 2, 3, 4]


def test_random_plans_reach_every_flip_and_valid_start():
    generator = np.random.default_rng(0)
    drawn = [random_plan(generator, TILE, CROP) for _ in range(3000)]
    assert {(p.flip_rows, p.flip_cols, p.transpose) for p in drawn} == set(itertools.product((False, True), repeat=3))
    assert {p.row for p in drawn if not p.flip_rows} == {0, 2, 4, 6, 8}
    assert {p.row for p in drawn if p.flip_rows} == {1, 3, 5, 7}
    assert {p.col for p in drawn if p.flip_cols} == {1, 3, 5, 7}
    share = sum(p.transpose for p in drawn) / len(drawn)
    assert 0.45 < share < 0.55


def test_random_plans_are_reproducible_and_flips_optional():
    first = [random_plan(np.random.default_rng(seed), TILE, CROP) for seed in range(20)]
    assert first == [random_plan(np.random.default_rng(seed), TILE, CROP) for seed in range(20)]
    for seed in range(20):
        plan = random_plan(np.random.default_rng(seed), TILE, CROP, flips=False)
        assert not (plan.flip_rows or plan.flip_cols or plan.transpose)


def test_a_crop_as_large_as_the_tile_is_only_transposed():
    for seed in range(20):
        plan = random_plan(np.random.default_rng(seed), CROP, CROP)
        assert (plan.row, plan.col, plan.flip_rows, plan.flip_cols) == (0, 0, False, False)
    assert {random_plan(np.random.default_rng(seed), CROP, CROP).transpose for seed in range(20)} == {False, True}


def test_wrong_plans_and_tiles_are_refused():
    with pytest.raises(ValueError, match="row: expected an even start of 0 or more, to keep the phase, got 1"):
        CropPlan(1, 0, False, False, False)
    with pytest.raises(ValueError, match="col: expected an odd start of 0 or more, to keep the phase, got 2"):
        CropPlan(0, 2, False, True, False)
    with pytest.raises(ValueError, match="crop_px: expected 1 to 12 packed pixels"):
        random_plan(np.random.default_rng(0), 12, 13)
    with pytest.raises(ValueError, match=r"lr_raw .* expected at least 26x16 mosaic pixels for this window, got 24x24"):
        apply(tile(), CropPlan(10, 0, False, False, False), CROP, SCALE)

"""Crops depend on their number alone, and the network's inputs are registered to each other."""

import numpy as np
import pytest
import torch

from pipelines import config as configs
from pipelines.loader import (
    CropStream,
    ShardsError,
    check_fit,
    held_out,
    index_split,
    model_inputs,
    training_batches,
)
from sdan.losses import low_pass


@pytest.fixture(scope="module")
def stream(tiny_shards):
    return CropStream(index_split(str(tiny_shards), "train"), seed=3, crop_px=16, augment=True)


def test_a_crop_is_its_number(stream):
    first, again, other = stream.crop(5), stream.crop(5), stream.crop(6)
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not np.array_equal(first["hr_rgb"], other["hr_rgb"])
    assert first["lr_raw"].shape == (4, 16, 16)
    assert first["hr_rgb"].shape == (3, 128, 128)
    assert 0 <= first["lr_raw"].min() < first["lr_raw"].max() <= 1


def test_each_round_visits_every_pair_once(stream):
    pairs = len(stream.index.paths)
    rounds = [[stream.pair(pairs * turn + number) for number in range(pairs)] for turn in range(6)]
    assert all(sorted(order) == list(range(pairs)) for order in rounds)
    assert len({tuple(order) for order in rounds}) > 1


@pytest.mark.parametrize("layout", ["mosaic", "packed", "rgb"])
def test_inputs_are_registered_to_each_other(stream, layout):
    batch = {name: torch.from_numpy(value)[None] for name, value in stream.crop(1).items()}
    model = configs.SDANConfig(input=layout, packing_kernel=4)
    inputs = model_inputs(batch, model, torch.device("cpu"))
    side = 16 if layout == "packed" else 32
    assert inputs.x.shape[-1] == inputs.self_reference.shape[-1] == inputs.oracle_reference.shape[-1] == side
    # The scene is perfectly aligned: the low-passed target is the rendering, whatever the crop and its flips.
    assert (low_pass(inputs.target, 4) - inputs.rendering).abs().mean() < 0.01
    assert (inputs.oracle_reference - inputs.self_reference).abs().mean() < 0.01
    green = inputs.x[:, 1:2] if layout == "packed" else None
    if green is not None:  # linear RAW follows the rendering's green at the same place
        rendered = inputs.rendering[:, 1:2, ::2, 1::2]
        assert (green - rendered**2.2 * 15000 / 15871).abs().mean() < 0.02


def test_batches_do_not_depend_on_where_a_run_was_cut(stream):
    whole = list(training_batches(stream, batch=2, rank=0, world=1, first_step=0, last_step=4))
    rest = list(training_batches(stream, batch=2, rank=0, world=1, first_step=2, last_step=4))
    assert len(whole) == 4
    for a, b in zip(whole[2:], rest, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_two_workers_share_the_crops_of_one_step(stream):
    alone = next(training_batches(stream, batch=4, rank=0, world=1, first_step=1, last_step=2))
    parts = [next(training_batches(stream, batch=2, rank=r, world=2, first_step=1, last_step=2)) for r in (0, 1)]
    assert torch.equal(alone["hr_rgb"], torch.cat([part["hr_rgb"] for part in parts]))


def test_held_out_crops_are_fixed_and_aligned(tiny_shards):
    crops = held_out(str(tiny_shards), "val", configs.smoke(), limit=None, align=True)
    assert len(crops) == 2
    assert crops.names[0].startswith("00005/00005-00001@")
    assert crops.aligned.shape == crops.batch["hr_rgb"].shape
    # Registration has nothing to correct here.
    inside = crops.aligned_mask.expand_as(crops.aligned)
    assert inside.float().mean() > 0.9
    assert (crops.aligned.float() - crops.batch["hr_rgb"]).abs()[inside].mean() < 5


def test_what_does_not_fit_is_said(tiny_shards):
    index = index_split(str(tiny_shards), "train")
    with pytest.raises(ShardsError, match="scale 8 expected"):
        check_fit(index, configs.srraw_8x())
    with pytest.raises(ShardsError, match="crop_px = 64"):
        check_fit(index, configs.srraw_4x())
    with pytest.raises(ShardsError, match="split=test"):
        index_split(str(tiny_shards), "test")

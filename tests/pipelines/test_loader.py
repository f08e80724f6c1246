"""A crop depends only on its number, and the network's inputs are registered to each other."""

import math
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import torch

from pipelines import config as configs
from pipelines.loader import (
    CropStream,
    ShardsError,
    alignment_shares,
    check_fit,
    crop_numbers,
    index_split,
    model_inputs,
    num_steps,
    of_pair,
    read_tile,
    training_batches,
    training_stream,
    with_curve_of,
)
from pipelines.scoring.held_out import held_out
from pipelines.train import alignment_note
from preprocessing import schema
from preprocessing.colour import linear_to_srgb, srgb_to_linear
from preprocessing.photometry.look import KNOTS, Look
from sdan.resample import low_pass


@pytest.fixture(scope="module")
def stream(tiny_shards):
    return CropStream(index_split(str(tiny_shards), "train"), seed=3, crop_px=16, augment=True)


def test_a_crop_depends_only_on_its_number(stream):
    first, again, other = stream.crop(5), stream.crop(5), stream.crop(6)
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not np.array_equal(first["hr_rgb"], other["hr_rgb"])
    assert first["lr_raw"].shape == (4, 16, 16)
    assert first["hr_rgb"].shape == (3, 128, 128)
    assert 0 <= first["lr_raw"].min() < first["lr_raw"].max() <= 1


def test_the_shares_of_alignment_are_of_tiles(tiny_shards, tmp_path):
    names = {"00001": "unaligned", "00002": "scale_fallback", "00003": "ecc", "00004": "ecc"}
    for source in (tiny_shards / "split=train").iterdir():
        table = pq.read_table(source)
        sequence = source.name[:5]
        place = table.schema.get_field_index("aligned_by")
        table = table.set_column(place, table.schema.field(place), pa.array([names[sequence]] * len(table)))
        target = tmp_path / "split=train" / source.name
        target.parent.mkdir(exist_ok=True)
        pq.write_table(table.slice(0, 1) if sequence == "00001" else table, target, row_group_size=1)
    index = index_split(str(tmp_path), "train")
    assert alignment_shares(index) == {"unaligned": 1 / 7, "scale_fallback": 2 / 7, "ecc": 4 / 7}
    assert sum(alignment_shares(index, most_pairs=2).values()) == 1
    note = "of the tiles 14.3 % are of pairs that do not show the same thing (unaligned), and 28.6 % are of pairs that "
    assert alignment_note(index) == f"{note}could not be registered (scale_fallback); `sdan inspect` shows them"
    assert alignment_note(index_split(str(tiny_shards), "train")) is None


def test_one_pair_of_frames_can_be_chosen(tiny_shards):
    index = index_split(str(tiny_shards), "train")
    assert of_pair(index, "00005-00001") == index
    with pytest.raises(ShardsError, match=r"--pair, .*: expected one of 00005-00001, got '00006-00002'"):
        of_pair(index, "00006-00002")
    other = index.paths[0].replace("00005-00001", "00006-00002")
    mixed = replace(index, paths=(other, *index.paths[1:]))
    assert (of_pair(mixed, "00006-00002").paths, of_pair(mixed, "00006-00002").tiles) == ((other,), (2,))


def test_each_round_visits_every_pair_once(stream):
    pairs = len(stream.index.paths)
    rounds = [[stream.pair(pairs * turn + number) for number in range(pairs)] for turn in range(6)]
    assert all(sorted(order) == list(range(pairs)) for order in rounds)
    assert len({tuple(order) for order in rounds}) > 1


@pytest.mark.parametrize("layout", ["mosaic", "packed", "rgb", "packed_rgb"])
def test_inputs_are_registered_to_each_other(stream, layout):
    batch = {name: torch.from_numpy(value)[None] for name, value in stream.crop(1).items()}
    model = configs.SDANConfig(input=layout, packing_kernel=4)
    inputs = model_inputs(batch, model, torch.device("cpu"))
    side = 16 if layout.startswith("packed") else 32
    assert inputs.x.shape[-1] == inputs.self_reference.shape[-1] == inputs.oracle_reference.shape[-1] == side
    # The scene is perfectly aligned: the low-passed target is the rendering, for any crop and flips.
    assert (low_pass(inputs.target, 4) - inputs.rendering).abs().mean() < 0.01
    assert (inputs.oracle_reference - inputs.self_reference).abs().mean() < 0.01
    if layout == "packed_rgb":
        assert torch.equal(inputs.x[0, 5], inputs.rendering[0, 1, ::2, 1::2])  # green of the cell's second pixel
    green = inputs.x[:, 1:2] if layout == "packed" else None
    if green is not None:  # linear RAW follows the rendering's green at the same place
        rendered = inputs.rendering[:, 1:2, ::2, 1::2]
        assert (green - rendered**2.2 * 15000 / 15871).abs().mean() < 0.02


def test_a_resumed_run_gets_the_same_batches(stream):
    whole = list(training_batches(stream, batch=2, rank=0, world=1, first_crop=0, last_crop=8))
    rest = list(training_batches(stream, batch=2, rank=0, world=1, first_crop=4, last_crop=8))
    assert len(whole) == 4
    for a, b in zip(whole[2:], rest, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.timeout(120)
def test_crops_are_read_while_all_cpus_are_reserved(stream):
    """Train workers may hold every CPU, and a lost worker's CPUs are freed only after a while."""
    if not ray.is_initialized():
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)

    @ray.remote
    class Reservation:
        def is_ready(self):
            return True

    holder = Reservation.options(num_cpus=ray.cluster_resources()["CPU"]).remote()
    assert ray.get(holder.is_ready.remote())
    assert len(list(training_batches(stream, batch=2, rank=0, world=1, first_crop=0, last_crop=8))) == 4
    ray.kill(holder)


def test_two_workers_share_the_crops_of_one_step(stream):
    alone = next(training_batches(stream, batch=4, rank=0, world=1, first_crop=4, last_crop=8))
    parts = [next(training_batches(stream, batch=2, rank=r, world=2, first_crop=4, last_crop=8)) for r in (0, 1)]
    assert torch.equal(alone["hr_rgb"], torch.cat([part["hr_rgb"] for part in parts]))


def test_each_crop_is_used_once_as_workers_come_and_go():
    """Three steps by two workers, two steps by one, one step by three, and the rest by two again."""
    batch, seen, position = 3, [], 0
    for world, steps in ((2, 3), (1, 2), (3, 1), (2, 2)):
        for rank in range(world):
            own = np.arange(steps * batch)
            seen += crop_numbers(own, batch=batch, rank=rank, world=world, first_crop=position).tolist()
        position += steps * world * batch
    assert sorted(seen) == list(range(position)) and position == 45


def test_the_last_step_is_a_full_batch():
    assert num_steps(1, 6, 4) == 2
    own = crop_numbers(np.arange(2 * 2), batch=2, rank=1, world=2, first_crop=1)
    assert own.tolist() == [3, 4, 7, 8]
    assert num_steps(8, 8, 4) == num_steps(9, 8, 4) == 0


def test_held_out_crops_are_fixed_and_aligned(tiny_shards):
    crops = held_out(index_split(str(tiny_shards), "val"), configs.smoke(), limit=None, align=True)
    assert len(crops) == 2
    assert crops.names[0].startswith("00005/00005-00001@")
    assert crops.aligned.shape == crops.batch["hr_rgb"].shape
    # The pairs are perfectly aligned, so registration changes little.
    inside = crops.aligned_mask.expand_as(crops.aligned)
    assert inside.float().mean() > 0.9
    assert (crops.aligned.float() - crops.batch["hr_rgb"]).abs()[inside].mean() < 5


def test_shards_that_do_not_fit_the_config_are_refused(tiny_shards):
    index = index_split(str(tiny_shards), "train")
    with pytest.raises(ShardsError, match="expected scale 8, got shards of scale 4"):
        check_fit(index, configs.srraw_8x())
    with pytest.raises(ShardsError, match=r"train\.crop_px.*expected tiles of at least 64"):
        check_fit(index, configs.srraw_4x())
    old = replace(index, info=replace(index.info, options={}))  # as version 0.2 wrote it
    with pytest.raises(ShardsError, match=r"model\.rendering_curve.*curve srgb, got bt709"):
        check_fit(old, configs.smoke())
    check_fit(old, with_curve_of(old, configs.smoke()))
    with pytest.raises(ShardsError, match="split=test"):
        index_split(str(tiny_shards), "test")


def srgb_gain(image, gain):
    light = np.where(image <= 0.04045, image / 12.92, ((image + 0.055) / 1.055) ** 2.4) * gain
    return np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("gain", [0.7, 1.0, 1.3])
def test_a_measured_exposure_ratio_is_removed(tmp_path, tiny_shards, gain):
    """hr_rgb is exposed with `gain` times the light; a stream that matches exposures returns it without that gain."""
    source, rows = index_split(str(tiny_shards), "train"), []
    for ratio in (None, math.nan, gain):
        row = read_tile(source, len(rows), 0) | {"exposure_ratio": ratio, "col": len(rows)}
        row["hr_rgb"] = (255 * srgb_gain(row["hr_rgb"] / 255, gain)).round().clip(0, 255).astype(np.uint8)
        rows.append(row)
    (tmp_path / "split=train").mkdir()
    info = schema.ShardInfo(tile_px=24, scale=4, options={"curve": "srgb"})
    for row in rows:
        path = tmp_path / "split=train" / f"0000{row['col']}_00005-00001_0123456789abcdef.parquet"
        pq.write_table(schema.encode([row], info), path)
    index = index_split(str(tmp_path), "train")
    plain, matched = (CropStream(index, 0, 24, False, truth=True, match_exposure=on) for on in (False, True))
    for number in range(3):
        before, after = plain.crop(number), matched.crop(number)
        known = index.paths[plain.pair(number)].rsplit("/", 1)[-1].startswith(f"0000{rows[2]['col']}")
        assert known or np.array_equal(before["hr_rgb"], after["hr_rgb"])
        if known:
            unclipped = before["hr_rgb"] < 255
            off = np.abs(after["hr_rgb"].astype(int) - after["true_rgb"])[unclipped]
            assert off.max() <= 2 and off.mean() < 0.6
            assert gain == 1 or np.abs(before["hr_rgb"].astype(int) - before["true_rgb"]).mean() > 5


def write_rows(folder, rows):
    """SHARDS in `folder` with one pair of these rows."""
    (folder / "split=train").mkdir(parents=True)
    info = schema.ShardInfo(tile_px=24, scale=4, options={"curve": "srgb"})
    pq.write_table(schema.encode(rows, info), folder / "split=train" / "00001_a_b.parquet", row_group_size=1)
    return index_split(str(folder), "train")


def test_look_rendering_changes_only_camera_pictures(tmp_path, tiny_shards):
    """A look that doubles the light: the rendering is half as bright as the JPG."""
    half = linear_to_srgb(srgb_to_linear(np.linspace(0, 1, KNOTS)) / 2).astype(np.float32)
    row = read_tile(index_split(str(tiny_shards), "train"), 0, 0)
    row |= Look(half, np.eye(3, dtype=np.float32)).columns()
    index = write_rows(tmp_path / "camera", [row])
    as_shot, rendered = (
        CropStream(index, 0, 24, False, truth=True, look=look).crop(0) for look in ("camera", "rendering")
    )
    for name in ("lr_rgb", "hr_rgb", "true_rgb"):
        expected = 255 * linear_to_srgb(srgb_to_linear(as_shot[name] / 255) / 2)
        assert np.abs(rendered[name] - expected).max() <= 1
    assert np.array_equal(rendered["lr_render"], as_shot["lr_render"])
    mixed = write_rows(tmp_path / "mixed", [row | {"hr_source": "rendering"}])
    crop = CropStream(mixed, 0, 24, False, look="rendering").crop(0)
    assert np.array_equal(crop["hr_rgb"], as_shot["hr_rgb"]) and np.array_equal(crop["lr_rgb"], rendered["lr_rgb"])
    scored = held_out(replace(index, split="val"), configs.smoke(), limit=None, align=False)
    assert np.array_equal(scored.batch["hr_rgb"][0], rendered["hr_rgb"][:, 32:160, 32:160])


def test_look_rendering_needs_shards_that_have_the_look(tmp_path, tiny_shards):
    row = read_tile(index_split(str(tiny_shards), "train"), 0, 0)
    new = pq.read_table(write_rows(tmp_path / "new", [row]).paths[0])
    old = tmp_path / "old" / "split=train" / "00001_a_b.parquet"
    old.parent.mkdir(parents=True)
    pq.write_table(new.drop_columns(["look_curve", "look_matrix"]), old, row_group_size=1)
    index = index_split(str(tmp_path / "old"), "train")
    with pytest.raises(ShardsError, match=r"train\.look=rendering.*one of an older version; preprocess again"):
        CropStream(index, 0, 24, False, look="rendering").crop(0)
    assert CropStream(index, 0, 24, False).crop(0)["hr_rgb"].shape == (3, 192, 192)


def test_reduced_crops_have_their_own_target(tmp_path, tiny_shards):
    """Half of the crops: the input is a small copy of the target. The others are as without reduced_share."""
    index = index_split(str(tiny_shards), "train")
    plain, half = (CropStream(index, 0, 16, True, truth=True, reduced_share=share) for share in (0, 0.5))
    changed = 0
    for number in range(24):
        as_shot, crop = plain.crop(number), half.crop(number)
        assert np.array_equal(crop["lr_raw"], as_shot["lr_raw"]) and crop["hr_rgb"].shape == (3, 128, 128)
        if np.array_equal(crop["lr_rgb"], as_shot["lr_rgb"]):
            assert np.array_equal(crop["true_rgb"], as_shot["true_rgb"])
            continue
        changed += 1
        assert np.array_equal(crop["hr_rgb"], crop["true_rgb"])
        assert any(np.array_equal(crop["hr_rgb"], as_shot[name]) for name in ("hr_rgb", "true_rgb"))
        mean = crop["hr_rgb"].reshape(3, 32, 4, 32, 4).mean((2, 4))
        assert np.abs(crop["lr_rgb"] - mean).mean() < 12
    assert 5 <= changed <= 19


def test_reduced_share_is_for_rgb_networks(tiny_shards):
    with pytest.raises(configs.ConfigError, match=r"train\.reduced_share: expected 0 for RAW .* got 0\.5"):
        configs.override(configs.starter(), {"train.reduced_share": 0.5})
    stream = training_stream(index_split(str(tiny_shards), "train"), configs.starter_rgb())
    assert stream.reduced_share == 0.5


def test_motions_depend_on_the_crop_number_alone(tiny_shards):
    index = index_split(str(tiny_shards), "train")
    plain, moved = (CropStream(index, 3, 16, True, max_shift_px=px) for px in (0, 8))
    assert "motion" not in plain.crop(5)
    assert np.array_equal(moved.crop(5)["motion"], moved.crop(5)["motion"])
    assert not np.array_equal(moved.crop(5)["motion"], moved.crop(6)["motion"])
    assert np.array_equal(moved.crop(5)["hr_rgb"], plain.crop(5)["hr_rgb"])  # the other draws stay


def test_truth_blur_softens_only_the_ideal_picture(tiny_shards):
    index = index_split(str(tiny_shards), "train")
    sharp, soft = (CropStream(index, 0, 16, False, truth=True, truth_blur_px=px).crop(0) for px in (0.0, 1.5))
    for name in ("lr_raw", "lr_rgb", "lr_render", "hr_rgb"):
        assert np.array_equal(sharp[name], soft[name])
    before, after = (np.abs(np.diff(crop["true_rgb"].astype(float))).mean() for crop in (sharp, soft))
    assert after < 0.8 * before
    assert abs(soft["true_rgb"].mean() - sharp["true_rgb"].mean()) < 1

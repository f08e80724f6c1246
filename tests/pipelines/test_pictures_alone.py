"""Shards of pictures without RAW: networks of RGB input train and are scored on them, others are refused."""

import json
import math
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pipelines import config as configs
from pipelines import registry
from pipelines.evaluate import evaluate
from pipelines.loader import ShardsError, check_fit, index_split, model_inputs, training_stream, with_curve_of
from pipelines.retrain import retrain
from pipelines.scoring.held_out import held_out
from preprocessing.shards import PreprocessOptions
from sdan import checkpoint
from sdan.network import SDAN

RGB = {"model.input": "packed_rgb"}


@pytest.fixture(scope="module")
def pictures(shards_without_truth, tmp_path_factory):
    """The tiny shards as if their pairs had no RAW."""
    folder = tmp_path_factory.mktemp("pictures")
    for source in Path(shards_without_truth).rglob("*.parquet"):
        table = pq.read_table(source)
        for name in ("lr_raw", "lr_render", "wb_source", "matrix_source", "white_level", "focal_lr_mm", "focal_hr_mm"):
            place = table.schema.get_field_index(name)
            table = table.set_column(place, table.schema.field(place), pa.nulls(len(table), table.schema.types[place]))
        described = json.loads(table.schema.metadata[b"sdan"])
        described["options"]["raw"] = "none"
        table = table.replace_schema_metadata({b"sdan": json.dumps(described).encode()})
        target = folder / source.relative_to(shards_without_truth)
        target.parent.mkdir(exist_ok=True)
        pq.write_table(table, target, row_group_size=1)
    return str(folder)


def config_of(**changes):
    return configs.override(configs.smoke(), RGB | changes)


def test_crops_hold_pictures_only_and_feed_the_network(pictures):
    index, config = index_split(pictures, "train"), config_of()
    check_fit(index, config)
    assert with_curve_of(index, config).model.rendering_curve == "srgb"
    crop = training_stream(index, config).crop(0)
    assert set(crop) == {"lr_rgb", "hr_rgb"}
    inputs = model_inputs({name: torch.from_numpy(value)[None] for name, value in crop.items()}, config.model, "cpu")
    assert inputs.x.shape[1] == 12 and torch.equal(inputs.rendering, inputs.camera)


@pytest.mark.parametrize("layout", ["mosaic", "packed"])
def test_networks_of_raw_are_refused_in_one_line(pictures, layout):
    config = configs.override(configs.smoke(), {"model.input": layout})
    with pytest.raises(ShardsError, match=rf"expected pairs with RAW for input={layout}, got pairs of pictures alone"):
        held_out(index_split(pictures, "val"), config, limit=None, align=False)


def test_evaluate_has_no_row_for_a_rendering(pictures, tmp_path):
    torch.manual_seed(0)
    config = config_of()
    model = checkpoint.save(tmp_path / "model", SDAN(config.model), config=configs.to_dict(config), scores={})
    result = evaluate(pictures, model, out=tmp_path / "out", perceptual=False)
    assert list(result.rows) == ["bicubic of the camera JPG", "SDAN (self)", "SDAN (oracle)"]
    assert result.targets == ("raw", "aligned") and math.isnan(result.epe_px)
    assert result.gain_db("raw") == pytest.approx(0, abs=0.01)  # untrained, with its skip: bicubic
    assert (tmp_path / "out" / "examples.png").is_file()


@pytest.mark.slow
def test_retrain_takes_new_pictures(tmp_path):
    """From pictures to a champion; for a new scene --zoom need not be repeated."""

    def add(*names):
        for name in names:
            cells = np.random.default_rng(int(name)).integers(30, 220, (96, 96, 3), dtype=np.uint8)
            high = cv2.GaussianBlur(cells.repeat(4, 0).repeat(4, 1), (0, 0), 1)
            low = cv2.resize(high, (192, 192), interpolation=cv2.INTER_AREA)
            cv2.imwrite(str(tmp_path / f"raw/{name}H.png"), high)
            cv2.imwrite(str(tmp_path / f"raw/{name}L.png"), cv2.resize(low, (384, 384), interpolation=cv2.INTER_CUBIC))

    (tmp_path / "raw").mkdir()
    add("001", "002", "003")
    raw, shards, data = (str(tmp_path / name) for name in ("raw", "shards", "data"))
    place = {"data": Path(data), "workers": 1, "progress": False}
    size = {"scale": 2, "tile_px": 24, "stride_px": 24, "align": "ecc"}
    options = PreprocessOptions(**size, zoom=2, val=("003",))
    first = retrain(raw, shards, config=config_of(**{"model.scale": 2, "loss.border_px": 8}), options=options, **place)
    assert first.preprocessed.written == 3 and any("RGB input" in note for note in first.preprocessed.notes)
    uri = registry.default_tracking_uri(Path(data))
    if not first.promoted:
        registry.set_champion(uri, "1")
    assert first.challenger is not None and "bicubic of the rendering" not in first.challenger.rows
    add("004")
    second = retrain(raw, shards, options=PreprocessOptions(**size), dry_run=True, **place)
    assert second.preprocessed.todo == 1 and "1 pair" in second.reason

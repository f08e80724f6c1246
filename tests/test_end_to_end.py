"""Every stage on a small scale: simulated RAW -> shards -> a model -> scores -> a zoomed photograph."""

import hashlib
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mlflow.tracking import MlflowClient

import sdan
from pipelines import cluster, registry
from pipelines import config as configs
from pipelines.evaluate import evaluate
from pipelines.loader import index_split, pair_names
from pipelines.retrain import retrain
from pipelines.train import summary, train
from pipelines.training.run_folder import RunShards
from pipelines.zoom import Zoomer, read_photo, write_png
from preprocessing.raw import decode
from preprocessing.shards import PreprocessOptions, preprocess
from preprocessing.simulator.sequences import simulate
from sdan import raw_input
from sdan.ops.precision import autocast

TOLERANCE = 2 / 255
"""Two of the 255 steps of an 8-bit PNG."""
OPTIONS = PreprocessOptions(scale=4, tile_px=20, stride_px=16, val=("00003",))
IMPROVES = {"train.learning_rate": 1e-4, "loss.self_target": "truth", "loss.reference_weight": 0.0}
"""Few, small steps towards the true picture improve the network a little, so that it is registered."""
CONFIG = configs.override(configs.smoke(), {"train.epochs": 3, "train.crops_per_epoch": 8} | IMPROVES)


def weights(folder: Path) -> str:
    """A hash of a checkpoint's weights."""
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """(folder with RAW, shards and data, the preprocessing report, the first run), made once."""
    folder = tmp_path_factory.mktemp("stages")
    simulate(folder / "raw", sequences=3, width_px=640, preset="tripod", seed=5)
    cluster.start_ray()
    report = preprocess(
        str(folder / "raw"), str(folder / "shards"), OPTIONS, progress=False, start_ray=cluster.start_ray
    )
    result = train(str(folder / "shards"), CONFIG, data=folder / "data", workers=1, name="first", progress=False)
    return folder, report, result


def test_every_pair_becomes_one_shard(stages):
    folder, report, _ = stages
    assert (report.pairs, report.written, len(report.quarantined)) == (9, 9, 0)
    splits = [index_split(str(folder / "shards"), split) for split in ("train", "val")]
    assert sum(split.num_tiles for split in splits) == report.rows  # one row group per tile
    again = preprocess(
        str(folder / "raw"), str(folder / "shards"), OPTIONS, progress=False, start_ray=cluster.start_ray
    )
    assert (again.written, again.skipped) == (0, 9)


def test_the_run_is_in_mlflow(stages):
    folder, _, result = stages
    client = MlflowClient(registry.default_tracking_uri(folder / "data"))
    run = client.get_run(result.run_id)
    assert run.info.status == "FINISHED"
    flat = configs.flatten(CONFIG)
    assert {name: run.data.params[name] for name in flat} == {name: str(value) for name, value in flat.items()}
    losses = client.get_metric_history(result.run_id, "main/train_loss")
    assert [point.step for point in losses] == [1, 2, 3]
    for name in ("val_self/aligned_psnr", "val_self/true_psnr", "main/learning_rate", "run/crops_per_s"):
        assert client.get_metric_history(result.run_id, name), name
    assert any("validation" in file.path for file in client.list_artifacts(result.run_id, "images"))
    assert client.get_model_version("sdan", result.version).run_id == result.run_id


def test_the_table_has_both_baselines_and_protocols(stages):
    folder, _, result = stages
    scores = evaluate(str(folder / "shards"), result.model, limit=6, out=folder / "out", perceptual=False)
    assert set(scores.rows) == {
        "bicubic of the camera JPG",
        "bicubic of the rendering",
        "SDAN (self)",
        "SDAN (oracle)",
    }
    assert scores.targets == ("raw", "aligned", "true")
    assert all(10 < row["true_psnr"] < 60 for row in scores.rows.values())
    written = json.loads((folder / "out" / "evaluation.json").read_text())
    assert written["rows"]["SDAN (self)"]["true_psnr"] == scores.rows["SDAN (self)"]["true_psnr"]
    assert cv2.imread(str(folder / "out" / "examples.png")).shape[1] > 1000


def first_tile(model, raw, rendering):
    """The network's own output, float [96, 96, 3], for the corner of a photo that only the first tile covers.

    A tile has 32 mosaic pixels and overlaps the next one by 8; the first 24 have no other weight.
    """
    side = model.input_tile_px
    x = raw_input.packed_to_mosaic(raw[None])[..., :side, :side]
    rendering = rendering[None, :, :side, :side]
    with torch.inference_mode(), autocast("auto", x.device):
        zoomed = model(x, rendering, rendering).zoomed[0].float().clamp(0, 1)
    return zoomed.permute(1, 2, 0).numpy()[:96, :96]


def test_a_raw_photograph_is_zoomed_by_the_network(stages):
    folder, _, result = stages
    zoomer = Zoomer.load(result.model)
    path = folder / "raw" / "00003" / "00005.dng"
    photo = read_photo(path, zoomer.model.config)
    image = zoomer.zoom(photo)
    height, width = photo.rendering.shape[1:]
    assert image.shape == (4 * height, 4 * width, 3)
    model = sdan.load(result.model)
    assert (model.config.input, model.input_tile_px) == ("mosaic", 32)
    expected = first_tile(model, *raw_input.from_photo(decode.load(path)))
    assert np.abs(image[:96, :96] - expected).max() < TOLERANCE
    write_png(image, folder / "zoomed.png", bits=16)
    stored = cv2.imread(str(folder / "zoomed.png"), cv2.IMREAD_UNCHANGED)
    assert stored.dtype == np.uint16
    assert np.abs(stored[..., ::-1] / 65535 - image).max() < 1e-4


def test_a_jpg_is_zoomed_from_a_synthetic_mosaic(stages):
    folder, _, result = stages
    zoomer = Zoomer.load(result.model)
    path = folder / "raw" / "00003" / "00005.JPG"
    photo = read_photo(path, zoomer.model.config)
    assert not photo.from_raw
    image = zoomer.zoom(photo)
    picture = torch.from_numpy(cv2.imread(str(path))[..., ::-1].copy()).permute(2, 0, 1) / 255
    assert image.shape == (4 * picture.shape[1], 4 * picture.shape[2], 3)
    expected = first_tile(sdan.load(result.model), raw_input.mosaic_from_srgb(picture[None])[0], picture)
    assert np.abs(image[:96, :96] - expected).max() < TOLERANCE


def test_only_the_first_model_becomes_the_champion(stages):
    folder, _, result = stages
    uri = registry.default_tracking_uri(folder / "data")
    assert result.champion
    assert str(registry.get_champion(uri).version) == result.version
    assert weights(registry.resolve_model(uri, "models:/sdan@champion")) == weights(result.model)


def test_a_training_that_makes_it_worse_is_not_registered(stages):
    """The best epoch is 0, the untrained network, so nothing is registered, and the champion stays."""
    folder, _, first = stages
    worse = configs.override(CONFIG, {"train.learning_rate": 0.3, "train.epochs": 1})
    result = train(str(folder / "shards"), worse, data=folder / "data", workers=1, name="worse", progress=False)
    assert (result.version, result.champion, result.verdict.epoch) == (None, False, 0)
    assert "not better than before the first step" in summary(result) and str(result.model) in summary(result)
    assert result.model.is_dir()
    champion = registry.get_champion(registry.default_tracking_uri(folder / "data"))
    assert str(champion.version) == first.version


@pytest.mark.slow
def test_retraining_runs_once_for_new_pairs(tmp_path):
    raw, shards = str(tmp_path / "raw"), str(tmp_path / "shards")
    simulate(tmp_path / "raw", sequences=3, width_px=640, preset="tripod", seed=5)
    place = {"data": tmp_path / "data", "options": OPTIONS, "workers": 1, "progress": False}
    assert "9 pairs and train a first model" in retrain(raw, shards, dry_run=True, **place).reason
    assert not (tmp_path / "data").exists()
    first = retrain(raw, shards, config=CONFIG, **place)
    assert first.promoted
    idle = retrain(raw, shards, config=CONFIG, **place)
    assert "nothing new" in idle.reason and any("are for a first model" in note for note in idle.preprocessed.notes)
    assert not any("first model" in note for note in first.preprocessed.notes)
    simulate(tmp_path / "raw", sequences=4, width_px=640, preset="tripod", seed=5)
    second = retrain(raw, shards, **place)
    assert (second.preprocessed.written, second.preprocessed.skipped) == (3, 9)
    assert second.trained is not None
    gain = second.comparisons[0]
    assert gain.metric == "aligned_psnr" and gain.difference.sequences == 1
    rows = [scores.rows["SDAN (self)"]["aligned_psnr"] for scores in (second.champion, second.challenger)]
    assert gain.difference.mean == pytest.approx(rows[1] - rows[0], abs=1e-4)
    assert not second.promoted and "takes two held-out sequences" in second.reason  # one gives no interval
    uri = registry.default_tracking_uri(tmp_path / "data")
    assert str(registry.get_champion(uri).version) == first.trained.version
    index = RunShards.read(second.trained.folder).train
    old = [name for number, name in enumerate(pair_names(index)) if number not in index.new]
    assert len(index.new) == 3 and old == pair_names(RunShards.read(first.trained.folder).train)
    assert second.reason in second.report.read_text() and f"- {pair_names(index)[-1]}" in second.report.read_text()
    assert "nothing new" in retrain(raw, shards, **place).reason  # even if the second model was not promoted

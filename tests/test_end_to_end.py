"""The whole road on a small scale: simulated RAW -> shards -> a model -> scores -> a zoomed photograph."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from mlflow.tracking import MlflowClient

from pipelines import cluster, registry
from pipelines import config as configs
from pipelines.evaluate import evaluate
from pipelines.loader import index_split
from pipelines.retrain import retrain
from pipelines.train import train
from pipelines.zoom import Zoomer, read_photo, write_png
from preprocessing.shards import PreprocessOptions, preprocess
from preprocessing.simulator.sequences import simulate
from sdan.resample import bicubic

SDAN = str(Path(sys.executable).with_name("sdan"))
OPTIONS = PreprocessOptions(scale=4, tile_px=20, stride_px=16, val=("00003",))
CONFIG = configs.override(configs.smoke(), {"train.epochs": 3, "train.crops_per_epoch": 8})


def weights(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def road(tmp_path_factory):
    """RAW, shards and a first run, made once."""
    folder = tmp_path_factory.mktemp("road")
    simulate(folder / "raw", sequences=3, width_px=640, preset="tripod", seed=5)
    cluster.start_ray()
    report = preprocess(str(folder / "raw"), str(folder / "shards"), OPTIONS, progress=False)
    result = train(str(folder / "shards"), CONFIG, data=folder / "data", workers=1, name="first", progress=False)
    return folder, report, result


def test_every_pair_becomes_a_shard_and_none_twice(road):
    folder, report, _ = road
    assert (report.pairs, report.written, len(report.quarantined)) == (9, 9, 0)
    splits = [index_split(str(folder / "shards"), split) for split in ("train", "val")]
    assert sum(split.num_tiles for split in splits) == report.rows  # each tile can be read alone
    again = preprocess(str(folder / "raw"), str(folder / "shards"), OPTIONS, progress=False)
    assert (again.written, again.skipped) == (0, 9)


def test_the_run_is_in_mlflow(road):
    folder, _, result = road
    client = MlflowClient(registry.default_tracking_uri(folder / "data"))
    run = client.get_run(result.run_id)
    assert run.info.status == "FINISHED"
    flat = configs.flatten(CONFIG)
    assert {name: run.data.params[name] for name in flat} == {name: str(value) for name, value in flat.items()}
    losses = client.get_metric_history(result.run_id, "train_loss")
    assert [point.step for point in losses] == [1, 2, 3]
    for name in ("val_self_aligned_psnr", "val_self_true_psnr", "learning_rate", "crops_per_s"):
        assert client.get_metric_history(result.run_id, name), name
    assert any("validation" in file.path for file in client.list_artifacts(result.run_id, "images"))
    assert client.get_model_version("sdan", result.version).run_id == result.run_id


def test_the_table_has_both_baselines_and_both_protocols(road):
    folder, _, result = road
    scores = evaluate(str(folder / "shards"), result.model, limit=6, out=folder / "out")
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


def test_a_photograph_is_zoomed_as_the_network_sees_it(road):
    folder, _, result = road
    zoomer = Zoomer.load(result.model)
    photo = read_photo(folder / "raw" / "00003" / "00005.dng", zoomer.model.config.input)
    image = zoomer.zoom(photo)
    height, width = photo.rendering.shape[1:]
    assert image.shape == (4 * height, 4 * width, 3)
    # Three small epochs stay close to where the network starts: bicubic of the rendering.
    plain = bicubic(photo.rendering[None], 4)[0].permute(1, 2, 0).clamp(0, 1).numpy()
    assert np.abs(image - plain).mean() < 0.1
    write_png(image, folder / "zoomed.png", bits=16)
    stored = cv2.imread(str(folder / "zoomed.png"), cv2.IMREAD_UNCHANGED)
    assert stored.dtype == np.uint16
    assert np.abs(stored[..., ::-1] / 65535 - image).max() < 1e-4


def test_a_jpg_is_zoomed_too(road):
    folder, _, result = road
    zoomer = Zoomer.load(result.model)
    photo = read_photo(folder / "raw" / "00003" / "00005.JPG", zoomer.model.config.input)
    assert not photo.from_raw
    assert zoomer.zoom(photo).shape[0] == 4 * photo.rendering.shape[1]


def test_one_worker_on_a_cpu_is_reproducible_bit_for_bit(road):
    folder, _, first = road
    again = train(str(folder / "shards"), CONFIG, data=folder / "data", workers=1, name="again", progress=False)
    assert weights(again.model) == weights(first.model)
    assert again.scores == first.scores


def test_the_first_model_is_the_champion_and_the_second_is_not(road):
    folder, _, result = road
    uri = registry.default_tracking_uri(folder / "data")
    assert result.champion
    assert str(registry.get_champion(uri).version) == result.version
    assert weights(registry.resolve_model(uri, "models:/sdan@champion")) == weights(result.model)


@pytest.mark.slow
def test_retraining_takes_what_is_new_and_nothing_twice(tmp_path):
    raw, shards = str(tmp_path / "raw"), str(tmp_path / "shards")
    simulate(tmp_path / "raw", sequences=3, width_px=640, preset="tripod", seed=5)
    place = {"data": tmp_path / "data", "options": OPTIONS, "workers": 1, "progress": False}
    assert "9 pairs and train a first model" in retrain(raw, shards, dry_run=True, **place).reason
    assert not (tmp_path / "data").exists()
    first = retrain(raw, shards, config=CONFIG, **place)
    assert first.promoted
    assert "nothing new" in retrain(raw, shards, **place).reason
    simulate(tmp_path / "raw", sequences=4, width_px=640, preset="tripod", seed=5)
    second = retrain(raw, shards, **place)
    assert (second.preprocessed.written, second.preprocessed.skipped) == (3, 9)
    assert second.trained is not None
    gain = second.challenger.rows["SDAN (self)"]["aligned_psnr"] - second.champion.rows["SDAN (self)"]["aligned_psnr"]
    champion = registry.get_champion(registry.default_tracking_uri(tmp_path / "data"))
    assert second.promoted == (gain > 0)
    assert str(champion.version) == (second.trained.version if gain > 0 else first.trained.version)
    assert "nothing new" in retrain(raw, shards, **place).reason  # promoted or not, it has been tried


@pytest.mark.slow
def test_a_killed_run_resumes_and_ends_as_an_unbroken_one(road, tmp_path):
    folder, _, _ = road
    settings = ["--config", "smoke", "--set", "train.epochs=6", "--set", "train.crops_per_epoch=8"]
    base = [SDAN, "--data", str(tmp_path), "train", str(folder / "shards"), *settings, "--workers", "1", "--name"]
    environment = {**os.environ, "RAY_ADDRESS": ""}
    subprocess.run([*base, "whole"], check=True, env=environment, timeout=300)
    broken = subprocess.Popen([*base, "broken"], env=environment, start_new_session=True)
    progress = tmp_path / "runs" / "broken" / "progress.jsonl"
    deadline = time.monotonic() + 200
    while not progress.exists() or len(progress.read_text().splitlines()) < 3:
        assert time.monotonic() < deadline
        assert broken.poll() is None
        time.sleep(0.05)
    os.killpg(broken.pid, signal.SIGKILL)
    broken.wait()
    subprocess.run([*base, "broken", "--resume"], check=True, env=environment, timeout=300)
    assert weights(tmp_path / "runs" / "broken" / "model") == weights(tmp_path / "runs" / "whole" / "model")
    client = MlflowClient(registry.default_tracking_uri(tmp_path))
    experiment = client.get_experiment_by_name("sdan")
    assert len(client.search_runs([experiment.experiment_id])) == 2

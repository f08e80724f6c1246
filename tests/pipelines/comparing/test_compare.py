"""`sdan compare` with a stand-in trainer: what is trained, scored, written and continued."""

import csv
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from mlflow import MlflowClient
from PIL import Image
from stand_in import TINY, NoRuns, StandIn

from pipelines import cluster, registry
from pipelines.comparing import run, state, verb
from pipelines.comparing.rows import CompareError
from pipelines.comparing.tracking import EXPERIMENT, ROW_TAG
from pipelines.comparing.verb import Options, compare
from pipelines.config import ConfigError
from pipelines.loader import ShardsError
from preprocessing.storage import held
from sdan import metrics
from sdan.perceptual import features
from sdan.perceptual.weights import PerceptualError

SOME = ("bicubic-camera", "srresnet", "sdan-raw")


@pytest.fixture
def trainer(monkeypatch):
    """The stand-in, and no Ray."""
    stand_in = StandIn()
    monkeypatch.setattr(run, "train", stand_in)
    monkeypatch.setattr(cluster, "start_ray", lambda: None)
    plan = cluster.WorkerPlan(1, use_gpu=False, cpus_per_worker=1.0, threads=1, readers=1)
    monkeypatch.setattr(verb, "plan_rows", lambda rows, workers, concurrent: (plan, concurrent or 1))
    return stand_in


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A data folder; without MLflow, whose database takes seconds to make, and without ST-LPIPS."""
    monkeypatch.setattr(verb, "CompareRuns", NoRuns)
    monkeypatch.setattr(metrics, "PERCEPTUAL", {})
    return tmp_path / "data"


def compared(shards, data, out, rows=SOME, table=1, said=None, **options):
    options = {"steps": 4, "assignments": TINY, "crops": 2, **options}
    say = (said if said is not None else []).append
    return compare(str(shards), Options(table, rows, **options), data=data, out=out, say=say)


def read_csv(path: Path) -> dict[tuple[str, str], dict[str, str]]:
    with path.open() as file:
        return {(line["row"], line["protocol"]): line for line in csv.DictReader(file)}


def test_a_comparison_writes_tables_tiles_crops_and_runs(tiny_shards, trainer, tmp_path):
    data = tmp_path / "data"
    result = compared(tiny_shards, data, tmp_path / "out")
    assert (result.finished, result.set_aside) == (3, {})
    assert trainer.trained == ["srresnet", "sdan-raw"]
    lines = read_csv(tmp_path / "out" / "table1.csv")
    assert list(lines) == [
        ("bicubic-camera", "self"), ("srresnet", "self"), ("sdan-raw", "self"), ("sdan-raw", "oracle")
    ]  # fmt: skip
    assert float(lines["bicubic-camera", "self"]["raw_psnr"]) > 15
    oracle = lines["sdan-raw", "oracle"]
    assert all(oracle[name] for name in ("alignment_gain", "offset_roughness", "epe_px", "parameters"))
    assert float(oracle["ms_per_megapixel"]) > 0
    text = (tmp_path / "out" / "table1.md").read_text()
    assert text == result.table and "| SDAN (the paper's) (RAW) | oracle |" in text
    assert "Simulated data. 2 crops of 1 sequences, split val." in text and "seed 0; --set model.features=8" in text
    tiles = pq.read_table(tmp_path / "out" / "rows" / "sdan-raw" / "tiles.parquet").to_pylist()
    assert [tile["protocol"] for tile in tiles] == ["self", "self", "oracle", "oracle"]
    mean = np.mean([tile["raw_psnr"] for tile in tiles[:2]])
    assert mean == pytest.approx(float(lines["sdan-raw", "self"]["raw_psnr"]))
    folders = sorted((tmp_path / "out" / "crops").iterdir())
    assert {tile["tile"] for tile in tiles} == {folder.name for folder in folders}
    expected = {"bicubic-camera.png", "srresnet.png", "sdan-raw.png", "target.png", "true.png"}
    assert {file.name for file in folders[0].iterdir()} == expected
    offset = np.load(tmp_path / "out" / "offsets" / folders[0].name / "sdan-raw.npy")
    assert offset.shape == (2, 32, 32) and offset.dtype == np.float16
    assert Image.open(tmp_path / "out" / "grid.png").width > 4 * 256
    page = (tmp_path / "out" / "report.html").read_text()
    assert (
        "SDAN (the paper&#39;s) (RAW), oracle" in page and "bicubic of the camera JPG against the true target" in page
    )
    assert page.count('data-label="target"') == 2
    client = MlflowClient(registry.default_tracking_uri(data))
    parent = json.loads((tmp_path / "out" / "compare.json").read_text())["parent_run"]
    assert {item.path for item in client.list_artifacts(parent)} == {
        "table1.md",
        "table1.csv",
        "grid.png",
        "report.html",
    }
    experiment = client.get_experiment_by_name(EXPERIMENT).experiment_id
    children = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{parent}'")
    assert {child.data.tags[ROW_TAG] for child in children} == set(SOME)
    assert all(child.info.status == "FINISHED" for child in children)
    assert client.search_registered_models() == []


def test_pictures_give_the_scores_that_the_table_prints(tiny_shards, data, trainer, tmp_path):
    """Recomputed from the saved PNGs, whose values are rounded to 8 bits."""
    compared(tiny_shards, data, tmp_path / "out", rows=("bicubic-rendering",))
    for tile in pq.read_table(tmp_path / "out" / "rows" / "bicubic-rendering" / "tiles.parquet").to_pylist():
        folder = tmp_path / "out" / "crops" / tile["tile"]
        shown, target = (
            np.asarray(Image.open(folder / name), np.float64)[8:-8, 8:-8] / 255
            for name in ("bicubic-rendering.png", "target.png")
        )
        assert -10 * np.log10(((shown - target) ** 2).mean()) == pytest.approx(tile["raw_psnr"], abs=0.1)


def test_the_same_command_goes_on_after_an_interrupt(tiny_shards, data, trainer, tmp_path):
    trainer.stop_at = "sdan-raw"
    with pytest.raises(KeyboardInterrupt):
        compared(tiny_shards, data, tmp_path / "out")
    assert trainer.trained == ["srresnet", "sdan-raw"] and not trainer.calls[1]["resume"]
    scored = (tmp_path / "out" / "rows" / "srresnet" / "scores.json").stat().st_mtime_ns
    assert "srresnet.png" in {file.name for file in (tmp_path / "out" / "crops").rglob("*.png")}
    trainer.stop_at = None
    said = []
    result = compared(tiny_shards, data, tmp_path / "out", said=said)
    assert trainer.trained == ["srresnet", "sdan-raw", "sdan-raw"]
    first, again = trainer.calls[1:]
    assert again["resume"] and (again["name"], again["run_id"]) == (first["name"], first["run_id"])
    assert again["pairs"] == first["pairs"] and again["register"] is None and again["keep"] == "last"
    assert result.finished == 3 and "goes on" in said[0]
    before = (tmp_path / "out" / "table1.md").read_text()
    assert compared(tiny_shards, data, tmp_path / "out").table == before
    assert len(trainer.calls) == 3
    assert scored != 0


def test_a_trained_row_that_was_not_scored_is_not_trained_again(tiny_shards, data, trainer, tmp_path):
    compared(tiny_shards, data, tmp_path / "out", rows=("sdan-raw",))
    (tmp_path / "out" / "rows" / "sdan-raw" / "scores.json").unlink()
    assert compared(tiny_shards, data, tmp_path / "out", rows=("sdan-raw",)).finished == 1
    assert len(trainer.calls) == 1


def test_more_rows_join_the_finished_ones(tiny_shards, data, trainer, tmp_path):
    compared(tiny_shards, data, tmp_path / "out", rows=("srresnet",))
    result = compared(tiny_shards, data, tmp_path / "out", rows=("bicubic-camera",))
    assert trainer.trained == ["srresnet"]
    assert [line.split(" | ")[0] for line in result.table.splitlines() if line.startswith("| ")][2:4] == [
        "| Bicubic (camera JPG) (RGB)",
        "| SRResNet (L1) (RGB)",
    ]


def test_a_failed_row_is_set_aside_and_tried_again(tiny_shards, data, trainer, tmp_path):
    trainer.fail = {"srresnet"}
    result = compared(tiny_shards, data, tmp_path / "out")
    assert result.finished == 2 and "expected to finish, got NaN" in result.set_aside["srresnet"]
    assert "| SRResNet (L1) (RGB) | n/a |" in result.table and "- n/a, SRResNet (L1) (RGB): run" in result.table
    assert "2 rows finished, 1 set aside" in verb.summary(result)
    assert "got NaN" in read_csv(tmp_path / "out" / "table1.csv")["srresnet", ""]["reason"]
    trainer.fail = set()
    assert compared(tiny_shards, data, tmp_path / "out").finished == 3


def test_rows_without_weights_are_na_and_say_how(tiny_shards, data, trainer, tmp_path, monkeypatch, vgg_weights):
    rows = ("bicubic-camera", "srgan", "perceptual", "srresnet-cx-raw", "srresnet-cobi-raw")

    def none(path):
        raise PerceptualError("VGG-19: expected weights, got none; download them")

    real = features.load_features
    monkeypatch.setattr("stand_in.load_features", none)
    result = compared(tiny_shards, data, tmp_path / "out", rows=rows)
    assert result.finished == 1 and set(result.set_aside) == set(rows[1:])
    assert result.table.count("got none; download them") == 4
    monkeypatch.setattr("stand_in.load_features", real)
    result = compared(tiny_shards, data, tmp_path / "out", rows=("perceptual",))
    assert "Perceptual, VGG16 (RAW)" in result.table and "because VGG-19, which the paper used" in result.table


def test_rows_side_by_side_give_the_same_table(tiny_shards, data, trainer, tmp_path):
    rows = ("srresnet", "sdan-raw")
    one = compared(tiny_shards, data, tmp_path / "one", rows)
    two = compared(tiny_shards, data, tmp_path / "two", rows, concurrent=2)
    keep = [line.rsplit("|", 2)[0] for line in one.table.splitlines()]  # without milliseconds
    assert [line.rsplit("|", 2)[0] for line in two.table.splitlines()] == keep


def test_another_command_in_the_same_folder_is_refused(tiny_shards, data, trainer, tmp_path):
    compared(tiny_shards, data, tmp_path / "out", rows=("bicubic-camera",))
    for options, said in (
        ({"steps": 5}, "steps: expected 4"),
        ({"crops": 1}, "crops: expected 2"),
        ({"assignments": (*TINY, "train.seed=1")}, "changes: expected"),
        ({"table": 2}, "table: expected 1"),
    ):
        with pytest.raises(CompareError, match=f"-o .*out, {said}.*choose another -o"):
            compared(tiny_shards, data, tmp_path / "out", rows=("bicubic-camera",), **options)


def test_a_folder_in_use_is_refused(tiny_shards, data, trainer, tmp_path):
    with held(tmp_path / "out"), pytest.raises(CompareError, match=r"out: expected a folder in which no other command"):
        compared(tiny_shards, data, tmp_path / "out", rows=("bicubic-camera",))


def test_bad_requests_write_nothing(tiny_shards, data, trainer, tmp_path):
    for options, error, said in (
        ({"rows": ("nosuch",)}, CompareError, "--rows, table 1: expected names of bicubic-camera, .*got 'nosuch'"),
        ({"table": 3}, CompareError, "--table: expected 1 or 2, got 3"),
        ({"steps": 0}, CompareError, "--steps: expected at least 1, got 0"),
        ({"assignments": (*TINY, "train.epochs=2")}, ConfigError, "--set train.epochs: expected none beside --steps 4"),
        ({"assignments": (*TINY, "loss.pixel_weight=2")}, ConfigError, "--set loss.pixel_weight, row srgan"),
        ({"assignments": (*TINY, "model.input=rgb")}, ConfigError, "--set model.input: expected mosaic"),
        ({"assignments": (*TINY, "model.scale=8")}, ShardsError, "expected scale 8, got shards of scale 4"),
        ({"crops": 0}, ValueError, "--crops: expected at least 1"),
    ):
        with pytest.raises(error, match=said):
            compared(tiny_shards, data, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists() and trainer.calls == []


def test_a_damaged_state_is_one_line(tiny_shards, data, trainer, tmp_path):
    compared(tiny_shards, data, tmp_path / "out", rows=("bicubic-camera",))
    scores = state.row_folder(tmp_path / "out", "bicubic-camera") / state.SCORES
    scores.write_text("{")
    with pytest.raises(CompareError, match=r"scores\.json.*delete it"):
        compared(tiny_shards, data, tmp_path / "out", rows=("bicubic-camera",))
    (tmp_path / "out" / "compare.json").write_text("[]")
    with pytest.raises(CompareError, match=r"compare\.json.*choose another -o"):
        compared(tiny_shards, data, tmp_path / "out", rows=("bicubic-camera",))

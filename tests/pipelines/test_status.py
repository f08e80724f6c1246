"""`sdan status` shows each run's state, the champion, the shards and the last retraining."""

import json
import os
import time

import pytest
from typer.testing import CliRunner

from pipelines import config as configs
from pipelines import registry, status
from pipelines.cli import app
from pipelines.retraining import state
from pipelines.training.run_folder import PROGRESS, StoredRun


@pytest.fixture
def data(tmp_path):
    """Three runs: one finished, one running, one killed an hour ago."""
    now = time.time()
    for name, epoch, age_s in (("done", 4, 7200), ("going", 2, 5), ("cut", 1, 3600)):
        folder = tmp_path / "runs" / name
        StoredRun(configs.to_dict(configs.smoke()), "/shards", "0" * 32, None, 1).write(folder)
        written = now - age_s
        report = {"time": written, "epoch": epoch, "epochs": 4, "val_psnr": 20.0 + epoch, "train_loss": 0.1}
        (folder / PROGRESS).write_text(json.dumps(report) + "\n")
        live = {
            "time": written + 1,
            "epoch": epoch + 0.5,
            "epochs": 4,
            "loss": 0.05,
            "crops_per_s": 8.0,
            "left_s": 62.0,
        }
        (folder / "live.json").write_text(json.dumps(live))
        for file in folder.iterdir():
            os.utime(file, (written, written))
    (tmp_path / "runs" / "done" / "model").mkdir()
    return tmp_path


def test_each_run_has_its_state(data):
    found = {run.name: run for run in status.status(data).runs}
    assert list(found) == ["going", "cut", "done"]
    assert {name: run.state for name, run in found.items()} == {
        "going": "running",
        "cut": "stopped",
        "done": "finished",
    }
    assert found["going"].detail == "epoch 2.5/4, loss 0.0500, PSNR 22.00 dB (self), 8.0 crops/s, 01:02 left"
    assert "continue with `sdan train /shards --resume --name cut`" in found["cut"].detail
    assert found["done"].detail == "epoch 4/4, loss 0.1000, PSNR 24.00 dB (self)"


def test_a_finished_run_shows_the_score_of_its_model(data):
    model = data / "runs" / "done" / "model" / "config.json"
    for content, said in (
        (
            json.dumps({"format": 1, "scores": {"val_psnr": 25.5}}),
            "epoch 4/4, loss 0.1000, its model: PSNR 25.50 dB (self)",
        ),
        ("[]", "epoch 4/4, loss 0.1000, PSNR 24.00 dB (self)"),
        ("{" * 9, "epoch 4/4, loss 0.1000, PSNR 24.00 dB (self)"),
        (json.dumps({"scores": {"val_psnr": "high"}}), "epoch 4/4, loss 0.1000, PSNR 24.00 dB (self)"),
    ):
        model.write_text(content)
        found = next(run for run in status.status(data).runs if run.name == "done")
        assert found.state == "finished" and found.detail == said
        assert len(found.notes) == (content[0] == "[" or content[:2] == "{{")


def test_the_command_prints_one_screen(data):
    state.note(data, "+0.100 dB: promoted")
    shown = CliRunner().invoke(app, ["--data", str(data), "status"])
    assert shown.exit_code == 0
    lines = shown.stdout.splitlines()
    assert [line.split()[0] for line in lines if not line.startswith(" ")] == [
        *("runs", "champion", "shards", "retrain", "new", "lock", "next")
    ]
    assert "none yet" in shown.stdout and "/shards" in shown.stdout and "+0.100 dB: promoted" in shown.stdout
    assert not (data / "mlflow.db").exists()


def test_an_empty_folder_has_no_runs(tmp_path):
    shown = str(status.status(tmp_path))
    assert "none yet; start one with `sdan train SHARDS`" in shown
    assert registry.default_tracking_uri(tmp_path).endswith("mlflow.db")

"""The line that says how a run computes: at a start, at a resume on another machine, and on the console."""

import json
import time
from types import SimpleNamespace

import pytest
import torch

from pipelines.training import run_log
from pipelines.training.progress import ProgressLine
from pipelines.training.run_folder import LIVE, PROGRESS
from pipelines.training.run_log import RunLog
from sdan.ops.precision import ComputePlan

CPU = torch.device("cpu")


@pytest.fixture
def log(monkeypatch):
    """A RunLog of an MLflow run that only has tags."""
    stored = {}

    class Client:
        def __init__(self, tracking_uri):
            pass

        def get_metric_history(self, run_id, name):
            return []

        def get_run(self, run_id):
            return SimpleNamespace(data=SimpleNamespace(tags=dict(stored)))

        def log_batch(self, run_id, metrics, tags):
            stored.update({tag.key: tag.value for tag in tags})

    monkeypatch.setattr(run_log, "MlflowClient", Client)
    return RunLog("uri", "run"), stored


def test_a_new_run_says_how_it_computes(log):
    written, tags = log
    line = written.environment(2, ComputePlan(CPU, "bf16", "channels_last", tf32=False))
    assert line.startswith("computes in bf16, channels_last, on ") and line.endswith(", workers: 2")
    assert (tags["env.precision"], tags["env.layout"], tags["env.tf32"]) == ("bf16", "channels_last", "off")


def test_a_resumed_run_says_that_the_precision_changed(log):
    written, tags = log
    written.environment(1, ComputePlan(CPU, "bf16", "channels_last", tf32=False))
    line = written.environment(1, ComputePlan(CPU, "fp32", "channels_last", tf32=False))
    assert line.endswith("; it computed in bf16 before") and tags["env.precision"] == "fp32"
    assert "before" not in written.environment(1, ComputePlan(CPU, "fp32", "contiguous", tf32=False))


def shown_while(capsys, change):
    """What ProgressLine shows of a run whose workers start; `change` is called once it has said so."""
    shown = ""
    while "starting the workers" not in shown:
        time.sleep(0.01)
        shown += capsys.readouterr().err
    change()
    return shown


def test_a_log_file_gets_a_line_for_each_change(tmp_path, capsys):
    now = {"time": time.time() - 60, "epoch": 0.0, "epochs": 2, "loss": None, "crops_per_s": None, "left_s": None}
    live = tmp_path / LIVE
    live.write_text(json.dumps(now | {"started": "of an earlier start"}))
    new = now | {"time": time.time() + 1, "started": "computes in fp32"}
    with ProgressLine(tmp_path, 2, enabled=True):
        shown = shown_while(capsys, lambda: live.write_text(json.dumps(new)))
    shown += capsys.readouterr().err
    assert shown == "train: starting the workers\ntrain: computes in fp32\ntrain: epoch 0.0/2\n"


def test_a_resumed_run_says_that_its_workers_start(tmp_path, capsys):
    report = {"time": time.time() - 60, "epoch": 1, "epochs": 2, "val_psnr": 27.1}
    (tmp_path / PROGRESS).write_text(json.dumps(report) + "\n")
    now = {"time": time.time() + 1, "epoch": 1.5, "epochs": 2, "loss": 0.5, "crops_per_s": 2.0, "left_s": 9.0}
    with ProgressLine(tmp_path, 2, enabled=True):
        shown = shown_while(capsys, lambda: (tmp_path / LIVE).write_text(json.dumps(now)))
    lines = (shown + capsys.readouterr().err).splitlines()
    assert lines[0] == "train: epoch 1/2, PSNR 27.10 dB (self), starting the workers"
    assert lines[-1] == "train: epoch 1.5/2, loss 0.5000, PSNR 27.10 dB (self), 2.0 crops/s, 00:09 left"


def test_a_terminal_shows_one_line_that_is_redrawn(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    report = {"time": time.time() + 1, "epoch": 1, "epochs": 2, "val_psnr": 27.1}
    with ProgressLine(tmp_path, 2, enabled=True):
        shown = shown_while(capsys, lambda: (tmp_path / PROGRESS).write_text(json.dumps(report) + "\n"))
    lines = [line for line in (shown + capsys.readouterr().err).replace("\n", "\r").split("\r") if line.strip()]
    assert any(line.startswith("train:   0%|") and line.endswith("| starting the workers") for line in lines)
    assert lines[-1].startswith("train:  50%|") and lines[-1].endswith("| epoch 1/2, PSNR 27.10 dB (self)")

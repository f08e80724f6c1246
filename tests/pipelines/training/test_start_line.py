"""The line that says how a run computes: at a start, at a resume on another machine, and on the console."""

import json
import time
from types import SimpleNamespace

import pytest
import torch

from pipelines.training import run_log
from pipelines.training.progress import ProgressLine
from pipelines.training.run_folder import LIVE
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


def test_the_console_shows_the_line_once(tmp_path, capsys):
    now = {"time": time.time() - 60, "epoch": 0.0, "epochs": 2, "loss": None, "crops_per_s": None, "left_s": None}
    now["started"] = "of an earlier start"
    (tmp_path / LIVE).write_text(json.dumps(now))
    with ProgressLine(tmp_path, 2, enabled=True):
        (tmp_path / LIVE).write_text(json.dumps(now | {"time": time.time() + 1, "started": "computes in fp32"}))
        time.sleep(1.2)  # a terminal's line is redrawn twice a second
    shown = capsys.readouterr().err
    assert shown.count("train: computes in fp32") == 1 and "earlier" not in shown

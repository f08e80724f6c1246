"""What a run writes to MLflow is kept while MLflow does not answer, and written once it does."""

import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from mlflow.entities import Metric
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.tracking import MlflowClient

from pipelines.loader import index_split
from pipelines.training import progress, run_log
from pipelines.training.run_folder import UNSENT
from pipelines.training.run_log import RunLog, deliver
from sdan.ops.precision import ComputePlan


class Server:
    """MLflow's client and its server, which can be dead, silent for a while, or refuse an entry."""

    def __init__(self) -> None:
        self.dead, self.silent_s = False, 0.0
        self.points: list[tuple[str, int, float]] = []
        self.tags: dict[str, str] = {}
        self.pictures: list[int] = []

    def __call__(self, tracking_uri: str) -> "Server":
        return self

    def _answer(self) -> None:
        time.sleep(self.silent_s)
        if self.dead:
            raise MlflowException("API request failed: Connection refused")

    def get_metric_history(self, run_id: str, name: str) -> list[Metric]:
        self._answer()
        return [Metric(found, value, 0, step) for found, step, value in self.points if found == name]

    def log_batch(self, run_id: str, metrics: list, tags: list) -> None:
        self._answer()
        if any(metric.key == "not allowed" for metric in metrics):
            raise MlflowException("a bad name", error_code=INVALID_PARAMETER_VALUE)
        self.points += [(metric.key, metric.step, metric.value) for metric in metrics]
        self.tags |= {tag.key: tag.value for tag in tags}

    def log_image(self, run_id: str, image: np.ndarray, key: str, step: int, synchronous: bool) -> None:
        self._answer()
        self.pictures.append(step)


@pytest.fixture
def server(monkeypatch):
    found = Server()
    monkeypatch.setattr(run_log, "MlflowClient", found)
    monkeypatch.setattr(run_log, "RETRY_S", 0.05)
    return found


def open_log(folder: Path) -> RunLog:
    return RunLog("http://server", "run", folder)


def test_points_are_written_before_training_goes_on(server, tmp_path):
    log = open_log(tmp_path)
    assert log.metrics(1, {"train_loss": 0.5, "val_psnr": float("nan")})
    assert server.points == [("main/train_loss", 1, 0.5)]
    assert not log.metrics(1, {"train_loss": 0.4})
    log.environment(2, ComputePlan(torch.device("cpu"), "fp32", "channels_last", tf32=False))
    assert (server.tags["env.workers"], server.tags["env.precision"]) == ("2", "fp32")
    assert log.close() == 0 and not (tmp_path / UNSENT).exists()


def test_metrics_are_grouped_by_a_path(server, tmp_path):
    log = open_log(tmp_path)
    report = {"train_loss": 0.5, "train_align": 0.1, "val_psnr": 30.0, "val_self_true_psnr": 31.0, "data_wait": 0.0}
    log.metrics(1, report)
    log.close()
    names = ["main/train_loss", "train/align", "main/val_psnr", "val_self/true_psnr", "run/data_wait"]
    assert [name for name, _, _ in server.points] == names
    assert [value for _, _, value in server.points] == list(report.values())


def test_a_dead_server_loses_nothing(server, tmp_path):
    log = open_log(tmp_path)
    log.metrics(1, {"train_loss": 1.0})
    server.dead = True
    for epoch in (2, 3, 4):
        assert log.metrics(epoch, {"train_loss": 1 / epoch})
    log.picture(4, "validation", np.zeros((4, 4, 3), np.uint8))
    kept = [json.loads(line)["step"] for line in (tmp_path / UNSENT).read_text().splitlines()]
    assert kept == [2, 3, 4] and [step for _, step, _ in server.points] == [1]
    server.dead = False
    deadline = time.monotonic() + 20
    while (log.unsent or log.pictures or (tmp_path / UNSENT).exists()) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert [step for _, step, _ in server.points] == [1, 2, 3, 4] and server.pictures == [4]
    assert not (tmp_path / UNSENT).exists()


def test_a_silent_server_does_not_stop_training(server, tmp_path, monkeypatch):
    monkeypatch.setattr(run_log, "PATIENCE_S", 0.1)
    monkeypatch.setattr(run_log, "CLOSING_S", 0.1)
    log = open_log(tmp_path)
    server.silent_s = 3.0
    started = time.monotonic()
    for epoch in range(1, 6):
        log.metrics(epoch, {"train_loss": 1.0})
    assert log.close() == 5
    assert time.monotonic() - started < 2.5
    server.silent_s = 0.0


def test_a_resumed_run_writes_what_the_last_one_kept(server, tmp_path):
    server.points = [("train_loss", 1, 1.0)]  # as a version before this one wrote it
    server.dead = True
    log = open_log(tmp_path)  # it cannot ask which epochs the run has
    for epoch in (1, 2):
        log.metrics(epoch, {"train_loss": 9.0 + epoch})
    log.close()
    server.dead = False
    resumed = open_log(tmp_path)
    assert resumed.last_epoch == 2 and not resumed.metrics(2, {"train_loss": 12.0})
    assert resumed.close() == 0
    assert server.points == [("train_loss", 1, 1.0), ("main/train_loss", 2, 11.0)]  # each epoch keeps its first point


def test_the_driver_delivers_what_the_workers_left(server, tmp_path):
    assert deliver("http://server", "run", tmp_path) == 0
    (tmp_path / UNSENT).write_text(
        '{"step": 3, "time": 0, "metrics": {"main/train_loss": 0.5}}\n[]\n{"step": 4}\n\xff{{{\n'
    )
    assert deliver("http://server", "run", tmp_path) == 0
    assert server.points == [("main/train_loss", 3, 0.5)] and not (tmp_path / UNSENT).exists()


def test_an_entry_that_is_always_refused_blocks_nothing(server, tmp_path):
    log = open_log(tmp_path)
    log.metrics(1, {"not allowed": 1.0})
    log.metrics(2, {"train_loss": 1.0})
    assert log.close() == 0 and server.points == [("main/train_loss", 2, 1.0)]


def test_the_live_line_says_once_that_points_are_kept(tmp_path, capsys):
    line = progress.ProgressLine(tmp_path, 3, enabled=False)
    line._note_mlflow()
    assert capsys.readouterr().err == ""
    for present in (True, True, False, False):
        (tmp_path / UNSENT).write_text("") if present else (tmp_path / UNSENT).unlink(missing_ok=True)
        line._note_mlflow()
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2, said
    assert said[0].startswith("sdan: MLflow does not answer: training goes on, its points are kept in")
    assert said[1] == "sdan: MLflow answers again; it has all points"


def test_two_runs_log_the_same_data_at_the_same_moment(tmp_path, tiny_shards, monkeypatch):
    """MLflow's check and its insert are two steps; here another run inserts between them."""
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client = MlflowClient(uri)
    experiment = client.create_experiment("runs")
    runs = [client.create_run(experiment).info.run_id for _ in range(2)]
    index = index_split(str(tiny_shards), "train")
    log_inputs, calls = MlflowClient.log_inputs, []

    def refused_once(self, run_id, datasets):
        calls.append(run_id)
        if len(calls) == 1:
            log_inputs(self, runs[1], datasets)
            raise MlflowException("(sqlite3.IntegrityError) UNIQUE constraint failed: datasets.name")
        log_inputs(self, run_id, datasets)

    monkeypatch.setattr(MlflowClient, "log_inputs", refused_once)
    run_log.log_data(uri, runs[0], [index])
    for run in runs:
        assert [found.dataset.name for found in client.get_run(run).inputs.dataset_inputs] == ["shards-train"]


def test_data_that_mlflow_refuses_is_an_error(tmp_path, tiny_shards):
    with pytest.raises(MlflowException):
        run_log.log_data(f"sqlite:///{tmp_path}/mlflow.db", "0" * 32, [index_split(str(tiny_shards), "train")])

"""What a run writes to MLflow: metrics, pictures, the machines' load, and which data it used."""

from __future__ import annotations

import json
import logging
import math
import os
import platform
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, RunTag
from mlflow.exceptions import MlflowException
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
from mlflow.tracking import MlflowClient

from pipelines.loader import ShardIndex
from pipelines.registry import limit_requests
from pipelines.training.run_folder import UNSENT
from preprocessing.storage import write_atomically
from sdan import checkpoint
from sdan.ops.precision import ComputePlan

MAIN = "main/"
"""MLflow's page of a run sorts its sections of charts by name, and shows metrics without a path last; so the few that
matter get a path that comes first."""
MAIN_METRICS = ("train_loss", "val_psnr", "learning_rate")
EPOCH_METRICS = (f"{MAIN}train_loss", f"{MAIN}val_psnr", "train_loss", "val_psnr")
"""Every epoch logs at least one of these; they show which epochs a run already has. The last two are of older runs."""
GROUPS = {
    **{prefix: f"{prefix.rstrip('_')}/" for prefix in ("train_", "val_self_", "val_oracle_", "val_bicubic_")},
    **{name: f"run/{name}" for name in ("crops_per_s", "data_wait", "skipped_steps", "workers")},
}
"""Start of a metric's name -> what replaces it in MLflow, whose pages show a section of charts per path."""
RETRY_S = 15.0
"""How often to try again while MLflow does not take what it is sent."""
PATIENCE_S = 5.0
"""How long training waits for MLflow after an epoch; if MLflow did not answer the last time, it does not wait."""
CLOSING_S = 20.0
"""How long the end of training waits for MLflow."""
PICTURES = 8
"""How many unsent pictures are kept; older ones are dropped."""


class RunLog:
    """Writes to one existing MLflow run, in a thread: an MLflow that does not answer never stops training.

    Points and tags that MLflow does not take are kept, in order, in memory and in unsent.jsonl of the run's folder, and
    sent again every RETRY_S, at the end, and by a resumed run.

    An epoch that the run already has is not written again. After a kill, the epochs since the last checkpoint are
    trained a second time (with bit-identical results on one worker), and each keeps its first point.
    """

    def __init__(self, tracking_uri: str, run_id: str, folder: Path | None = None) -> None:
        """Args:
        folder: the run's folder; None, or a folder that this machine does not have: unsent points are only in memory.
        """
        limit_requests()
        self.tracking_uri, self.run_id = tracking_uri, run_id
        self.unsent_file = folder / UNSENT if folder is not None and folder.is_dir() else None
        self.unsent: deque[dict[str, Any]] = deque(_read_unsent(self.unsent_file))
        self.pictures: deque[tuple[int, str, np.ndarray]] = deque(maxlen=PICTURES)
        self.written_epoch: int | None = None  # the last epoch in MLflow; None until it has answered
        self.failing = self.closing = False
        self.wake, self.idle = threading.Event(), threading.Event()
        self.lock = threading.Lock()
        self._send()
        self.thread = threading.Thread(target=self._follow, name="RunLog", daemon=True)
        self.thread.start()

    @property
    def last_epoch(self) -> int:
        """The last epoch that the run has, in MLflow or among the unsent points; -1 before the first."""
        waiting = [entry["step"] for entry in self.unsent if "step" in entry]
        return max([-1 if self.written_epoch is None else self.written_epoch, *waiting])

    def metrics(self, epoch: int, values: Mapping[str, float]) -> bool:
        """Log one point per finite value at step `epoch`, under its name of `charted`.

        Returns False if the run already has that epoch.
        """
        with self.lock:
            if epoch <= self.last_epoch:
                return False
            points = {name: float(value) for name, value in charted(values).items() if math.isfinite(value)}
            self.unsent.append({"step": epoch, "time": int(time.time() * 1000), "metrics": points})
        self._wait()
        return True

    def picture(self, epoch: int, name: str, image: np.ndarray) -> None:
        """Log a uint8 [H, W, 3] picture at step `epoch`; MLflow shows a slider over the epochs."""
        self.pictures.append((epoch, name, image))
        self._wait()

    def environment(self, workers: int, plan: ComputePlan) -> str:
        """Tag the run with where and how it computes now (a resumed run may be on another machine).

        Returns:
            one line that says so, and in which precision the run computed before if that was another.
        """
        before = self._stored_tag("env.precision")
        how = {"precision": plan.precision, "layout": plan.layout, "tf32": "on" if plan.tf32 else "off"}
        now = environment(workers, plan.device)
        with self.lock:
            self.unsent.append({"tags": {f"env.{name}": value for name, value in (now | how).items()}})
        self._wait()
        changed = f"; it computed in {before} before" if before not in (None, plan.precision) else ""
        return f"computes in {plan}, on {now['device']}, workers: {workers}{changed}"

    def _stored_tag(self, name: str) -> str | None:
        """A tag of the MLflow run; None if it has none, or if MLflow does not answer."""
        if self.failing:
            return None  # asking again would delay the training
        try:
            tag: str | None = MlflowClient(tracking_uri=self.tracking_uri).get_run(self.run_id).data.tags.get(name)
        except Exception:  # errors of MLflow and of its stores have no common base class
            return None
        return tag

    def close(self) -> int:
        """Send what is left, for at most CLOSING_S; returns how many points and tags are still unsent."""
        self.closing = True
        self.wake.set()
        self.thread.join(CLOSING_S)
        return len(self.unsent)

    def _wait(self) -> None:
        """Start sending, and wait until all is sent, an attempt fails, or PATIENCE_S are over."""
        self.idle.clear()
        self.wake.set()
        if self.failing or not self.idle.wait(PATIENCE_S):
            self.failing = True
            self._store()

    def _follow(self) -> None:
        closing = False
        while not closing:
            closing = self.closing  # what was logged before `close` is sent once more after it
            if not closing:
                self.wake.wait(RETRY_S if self.unsent or self.pictures else None)
                self.wake.clear()
            self._send()
            self.idle.set()

    def _send(self) -> None:
        """Send what is unsent, oldest first, until MLflow refuses an entry."""
        try:
            client = MlflowClient(tracking_uri=self.tracking_uri)
            if self.written_epoch is None:
                histories = [client.get_metric_history(self.run_id, name) for name in EPOCH_METRICS]
                self.written_epoch = max((point.step for history in histories for point in history), default=-1)
            while self.unsent:
                self._send_entry(client, self.unsent[0], self.written_epoch)
                with self.lock:
                    self.written_epoch = max(self.written_epoch, self.unsent.popleft().get("step", -1))
            while self.pictures:
                epoch, name, image = self.pictures[0]
                client.log_image(self.run_id, image, key=name, step=epoch, synchronous=True)
                self.pictures.popleft()
            self.failing = False
        except Exception as error:  # errors of MLflow and of its stores have no common base class
            self.failing = True
            logging.getLogger(__name__).warning("MLflow: writing failed, %d left: %s", len(self.unsent), error)
        self._store()

    def _send_entry(self, client: MlflowClient, entry: dict[str, Any], written_epoch: int) -> None:
        if entry.get("step", written_epoch + 1) <= written_epoch:
            return  # written while an earlier process of this run could not ask
        points = [Metric(name, value, entry["time"], entry["step"]) for name, value in entry.get("metrics", {}).items()]
        tags = [RunTag(name, value) for name, value in entry.get("tags", {}).items()]
        try:
            client.log_batch(self.run_id, metrics=points, tags=tags)
        except MlflowException as error:
            if error.error_code != "INVALID_PARAMETER_VALUE":
                raise
            logging.getLogger(__name__).warning("MLflow: refused %s: %s", entry, error)  # it would refuse it again

    def _store(self) -> None:
        """Write unsent.jsonl; without entries, remove it."""
        if self.unsent_file is None:
            return
        try:
            with self.lock:
                if self.unsent:
                    write_atomically(self.unsent_file, "".join(json.dumps(entry) + "\n" for entry in self.unsent))
                else:
                    self.unsent_file.unlink(missing_ok=True)
        except OSError as error:  # a full disk must not stop training; memory has the entries
            logging.getLogger(__name__).warning("%s: not written: %s", self.unsent_file, error)


def deliver(tracking_uri: str, run_id: str, folder: Path) -> int:
    """Send what a run's workers have left in unsent.jsonl; returns how many entries are still unsent."""
    if not (folder / UNSENT).exists():
        return 0
    return RunLog(tracking_uri, run_id, folder).close()


def log_gains(tracking_uri: str, run_id: str, gains: Mapping[str, float], epoch: int) -> None:
    """Log a finished run's best score and gains (verdict.Verdict.gains), under MAIN, at the best epoch."""
    now = int(time.time() * 1000)
    points = [Metric(MAIN + name, value, now, epoch) for name, value in gains.items()]
    MlflowClient(tracking_uri=tracking_uri).log_batch(run_id, metrics=points)


def _read_unsent(path: Path | None) -> list[dict[str, Any]]:
    """The entries of unsent.jsonl; lines that are damaged are left out."""
    found = []
    for line in path.read_bytes().splitlines() if path is not None and path.is_file() else ():
        try:
            entry = json.loads(line)
            known: dict[str, Any] = {"tags": {str(name): str(value) for name, value in entry.get("tags", {}).items()}}
            if "step" in entry:
                points = {str(name): float(value) for name, value in entry["metrics"].items()}
                known |= {"step": int(entry["step"]), "time": int(entry["time"]), "metrics": points}
            found.append(known)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            logging.getLogger(__name__).warning("%s: expected points of a run, got %s; left out", path, error)
    return found


def grouped(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics of a report by their names in a sweep (GROUPS), e.g. val_self/true_psnr; MAIN_METRICS keep theirs."""

    def renamed(name: str) -> str:
        start = next((start for start in GROUPS if name.startswith(start)), "")
        return name if not start or name in MAIN_METRICS else GROUPS[start] + name.removeprefix(start)

    return {renamed(name): value for name, value in metrics.items()}


def charted(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics of a report by their names in a run of MLflow: as `grouped`, and MAIN_METRICS under MAIN."""
    return {MAIN + name if name in MAIN_METRICS else name: value for name, value in grouped(metrics).items()}


def environment(workers: int, device: torch.device) -> dict[str, str]:
    """Versions, commit and hardware of this machine."""
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU"
    return {
        "commit": checkpoint.code_commit() or "unknown",
        "python": platform.python_version(),
        **checkpoint.package_versions(),
        "workers": str(workers),
        "device": hardware,
        "cpus": str(os.cpu_count()),
        "platform": platform.platform(),
    }


class _LastingMonitor(SystemMetricsMonitor):
    """Goes on when MLflow answers again; MLflow's own monitor ends at the first request that fails."""

    def monitor(self) -> None:
        while not self._shutdown_event.is_set():
            super().monitor()
            self._shutdown_event.wait(RETRY_S)


@contextmanager
def machine_metrics(tracking_uri: str, run_id: str, node: int) -> Iterator[None]:
    """Log this machine's CPU, memory, disk, network and GPU load as system/* metrics of the run, every 10 s.

    Args:
        node: the machine's number in the run; machines after the first are logged as system/node_N/*.
    """
    limit_requests()
    monitor = _LastingMonitor(
        run_id, resume_logging=True, node_id=f"node_{node}" if node else None, tracking_uri=tracking_uri
    )
    monitor.start()
    try:
        yield
    finally:
        monitor.finish()


def log_data(tracking_uri: str, run_id: str, indices: Sequence[ShardIndex]) -> None:
    """Log the splits that a run uses as MLflow dataset inputs: location, digest and size."""
    inputs = []
    for index in indices:
        profile = {"pairs": len(index.paths), "tiles": index.num_tiles, "tile_px": index.info.tile_px}
        data = Dataset(
            name=f"shards-{index.split}",
            digest=index.digest,
            source_type="local" if "://" not in index.shards else index.shards.partition("://")[0],
            source=json.dumps({"uri": index.shards}),
            schema=json.dumps({"scale": index.info.scale, **index.info.options}, default=str),
            profile=json.dumps(profile),
        )
        inputs.append(DatasetInput(data, [InputTag("mlflow.data.context", index.split)]))
    client = MlflowClient(tracking_uri=tracking_uri)
    for attempts_left in (2, 1, 0):
        try:
            client.log_inputs(run_id, inputs)
            return
        except MlflowException:
            # MLflow looks for a dataset and then inserts it. If another run inserts the same one meanwhile, the
            # database refuses the second; a moment later MLflow finds the first.
            if not attempts_left:
                raise
            time.sleep(0.2)

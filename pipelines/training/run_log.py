"""What a run writes to MLflow: metrics, pictures, the machines' load, and which data it used."""

from __future__ import annotations

import json
import logging
import math
import os
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
from mlflow.tracking import MlflowClient

from pipelines.loader import ShardIndex
from sdan import checkpoint
from sdan.ops.precision import ComputePlan

EPOCH_METRICS = ("train_loss", "val_psnr")
"""Every epoch logs at least one of these; they show which epochs a run already has."""


class RunLog:
    """Writes to one existing MLflow run; a failed write is logged and never stops training.

    An epoch that the run already has is not written again. After a kill, the epochs since the last checkpoint are
    trained a second time (with bit-identical results on one worker), and each keeps its first point.
    """

    def __init__(self, tracking_uri: str, run_id: str) -> None:
        self.client = MlflowClient(tracking_uri=tracking_uri)
        self.run_id = run_id
        histories = [self.client.get_metric_history(run_id, name) for name in EPOCH_METRICS]
        self.last_epoch = max((point.step for history in histories for point in history), default=-1)

    def metrics(self, epoch: int, values: Mapping[str, float]) -> bool:
        """Log one point per finite value at step `epoch`; returns False if the run already has that epoch."""
        if epoch <= self.last_epoch:
            return False
        now = int(time.time() * 1000)
        points = [Metric(name, float(value), now, epoch) for name, value in values.items() if math.isfinite(value)]
        try:
            self.client.log_batch(self.run_id, metrics=points)
        except Exception as error:  # errors of MLflow and of its stores have no common base class
            logging.getLogger(__name__).warning("MLflow: writing the metrics of epoch %d failed: %s", epoch, error)
        return True

    def picture(self, epoch: int, name: str, image: np.ndarray) -> None:
        """Log a uint8 [H, W, 3] picture at step `epoch`; MLflow shows a slider over the epochs."""
        try:
            self.client.log_image(self.run_id, image, key=name, step=epoch, synchronous=True)
        except Exception as error:
            logging.getLogger(__name__).warning("MLflow: writing the picture of epoch %d failed: %s", epoch, error)

    def environment(self, workers: int, plan: ComputePlan) -> str:
        """Tag the run with where and how it computes now (a resumed run may be on another machine).

        Returns:
            one line that says so, and in which precision the run computed before if that was another.
        """
        before = self.client.get_run(self.run_id).data.tags.get("env.precision")
        now = environment(workers, plan.device)
        how = {"precision": plan.precision, "layout": plan.layout, "tf32": "on" if plan.tf32 else "off"}
        for name, value in (now | how).items():
            self.client.set_tag(self.run_id, f"env.{name}", value)
        changed = f"; it computed in {before} before" if before not in (None, plan.precision) else ""
        return f"computes in {plan}, on {now['device']}, workers: {workers}{changed}"


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


@contextmanager
def machine_metrics(tracking_uri: str, run_id: str, node: int) -> Iterator[None]:
    """Log this machine's CPU, memory, disk, network and GPU load as system/* metrics of the run, every 10 s.

    Args:
        node: the machine's number in the run; machines after the first are logged as system/node_N/*.
    """
    monitor = SystemMetricsMonitor(
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
    MlflowClient(tracking_uri=tracking_uri).log_inputs(run_id, inputs)

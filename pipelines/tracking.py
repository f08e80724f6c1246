"""What a run writes to MLflow while it trains: metrics and pictures, through an explicit client."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping

import numpy as np
from mlflow.entities import Metric
from mlflow.tracking import MlflowClient


class RunLog:
    """Writes into one existing MLflow run; a failure to write is logged and never stops training."""

    def __init__(self, tracking_uri: str, run_id: str) -> None:
        self.client = MlflowClient(tracking_uri=tracking_uri)
        self.run_id = run_id

    def metrics(self, epoch: int, values: Mapping[str, float]) -> None:
        """One point of every (finite) value, at step `epoch`."""
        now = int(time.time() * 1000)
        points = [Metric(name, float(value), now, epoch) for name, value in values.items() if math.isfinite(value)]
        try:
            self.client.log_batch(self.run_id, metrics=points)
        except Exception as error:  # MLflow's own errors and its stores' have no common base
            logging.getLogger(__name__).warning("MLflow did not take epoch %d's metrics: %s", epoch, error)

    def picture(self, epoch: int, name: str, image: np.ndarray) -> None:
        """An uint8 [H, W, 3] picture at step `epoch`; MLflow shows them through time."""
        try:
            self.client.log_image(self.run_id, image, key=name, step=epoch, synchronous=True)
        except Exception as error:
            logging.getLogger(__name__).warning("MLflow did not take epoch %d's picture: %s", epoch, error)

"""Averages over an epoch, and live.json: the run's position every few seconds."""

from __future__ import annotations

import json
import time
from pathlib import Path

import torch
from torch import Tensor

from pipelines.training.run_folder import LIVE
from pipelines.training.step import NotFiniteError, not_finite
from preprocessing.storage import write_atomically

LIVE_EVERY_S = 2.0


class EpochMeter:
    """Mean loss terms over an epoch's steps, crops per second, and the share of time spent waiting for data.

    Skipped steps are counted, but their terms do not enter the means.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self.sums: Tensor | None = None
        """[len(names)], on the device."""
        self.steps = 0
        self.waited_s = 0.0
        self.started = time.perf_counter()

    def add(self, terms: dict[str, Tensor], waited_s: float) -> None:
        """Add one step's terms (step.train_step); they stay on the device."""
        self.names = list(terms)
        values = torch.stack(list(terms.values()))  # on a GPU, each operation costs the same for one term or for all
        # A gradient norm is also infinite when fp16's GradScaler tries a scale that is too large.
        kept = torch.where((terms["skipped"] > 0) | ~values.isfinite(), 0.0, values)
        kept[self.names.index("skipped")] = terms["skipped"]
        self.sums = kept if self.sums is None else self.sums + kept
        self.steps += 1
        self.waited_s += waited_s

    @property
    def loss(self) -> float | None:
        """The mean loss so far; None before the first step or if every step was skipped. Waits for the device."""
        sums = self._sums()
        used = self.steps - sums["skipped"]
        return sums["loss"] / used if used else None

    def _sums(self) -> dict[str, float]:
        """Name -> sum over the steps that were not skipped; `skipped`: how many were. Waits for the device."""
        if self.sums is None:
            return {"skipped": 0.0}
        return dict(zip(self.names, self.sums.tolist(), strict=True))

    def crops_per_s(self, crops_per_step: int) -> float:
        return self.steps * crops_per_step / (time.perf_counter() - self.started)

    def means(self, crops_per_step: int) -> dict[str, float]:
        """The epoch's metrics.

        Raises:
            NotFiniteError: every step was skipped.
        """
        sums = self._sums()
        skipped = sums.pop("skipped")
        if skipped == self.steps:
            raise NotFiniteError(not_finite(f"all {self.steps} steps of an epoch"))
        elapsed = time.perf_counter() - self.started
        means = {f"train_{name}": value / (self.steps - skipped) for name, value in sums.items()}
        return means | {
            "skipped_steps": skipped,
            "crops_per_s": self.crops_per_s(crops_per_step),
            "data_wait": self.waited_s / elapsed,
        }


class LiveFile:
    """Writes live.json to the run's folder: epoch, loss, crops/s, seconds left, time, and how the run computes. Does
    nothing if the folder is on another machine."""

    def __init__(self, folder: Path, epochs: int, crops_per_epoch: int, started: str = "") -> None:
        """Nothing is written yet.

        Args:
            started: one line that says how the run computes (RunLog.environment).
        """
        self.path = folder / LIVE if folder.is_dir() else None
        self.epochs, self.crops_per_epoch, self.started = epochs, crops_per_epoch, started
        self.written = 0.0

    def update(self, crops: int, meter: EpochMeter, crops_per_step: int) -> None:
        """Write the file if the last write is LIVE_EVERY_S ago.

        Args:
            crops: the position in the stream of crops.
            meter: of this epoch; before its first step, loss, crops/s and time left are unknown (null).
        """
        if self.path is None or time.monotonic() < self.written + LIVE_EVERY_S:
            return
        self.written = time.monotonic()
        rate = meter.crops_per_s(crops_per_step) if meter.steps else None
        now = {
            "time": time.time(),
            "epoch": min(self.epochs, crops / self.crops_per_epoch),
            "epochs": self.epochs,
            "loss": meter.loss,
            "crops_per_s": rate,
            "left_s": max(0.0, self.epochs * self.crops_per_epoch - crops) / rate if rate else None,
            "started": self.started,
        }
        write_atomically(self.path, json.dumps(now))

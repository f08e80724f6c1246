"""Averages over an epoch, the time left, and live.json: the run's position every few seconds."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import torch
from torch import Tensor

from pipelines.monitoring import published
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

    @property
    def data_wait(self) -> float:
        """Share of the time so far that was spent waiting for crops, 0 to 1."""
        return self.waited_s / (time.perf_counter() - self.started)

    def means(self, crops_per_step: int) -> dict[str, float]:
        """The epoch's metrics.

        Raises:
            NotFiniteError: every step was skipped.
        """
        sums = self._sums()
        skipped = sums.pop("skipped")
        if skipped == self.steps:
            raise NotFiniteError(not_finite(f"all {self.steps} steps of an epoch"))
        means = {f"train_{name}": value / (self.steps - skipped) for name, value in sums.items()}
        return means | {
            "skipped_steps": skipped,
            "crops_per_s": self.crops_per_s(crops_per_step),
            "data_wait": self.data_wait,
        }


class TimeLeft:
    """Predicts the rest of a run: its crops at the mean rate since this start, and its validations.

    The first step is left out of the rate: it waits for the first batch, and may compile the network.
    """

    def __init__(self, epochs: int, crops_per_epoch: int, validate_every: int) -> None:
        self.epochs, self.crops_per_epoch, self.validate_every = epochs, crops_per_epoch, validate_every
        self.first: tuple[float, int] | None = None
        """Clock, seconds, and position after the first step."""
        self.paused_s = 0.0
        """Time of the validations since then."""
        self.validation_s = 0.0
        """Time of the newest validation; 0 before the first."""

    def step(self, crops: int, clock: float) -> None:
        """A step has ended at this position in the stream of crops."""
        if self.first is None:
            self.first = (clock, crops)

    def validated(self, seconds: float) -> None:
        """A validation has ended; training stood still for this long."""
        self.validation_s = seconds
        if self.first is not None:
            self.paused_s += seconds

    def left_s(self, crops: int, clock: float) -> float | None:
        """Seconds until the run's end; None before its second step."""
        if self.first is None or crops <= self.first[1]:
            return None
        per_crop = (clock - self.first[0] - self.paused_s) / (crops - self.first[1])
        ended = min(self.epochs, crops // self.crops_per_epoch)
        validations = math.ceil(self.epochs / self.validate_every) - ended // self.validate_every
        return max(0, self.epochs * self.crops_per_epoch - crops) * per_crop + validations * self.validation_s


class LiveFile:
    """Writes live.json to the run's folder: epoch, stage, loss, crops/s, seconds left, time, and how the run computes.

    Also publishes the rate for Prometheus. Without the folder, which may be on another machine, it does only that.
    """

    def __init__(
        self, folder: Path, epochs: int, crops_per_epoch: int, validate_every: int = 1, started: str = ""
    ) -> None:
        """Nothing is written yet.

        Args:
            started: one line that says how the run computes (RunLog.environment).
        """
        self.path = folder / LIVE if folder.is_dir() else None
        self.run = folder.name
        self.epochs, self.crops_per_epoch, self.started = epochs, crops_per_epoch, started
        self.time_left = TimeLeft(epochs, crops_per_epoch, validate_every)
        self.written = 0.0

    def stage(self, crops: int, stage: str) -> None:
        """Write now what the run does instead of steps, e.g. "validating"; the next `update` replaces it at once."""
        self.written = 0.0
        self._write(crops, {"stage": stage, "loss": None, "crops_per_s": None, "left_s": None})

    def update(self, crops: int, meter: EpochMeter, crops_per_step: int) -> None:
        """Call it after each step; writes the file if the last write is LIVE_EVERY_S ago.

        Args:
            crops: the position in the stream of crops.
            meter: of this epoch.
        """
        clock = time.monotonic()
        self.time_left.step(crops, clock)
        if clock < self.written + LIVE_EVERY_S:
            return
        self.written = clock
        rate, left_s = meter.crops_per_s(crops_per_step), self.time_left.left_s(crops, clock)
        published.gauge("sdan_train_crops_per_second", rate, run=self.run)
        published.gauge("sdan_train_data_wait", meter.data_wait, run=self.run)
        if self.path is not None:
            self._write(crops, {"loss": meter.loss, "crops_per_s": rate, "left_s": left_s})

    def _write(self, crops: int, values: dict[str, float | str | None]) -> None:
        if self.path is None:
            return
        epoch = min(self.epochs, crops / self.crops_per_epoch)
        now = {"time": time.time(), "epoch": epoch, "epochs": self.epochs, "started": self.started}
        write_atomically(self.path, json.dumps(now | values))

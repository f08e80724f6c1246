"""A run's progress as one line of text: live on the driver, and for `sdan status` from the run's folder.

Two files of the folder feed it: progress.jsonl, written here by Ray Train's controller after each checkpoint, and
live.json, written by rank 0 every few seconds (meter.LiveFile).
"""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

from ray.train import UserCallback
from tqdm import tqdm

from pipelines.training.run_folder import PROGRESS, UNSENT, last_report, live

SELECT_BY = "val_psnr"
"""The metric that selects the best checkpoint: PSNR by the self protocol (what a user gets) against the aligned target
(which real data has, too), or against the raw target if no crop could be aligned."""


class ProgressFile(UserCallback):
    """Appends every report to progress.jsonl; runs in Ray Train's controller, on the driver's machine."""

    def __init__(self, folder: Path) -> None:
        self.path = str((folder / PROGRESS).resolve())

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        with Path(self.path).open("a") as file:
            file.write(json.dumps({"time": time.time()} | metrics[0]) + "\n")


def describe(now: dict[str, Any], report: dict[str, Any]) -> str:
    """E.g. "epoch 3.4/20, loss 0.0123, PSNR 27.10 dB (self), 12.3 crops/s, 1:02 left"; unknown parts are left out.

    While the run does not train it says what it does instead, e.g. "epoch 2.0/20, validating".

    Args:
        now: live.json (run_folder.live).
        report: the newest line of progress.jsonl (run_folder.last_report).
    """
    newest = max(now, report, key=lambda known: known.get("time", 0.0))
    if not newest:
        return "starting the workers"
    parts = [f"epoch {newest['epoch']:.{1 if newest is now else 0}f}/{newest['epochs']}"]
    loss = newest.get("loss", newest.get("train_loss"))
    if loss is not None:
        parts.append(f"loss {loss:.4f}")
    if SELECT_BY in report:
        parts.append(f"PSNR {report[SELECT_BY]:.2f} dB (self)")
    rate = newest.get("crops_per_s")
    if rate is not None:
        parts.append(f"{rate:.1f} crops/s")
    if newest is now and now.get("stage"):
        parts.append(now["stage"])
    if newest is now and now["left_s"] is not None:
        parts.append(f"{tqdm.format_interval(now['left_s'])} left")
    return ", ".join(parts)


class ProgressLine:
    """The state of a run on stderr, by a thread: epoch, loss, PSNR, crops/s and time left.

    In a terminal it is one line, which is redrawn; in a file a line for each change. A line above it says how the run
    computes, after each start of the workers that changes it.
    """

    def __init__(self, folder: Path, epochs: int, *, enabled: bool) -> None:
        self.folder, self.epochs, self.enabled = folder, epochs, enabled
        self.began = time.time()
        self.said = self.shown = ""
        self.noted: set[str] = set()
        self.mlflow_answers = True
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> None:
        if self.enabled:
            self.thread.start()

    def __exit__(self, *exception: object) -> None:
        self.stopped.set()
        if self.enabled:
            self.thread.join()

    def _follow(self) -> None:
        # A log file keeps every line, so fewer are written there, and none twice.
        terminal = sys.stderr.isatty()
        layout = "train: {percentage:3.0f}%|{bar:20}| {desc}"
        bar = tqdm(total=self.epochs, bar_format=layout, file=sys.stderr, mininterval=0, disable=not terminal)
        with bar:
            self._show(bar)
            while not self.stopped.wait(0.5 if terminal else 10.0):
                self._show(bar)
            self._show(bar)

    def _note_mlflow(self) -> None:
        """Say once that MLflow does not take the run's points (RunLog keeps them in a file), and once that it does."""
        answers = not (self.folder / UNSENT).exists()
        if answers != self.mlflow_answers:
            self.mlflow_answers = answers
            line = (
                "MLflow answers again; it has all points"
                if answers
                else "MLflow does not answer: training goes on, its points are kept in "
                f"{self.folder / UNSENT} and written when it is back"
            )
            tqdm.write(f"sdan: {line}", file=sys.stderr)

    def _note(self, line: str) -> None:
        if line not in self.noted:
            self.noted.add(line)
            tqdm.write(f"sdan: {line}", file=sys.stderr)

    def _show(self, bar: Any) -> None:
        self._note_mlflow()
        report, now = last_report(self.folder, self._note), live(self.folder, self._note)
        if now.get("time", 0.0) < self.began:
            now = {}  # written before this --resume
        if now.get("started", self.said) != self.said:
            self.said = now["started"]
            bar.write(f"train: {self.said}", file=sys.stderr)
        state = describe(now, report)
        if report and not now and report.get("time", 0.0) < self.began:
            state += ", starting the workers"  # of a resumed run
        if bar.disable and state != self.shown:
            print(f"train: {state}", file=sys.stderr, flush=True)
        self.shown = state
        bar.n = min(self.epochs, max(now.get("epoch", 0.0), report.get("epoch", 0.0)))
        bar.desc = state
        bar.refresh()

"""How far a run is, for people: the live line on the driver, and the same from the run's folder (`sdan status`).

Two files feed it: `progress.jsonl`, a line a validation, written by Ray Train's controller once the checkpoint is
safe; and `live.json` (meter.LiveFile), written by rank 0 every few seconds where it shares the folder.
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

from pipelines.training.meter import LIVE

PROGRESS = "progress.jsonl"
SCORE = "val_psnr"


class ProgressFile(UserCallback):
    """Runs in Ray Train's controller, on the driver's machine: appends every report to a file that the bar reads."""

    def __init__(self, path: Path) -> None:
        self.path = str(path.resolve())

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        with Path(self.path).open("a") as file:
            file.write(json.dumps({"time": time.time()} | metrics[0]) + "\n")


def last_report(folder: Path) -> dict[str, Any]:
    """The run's newest validation; {} before the first."""
    path = folder / PROGRESS
    lines = path.read_text().splitlines() if path.exists() else []
    return dict(json.loads(lines[-1])) if lines else {}


def live(folder: Path) -> dict[str, Any]:
    """What rank 0 wrote last; {} where it has not, or does not share this folder."""
    path = folder / LIVE
    return dict(json.loads(path.read_text())) if path.exists() else {}


def describe(now: dict[str, Any], report: dict[str, Any]) -> str:
    """epoch 3.4/20, loss 0.0123, PSNR 27.10 dB (self), 12.3 crops/s, 1:02 left - what of it is known."""
    newest = max(now, report, key=lambda known: known.get("time", 0.0))
    if not newest:
        return "starting"
    parts = [f"epoch {newest['epoch']:.{1 if newest is now else 0}f}/{newest['epochs']}"]
    loss = newest.get("loss", newest.get("train_loss"))
    if loss is not None:
        parts.append(f"loss {loss:.4f}")
    if SCORE in report:
        parts.append(f"PSNR {report[SCORE]:.2f} dB (self)")
    rate = newest.get("crops_per_s")
    if rate is not None:
        parts.append(f"{rate:.1f} crops/s")
    if newest is now:
        parts.append(f"{tqdm.format_interval(now['left_s'])} left")
    return ", ".join(parts)


class ProgressLine:
    """One live line on stderr: epoch, loss, PSNR, crops/s, time left."""

    def __init__(self, folder: Path, epochs: int, *, enabled: bool) -> None:
        self.folder, self.epochs, self.enabled = folder, epochs, enabled
        self.began = time.time()
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
        # A file that is not a terminal keeps every state of the line: fewer of them there.
        pause_s = 0.5 if sys.stderr.isatty() else 10.0
        layout = "{desc}: {percentage:3.0f}%|{bar:20}| {postfix}"
        with tqdm(total=self.epochs, desc="train", bar_format=layout, file=sys.stderr, mininterval=0) as bar:
            while True:
                last = self.stopped.wait(pause_s)
                self._show(bar)
                if last:
                    return

    def _show(self, bar: Any) -> None:
        report, now = last_report(self.folder), live(self.folder)
        if now.get("time", 0.0) < self.began:
            now = {}  # of the attempt before a --resume
        bar.n = min(self.epochs, max(now.get("epoch", 0.0), report.get("epoch", 0.0)))
        bar.postfix = describe(now, report)
        bar.refresh()

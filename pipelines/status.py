"""`sdan status`: the runs, the champion, the shards and the last retraining on one screen."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mlflow.tracking import MlflowClient
from tqdm import tqdm

from pipelines import registry
from pipelines.training import progress

MOST_RUNS = 8
SILENT_S = 120.0
"""A run that has written nothing for so long is thought to have stopped; steps and validations take less."""
RETRAIN = "retrain.json"


@dataclass(frozen=True)
class RunStatus:
    """One run's state."""

    name: str
    state: Literal["finished", "running", "stopped"]
    detail: str
    shards: str
    started: float
    """Seconds since 1970 of the newest start."""


@dataclass(frozen=True)
class Status:
    """What `sdan status` shows."""

    runs: tuple[RunStatus, ...]
    """Newest first."""
    champion: str
    retrain: str

    def __str__(self) -> str:
        width = max((len(run.name) for run in self.runs), default=0)
        shown = [f"{run.name:{width}}  {run.state:8}  {run.detail}" for run in self.runs[:MOST_RUNS]]
        if len(self.runs) > MOST_RUNS:
            shown.append(f"and {len(self.runs) - MOST_RUNS} older ones")
        blocks = {
            "runs": shown or ["none yet; start one with `sdan train SHARDS`"],
            "champion": [self.champion],
            "shards": list(dict.fromkeys(run.shards for run in self.runs)) or ["no run has seen any"],
            "retrain": [self.retrain],
        }
        lines = []
        for title, block in blocks.items():
            lines += [f"{title if number == 0 else '':10}{line}" for number, line in enumerate(block)]
        return "\n".join(lines)


def status(data: Path) -> Status:
    """Read the data folder and the registry; starts nothing and writes nothing."""
    found = sorted((data / "runs").glob("*/run.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    runs = tuple(_run(path.parent) for path in found)
    return Status(runs, _champion(registry.default_tracking_uri(data)), _retrain(data / RETRAIN))


def note_retrain(data: Path, reason: str) -> None:
    """Keep what a retraining did."""
    data.mkdir(parents=True, exist_ok=True)
    (data / RETRAIN).write_text(json.dumps({"time": time.time(), "reason": reason}))


def _run(folder: Path) -> RunStatus:
    stored: dict[str, Any] = json.loads((folder / "run.json").read_text())
    report, now = progress.last_report(folder), progress.live(folder)
    started = (folder / "run.json").stat().st_mtime
    state: Literal["finished", "running", "stopped"]
    if (folder / "model").exists():
        state, detail = "finished", progress.describe({}, report)
    else:
        silent_s = time.time() - max(started, now.get("time", 0.0), report.get("time", 0.0))
        state = "running" if silent_s < SILENT_S else "stopped"
        detail = progress.describe(now, report)
        if state == "stopped":
            detail += (
                f"; silent for {tqdm.format_interval(silent_s)}: "
                f"`sdan train {stored['shards']} --resume --name {folder.name}` goes on"
            )
    return RunStatus(folder.name, state, detail, stored["shards"], started)


def _champion(uri: str) -> str:
    champion = registry.get_champion(uri)
    if champion is None:
        return "none yet"
    run = MlflowClient(tracking_uri=uri).get_run(str(champion.run_id))
    score = run.data.metrics.get(progress.SCORE)
    shown = "" if score is None else f", last PSNR {score:.2f} dB (self)"
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(champion.creation_timestamp / 1000))
    return f"version {champion.version} of {registry.MODEL}, from run {run.info.run_name}, {when}{shown}"


def _retrain(path: Path) -> str:
    if not path.exists():
        return "none yet"
    noted = json.loads(path.read_text())
    return f"{time.strftime('%Y-%m-%d %H:%M', time.localtime(noted['time']))}: {noted['reason']}"

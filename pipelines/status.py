"""`sdan status`: runs, sweeps, champion, shards and the last retraining on one screen."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field
from tqdm import tqdm
from typing_extensions import TypedDict

from pipelines import registry
from pipelines.registered.description import SHOWN_SCORES
from pipelines.sweeping.state import SweepStatus, sweeps
from pipelines.training import progress, run_folder
from preprocessing.shard_folder.small_json import SmallJsonError, read_json
from preprocessing.storage import write_atomically

MOST_RUNS = 8
SILENT_S = 120.0
"""A run that has written nothing for this long counts as stopped; steps and validations take less."""
RETRAIN = "retrain.json"


@dataclass(frozen=True)
class RunStatus:
    """One run's state."""

    name: str
    state: Literal["finished", "running", "stopped", "damaged"]
    detail: str
    shards: str
    """Empty for a damaged run."""
    notes: tuple[str, ...] = ()
    """One line for each damaged file that was ignored."""


@dataclass(frozen=True)
class Status:
    """What `sdan status` shows."""

    runs: tuple[RunStatus, ...]
    """Newest first."""
    champion: str
    retrain: str
    sweeps: tuple[SweepStatus, ...] = ()
    """Newest first."""

    def __str__(self) -> str:
        width = max((len(run.name) for run in self.runs), default=0)
        shown = []
        for run in self.runs[:MOST_RUNS]:
            shown += [f"{run.name:{width}}  {run.state:8}  {run.detail}", *run.notes]
        if len(self.runs) > MOST_RUNS:
            shown.append(f"and {len(self.runs) - MOST_RUNS} older runs")
        blocks = {
            "runs": shown or ["none yet; start one with `sdan train SHARDS`"],
            "sweeps": [f"{sweep.name}  {sweep.state}  {sweep.detail}" for sweep in self.sweeps[:MOST_RUNS]],
            "champion": [self.champion],
            "shards": list(dict.fromkeys(run.shards for run in self.runs if run.shards)) or ["none used by a run yet"],
            "retrain": [self.retrain],
        }
        lines = []
        for title, block in blocks.items():  # without sweeps there is no block for them
            lines += [f"{title if number == 0 else '':10}{line}" for number, line in enumerate(block)]
        return "\n".join(lines)


class _Noted(TypedDict):
    """retrain.json."""

    time: Annotated[float, Field(ge=0, le=1e11)]
    reason: str


def status(data: Path) -> Status:
    """Read the data folder and the registry; starts nothing and writes nothing."""
    runs = tuple(_run(folder) for folder in run_folder.all_runs(data))
    uri = registry.default_tracking_uri(data)
    return Status(runs, _champion(uri), _retrain(data / RETRAIN), tuple(sweeps(data)))


def note_retrain(data: Path, reason: str) -> None:
    """Store the outcome of a retraining for `status`."""
    data.mkdir(parents=True, exist_ok=True)
    write_atomically(data / RETRAIN, json.dumps({"time": time.time(), "reason": reason}))


def _run(folder: Path) -> RunStatus:
    notes: list[str] = []
    try:
        stored = run_folder.read_run(folder)
        started = run_folder.started_at(folder)
    except (run_folder.RunFolderError, OSError) as error:
        return RunStatus(folder.name, "damaged", str(error), "")
    report, now = run_folder.last_report(folder, notes.append), run_folder.live(folder, notes.append)
    state: Literal["finished", "running", "stopped"]
    if run_folder.is_finished(folder):
        state, kept = "finished", run_folder.model_scores(folder, notes.append)
        if kept:  # the best checkpoint's; the newest report is the last epoch's
            report = {name: value for name, value in report.items() if name != progress.SELECT_BY}
        detail = progress.describe({}, report)
        if kept:
            detail += f", its model: PSNR {kept[progress.SELECT_BY]:.2f} dB (self)"
    else:
        silent_s = time.time() - max(started, now.get("time", 0.0), report.get("time", 0.0))
        state = "running" if silent_s < SILENT_S else "stopped"
        detail = progress.describe(now, report)
        if state == "stopped":
            detail += (
                f"; silent for {tqdm.format_interval(silent_s)}: "
                f"continue with `sdan train {stored.shards} --resume --name {folder.name}`"
            )
    return RunStatus(folder.name, state, detail, stored.shards, tuple(notes))


def _champion(uri: str) -> str:
    champion = registry.get_champion(uri)
    if champion is None:
        return "none yet"
    run = registry.connect(uri).get_run(str(champion.run_id))
    known = [(label, champion.tags[name]) for name, label in SHOWN_SCORES.items() if name in champion.tags]
    shown = "".join(f", {float(score):.2f} dB ({label})" for label, score in known)
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(champion.creation_timestamp / 1000))
    return f"version {champion.version} of {registry.MODEL}, from run {run.info.run_name}, {when}{shown}"


def _retrain(path: Path) -> str:
    if not path.exists():
        return "none yet"
    try:
        noted = read_json(path, _Noted)
    except (SmallJsonError, OSError) as error:
        return f"ignored: {error}"
    return f"{time.strftime('%Y-%m-%d %H:%M', time.localtime(noted['time']))}: {noted['reason']}"

"""`sdan status`: runs, sweeps, champion, shards and retrainings (last, next, lock) on one screen."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from pipelines import registry
from pipelines.registered.description import SHOWN_SCORES
from pipelines.retraining import lock, state
from pipelines.retraining.lock import local_time
from pipelines.retraining.timer import next_run
from pipelines.sweeping.state import SweepStatus, sweeps
from pipelines.training import progress, run_folder
from pipelines.training.seen import describe_new
from preprocessing.shard_folder.small_json import SmallJsonError

MOST_RUNS = 8
SILENT_S = 120.0
"""A run that has written nothing for this long counts as stopped; steps and validations take less."""
MOST_RETRAININGS = 5


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
    retrain: tuple[str, ...]
    """The last retrainings, newest first."""
    new: str
    """What the next one finds."""
    lock: str
    next_run: str
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
            "retrain": list(self.retrain),
            "new": [self.new],
            "lock": [self.lock],
            "next run": [self.next_run],
        }
        lines = []
        for title, block in blocks.items():  # without sweeps there is no block for them
            lines += [f"{title if number == 0 else '':10}{line}" for number, line in enumerate(block)]
        return "\n".join(lines)


def status(data: Path) -> Status:
    """Read the data folder and the registry; starts nothing and writes nothing."""
    runs = tuple(_run(folder) for folder in run_folder.all_runs(data))
    uri = registry.default_tracking_uri(data)
    shards = _shards(data)
    new, held = describe_new(uri, data, shards), lock.describe(data, shards)
    return Status(runs, _champion(uri), tuple(_retrainings(data)), new, held, next_run(), tuple(sweeps(data)))


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
    when = local_time(champion.creation_timestamp / 1000)
    return f"version {champion.version} of {registry.MODEL}, from run {run.info.run_name}, {when}{shown}"


def _retrainings(data: Path) -> list[str]:
    """The last retrainings, and those that are not finished."""
    unfinished = [
        f"unfinished: {left.name} since {local_time(left.began)}; the next `sdan retrain` goes on from "
        f"{'its training' if left.version is None else 'version ' + left.version}"
        for left in state.all_pending(data)
    ]
    try:
        ended = [f"{local_time(run['time'])}: {run['reason']}" for run in state.past(data)[:MOST_RETRAININGS]]
    except (SmallJsonError, OSError) as error:
        ended = [f"ignored: {error}"]
    return [*unfinished, *ended] or ["none yet"]


def _shards(data: Path) -> str | None:
    """SHARDS of the newest retraining; None before the first."""
    for left in state.all_pending(data):
        return left.shards
    with suppress(SmallJsonError, OSError):
        for run in state.past(data):
            if found := run.get("shards"):
                return found
    return None

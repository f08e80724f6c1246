"""Which sweeps there are in DATA, and where each stands: what `sdan status` shows."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from tuning.folder import LIVE, PAGE, RECORD, Live, Record, read_json
from tuning.space import SweepError

SWEEPS = "sweeps"
"""Folder below DATA of the sweeps' folders."""
SILENT_S = 60.0
"""A sweep that has shown no sign of life for this long counts as stopped."""


@dataclass(frozen=True)
class SweepStatus:
    """One line of `sdan status`."""

    name: str
    state: str
    """finished, running, stopped or damaged."""
    detail: str


def sweeps(data: Path) -> list[SweepStatus]:
    """The sweeps below DATA, the most recently started first; starts nothing and writes nothing."""
    found = sorted((data / SWEEPS).glob(f"*/{RECORD}"), key=lambda path: path.stat().st_mtime, reverse=True)
    return [_status(path.parent) for path in found]


def _status(folder: Path) -> SweepStatus:
    try:
        record = read_json(folder / RECORD, Record)
    except (SweepError, OSError) as error:
        return SweepStatus(folder.name, "damaged", str(error))
    try:
        live = read_json(folder / LIVE, Live)
    except (SweepError, OSError):
        live = Live((folder / RECORD).stat().st_mtime, 0, 0)
    detail = f"{min(live.ended, record.num_trials)} of {record.num_trials} trials ended"
    if live.done:
        return SweepStatus(folder.name, "finished", f"{record.num_trials} trials, {folder / PAGE}")
    if time.time() - live.time < SILENT_S:
        return SweepStatus(folder.name, "running", f"{detail}, {live.running} running")
    again = f"continue with the same `sdan tune ... --name {folder.name}` and --resume"
    return SweepStatus(folder.name, "stopped", f"{detail}; {again}")

"""The folder of a sweep, STORAGE/NAME, and the files in it that are read while it runs.

sweep.json        Record: the settings of the sweep, which a resume must repeat
limits.json       Limits: what a resume may change: trials, trials at once, end of the time budget
live.json         Live: trials that have ended and that run, written every few seconds
refused.json      Refused: settings that were never started, with the reasons
tiles/            per-tile scores of each trial's best epoch (trial.py)
crops/            pictures that the train function makes of each trial, TRIAL_ID.png or .jpg
sweep.html        the page; trials.txt and pictures beside it (page.py, summary.py)
"""

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from tuning.space import SweepError

RECORD, LIMITS, LIVE, REFUSED = "sweep.json", "limits.json", "live.json", "refused.json"
CROPS, PAGE = "crops", "sweep.html"
_MOST_BYTES = 16_000_000
D = TypeVar("D")


@dataclass(frozen=True)
class Record:
    """The settings of a sweep. A resume must have the same settings; it may raise num_trials and repeats."""

    name: str
    experiment: str
    """The MLflow experiment's name."""
    parent_run_id: str
    space: dict[str, str]
    metric: str
    mode: str
    num_trials: int
    max_epochs: int
    grace_epochs: int
    seed: int
    method: str = "tpe"
    also: dict[str, str] = field(default_factory=dict)
    """Further objectives: metric -> mode."""
    repeats: int = 1


@dataclass(frozen=True)
class Limits:
    """What each start or resume sets anew."""

    num_trials: int = 0
    at_once: int = 1
    ends_at: float | None = None
    """Seconds since 1970 when the time budget is spent."""


@dataclass(frozen=True)
class Live:
    """Where a sweep is."""

    time: float
    """Seconds since 1970 of the last sign of life."""
    ended: int
    running: int
    done: bool = False


@dataclass(frozen=True)
class Refused:
    """Settings that were never started."""

    reasons: dict[str, str] = field(default_factory=dict)
    """The setting in words -> the reason."""
    exhausted: bool = False
    """Whether the search ended because nothing else could be started."""


def write_json(path: Path, value: Any) -> None:
    """Write a dataclass as JSON; a reader finds the old file or the new one."""
    aside = path.with_name(f"{path.name}.part")
    aside.write_text(json.dumps(asdict(value), indent=2) + "\n")
    aside.replace(path)


def read_json(path: Path, kind: type[D]) -> D:
    """What `write_json` wrote.

    Raises:
        OSError: the file cannot be read.
        SweepError: it holds something else.
    """
    with path.open("rb") as file:
        data = file.read(_MOST_BYTES + 1)
    try:
        return TypeAdapter(kind).validate_json(data, strict=True)
    except ValidationError as error:
        got = error.errors(include_url=False, include_context=False, include_input=False)[0]["msg"]
        raise SweepError(f"{path}: expected a sweep's description, got {got}; start a sweep of another name") from None


def read_limits(folder: Path | None) -> Limits:
    """limits.json; without a folder (a sweep of an older version) or a whole file the defaults."""
    if folder is None:
        return Limits()
    try:
        return read_json(folder / LIMITS, Limits)
    except (OSError, SweepError):
        return Limits()


def write_live(folder: Path, ended: int, running: int, *, done: bool = False) -> None:
    """Write live.json; a full disk must not end the sweep."""
    try:
        write_json(folder / LIVE, Live(time.time(), ended, running, done))
    except OSError:
        return


def read_refused(folder: Path) -> Refused:
    """refused.json; empty if nothing was refused."""
    try:
        return read_json(folder / REFUSED, Refused)
    except (OSError, SweepError):
        return Refused()


def setting_key(overrides: Mapping[str, Any]) -> str:
    """A setting in words, e.g. 'loss.align_weight=0.25, model.packing_kernel=8'."""
    return ", ".join(f"{name}={value}" for name, value in sorted(overrides.items()))

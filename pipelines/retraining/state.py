"""What retrainings remember in the data folder: the one that is not finished, and the last ones.

retrain.json                  the last retrainings, for `sdan status`
retraining/<shards>.json      Pending: what the next run goes on from; <shards> is a hash of SHARDS
retraining/<name>.md          the report of a retraining; MLflow has a copy

Each file is written in one step, so a kill leaves the old or the new content.
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import (
    Annotated,
    NotRequired,  # pydantic refuses typing.TypedDict before Python 3.12
)

from pydantic import Field
from typing_extensions import TypedDict

from pipelines.retraining.compare import Decision
from preprocessing.shard_folder.small_json import SmallJsonError, read_json
from preprocessing.storage import write_atomically

FOLDER = "retraining"
PAST = "retrain.json"
MOST_PAST = 20
MOST_REPORTS = 50
"""Reports that are kept in the data folder; MLflow keeps all of them."""
MAX_ATTEMPTS = 3
"""A training that has failed this many times is given up, and the next run starts a new one."""
IDLE = "nothing new to train on"
"""Start of the reason of a run that had nothing to do."""


@dataclass(frozen=True)
class Pending:
    """A retraining that is not finished; each phase adds what it has done."""

    name: str
    """Of the training's run, and of the report."""
    began: float
    """Seconds since 1970 (UTC)."""
    raw: str
    shards: str
    champion: str | None
    """Its version when the retraining began; None: there was none."""
    run_id: str | None = None
    """MLflow's run of the retraining."""
    attempts: int = 0
    """How often the training was started."""
    new_pairs: list[str] = field(default_factory=list)
    """Names of the training pairs that the champion has not seen."""
    old_pairs: int = 0
    set_aside: list[str] = field(default_factory=list)
    """One line for each pair that preprocessing could not use."""
    version: str | None = None
    """Set by the phase register: the challenger's version."""
    digest: str | None = None
    """ShardIndex.digest of its training pairs."""
    decision: Decision | None = None
    """Set by the phase compare, after the report was written."""

    def write(self, data: Path) -> None:
        """Store it for the next run."""
        path = _path(data, self.shards)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(asdict(self), indent=2))

    def forget(self, data: Path) -> None:
        """The retraining is finished, or given up."""
        _path(data, self.shards).unlink(missing_ok=True)


def _path(data: Path, shards: str) -> Path:
    where = shards if "://" in shards else str(Path(shards).resolve())
    return data / FOLDER / f"{hashlib.sha256(where.encode()).hexdigest()[:12]}.json"


def pending(data: Path, shards: str, note: list[str]) -> Pending | None:
    """The unfinished retraining of these SHARDS; None if there is none. A damaged file is set aside with a note."""
    path = _path(data, shards)
    try:
        return read_json(path, Pending)
    except FileNotFoundError:
        return None
    except SmallJsonError as error:
        path.replace(path.with_suffix(".damaged"))
        note.append(f"an unfinished retraining was left out: {error}; the file is now {path.stem}.damaged")
        return None


def all_pending(data: Path) -> list[Pending]:
    """Every unfinished retraining in the data folder; damaged files are left out."""
    found = []
    for path in sorted((data / FOLDER).glob("*.json")):
        try:
            found.append(read_json(path, Pending))
        except (SmallJsonError, OSError):
            continue
    return found


def report_path(data: Path, name: str) -> Path:
    """Where the report of a retraining is kept."""
    return data / FOLDER / f"{name}.md"


def write_report(data: Path, name: str, text: str) -> None:
    """Write a report, and remove all but the newest MOST_REPORTS."""
    path = report_path(data, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text)
    reports = sorted(path.parent.glob("*.md"), key=lambda found: found.stat().st_mtime, reverse=True)
    for old in reports[MOST_REPORTS:]:
        old.unlink(missing_ok=True)


class PastRun(TypedDict):
    """One retraining that ended. `reason` and `time` are all that versions before 0.3 stored."""

    time: Annotated[float, Field(ge=0, le=1e11)]
    """Seconds since 1970 (UTC)."""
    reason: str
    raw: NotRequired[str]
    shards: NotRequired[str]


class _Past(PastRun):
    earlier: NotRequired[Annotated[list[PastRun], Field(max_length=MOST_PAST)]]
    """Newest first."""


def past(data: Path) -> list[PastRun]:
    """The last retrainings, newest first; [] before the first.

    Raises:
        SmallJsonError, OSError: the file is damaged or cannot be read.
    """
    try:
        newest = read_json(data / PAST, _Past)
    except FileNotFoundError:
        return []
    return [newest, *newest.get("earlier", [])]


def note(data: Path, reason: str, raw: str = "", shards: str = "") -> None:
    """Add a retraining that ended. Of several in a row that had nothing to do, the newest is kept."""
    data.mkdir(parents=True, exist_ok=True)
    try:
        earlier = [_bare(entry) for entry in past(data)]
    except (SmallJsonError, OSError):
        earlier = []
    if reason.startswith(IDLE) and earlier and earlier[0]["reason"].startswith(IDLE):
        earlier = earlier[1:]
    newest = PastRun(time=time.time(), reason=reason, raw=raw, shards=shards)
    write_atomically(data / PAST, json.dumps({**newest, "earlier": earlier[: MOST_PAST - 1]}, indent=2))


def _bare(entry: PastRun) -> PastRun:
    """The entry without `earlier`."""
    return PastRun(time=entry["time"], reason=entry["reason"], raw=entry.get("raw", ""), shards=entry.get("shards", ""))

"""The folder of a run, DATA/runs/NAME, and every file name in it.

run.json          StoredRun: what a resumed run must know
shards.json       RunShards: the pairs that the run trains and validates on, listed once
progress.jsonl    one line per validation, appended by Ray Train's controller once the checkpoint is safe
unsent.jsonl      points and tags that MLflow has not taken yet; absent if there are none
live.json         rank 0's position and how it computes, every few seconds, if its machine shares the folder
checkpoint_*/     Ray Train's own checkpoints and state
model/            the best checkpoint; its presence means that the run is finished

Checkpoints. TrainWorker saves one with every validation: before the first step, then every `train.validate_every`
epochs, and after the last (worker.py). It holds the averaged weights, which are validated and used, and trainer.pt for
resuming: raw weights, optimizer, position (step.py). Ray Train keeps the latest, from which a run resumes, and the two
with the highest SELECT_BY (progress.py). At the end the best of them is copied to model/, without trainer.pt, and is
registered (train.py).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from pipelines.loader import ShardIndex
from preprocessing.schema import ShardInfo
from preprocessing.storage import write_atomically

RUNS = "runs"
RUN, SHARDS, PROGRESS, LIVE, MODEL = "run.json", "shards.json", "progress.jsonl", "live.json", "model"
UNSENT = "unsent.jsonl"


class RunFolderError(ValueError):
    """A run that is missing or damaged; the message says what to do."""


@dataclass(frozen=True)
class StoredRun:
    """run.json: what a resumed run must know."""

    config: dict[str, Any]
    """config.to_dict of the run's ExperimentConfig."""
    shards: str
    run_id: str
    """Of the MLflow run."""
    init_from: str | None
    """The checkpoint folder whose weights the run started from."""
    workers: int | tuple[int, int]
    storage: str | None = None
    """Where Ray Train keeps state and checkpoints; None: the run's folder."""

    def write(self, folder: Path) -> None:
        """Write it to the run's folder, which is created if missing."""
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / RUN, json.dumps(asdict(self), indent=2))


@dataclass(frozen=True)
class RunShards:
    """The pairs of one run: what the driver listed when the run was first started."""

    train: ShardIndex
    val: ShardIndex

    def write(self, folder: Path) -> None:
        """Write shards.json to the run's folder."""
        write_atomically(folder / SHARDS, json.dumps({"train": _to_json(self.train), "val": _to_json(self.val)}))

    @classmethod
    def read(cls, folder: Path) -> RunShards | None:
        """What `write` wrote; None for a run of version 0.1, which did not write it."""
        path = folder / SHARDS
        if not path.exists():
            return None
        try:
            stored = json.loads(path.read_text())
            return cls(_from_json(stored["train"]), _from_json(stored["val"]))
        except (ValueError, TypeError, KeyError) as error:
            raise RunFolderError(f"{path}: expected a run's list of shards, got {error}; start a new run") from error


def run_folder(data: Path, name: str) -> Path:
    """DATA/runs/NAME."""
    return data / RUNS / name


def all_runs(data: Path) -> list[Path]:
    """The folders of all runs, most recently started first."""
    found = sorted((data / RUNS).glob(f"*/{RUN}"), key=lambda path: path.stat().st_mtime, reverse=True)
    return [path.parent for path in found]


def is_run(folder: Path) -> bool:
    """Whether a run was started in this folder."""
    return (folder / RUN).exists()


def is_finished(folder: Path) -> bool:
    """Whether the run ended with a model."""
    return (folder / MODEL).exists()


def started_at(folder: Path) -> float:
    """Seconds since 1970 of the newest start."""
    return (folder / RUN).stat().st_mtime


def newest_unfinished(data: Path) -> Path:
    """The folder of the most recently started run that has not finished.

    Raises:
        RunFolderError: there is none.
    """
    unfinished = [folder for folder in all_runs(data) if not is_finished(folder)]
    if not unfinished:
        raise RunFolderError(
            f"--resume, {data / RUNS}: expected an unfinished run, got none; start one without --resume, "
            "or name one with --name"
        )
    return unfinished[0]


def read_run(folder: Path) -> StoredRun:
    """The folder's run.json.

    Raises:
        RunFolderError: no such run, or a damaged file.
    """
    path = folder / RUN
    if not path.exists():
        raise RunFolderError(f"--resume --name {folder.name}: expected a run in {folder}, got none; check --data")
    try:
        stored = json.loads(path.read_text())
        workers = stored["workers"]
        return StoredRun(**stored | {"workers": tuple(workers) if isinstance(workers, list) else workers})
    except (ValueError, TypeError, KeyError) as error:
        raise RunFolderError(f"{path}: expected a run's description, got {error}; start a new run") from error


def last_report(folder: Path) -> dict[str, Any]:
    """The run's newest validation, a line of progress.jsonl; {} before the first."""
    path = folder / PROGRESS
    lines = path.read_text().splitlines() if path.exists() else []
    return dict(json.loads(lines[-1])) if lines else {}


def first_report(folder: Path) -> dict[str, Any]:
    """The run's first validation, before the first step; {} before it."""
    path = folder / PROGRESS
    lines = path.read_text().splitlines() if path.exists() else []
    return dict(json.loads(lines[0])) if lines else {}


def live(folder: Path) -> dict[str, Any]:
    """What rank 0 wrote last to live.json; {} if it has written nothing or does not share this folder."""
    path = folder / LIVE
    return dict(json.loads(path.read_text())) if path.exists() else {}


def _to_json(index: ShardIndex) -> dict[str, Any]:
    # Not asdict: ShardInfo.options is a mapping of plain values that JSON can store unchanged.
    return {field.name: getattr(index, field.name) for field in fields(index)} | {"info": index.info.__dict__}


def _from_json(stored: dict[str, Any]) -> ShardIndex:
    known = stored | {"paths": tuple(stored["paths"]), "tiles": tuple(stored["tiles"])}
    return ShardIndex(**known | {"info": ShardInfo(**stored["info"])})

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

import itertools
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import (
    Annotated,
    Any,
    NotRequired,  # pydantic refuses typing.TypedDict before Python 3.12
    cast,
)

from pydantic import ConfigDict, Field, with_config
from typing_extensions import TypedDict

from pipelines.loader import ShardIndex
from preprocessing.shard_folder.small_json import SmallJsonError, parse_json, read_json
from preprocessing.storage import write_atomically
from sdan.checkpoint import DESCRIPTION

RUNS = "runs"
RUN, SHARDS, PROGRESS, LIVE, MODEL = "run.json", "shards.json", "progress.jsonl", "live.json", "model"
UNSENT = "unsent.jsonl"
HELD_OUT = "held_out.json"
"""In a checkpoint: {crop: PSNR} of its validation, the values whose mean is SELECT_BY. Sweeps compare runs by them."""
_MOST_SHARDS_BYTES = 1_000_000_000
"""Far more than the names of a million pairs take."""
_TAIL_BYTES = 1_000_000
"""The end of progress.jsonl that is read; a line takes a few thousand."""
_Seconds = Annotated[float, Field(ge=0, le=1e11)]


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
    features: str | None = None
    """The feature network of its losses, VGG19 or VGG16; None: they need none, or version 0.3 or earlier."""

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
            return read_json(path, cls, max_bytes=_MOST_SHARDS_BYTES)
        except (SmallJsonError, OSError) as error:
            raise RunFolderError(f"{error}; it is a run's list of shards: start a new run") from error


@with_config(ConfigDict(extra="allow"))
class _Report(TypedDict):
    """What is shown of a line of progress.jsonl."""

    epoch: float
    epochs: int
    time: NotRequired[_Seconds]
    train_loss: NotRequired[float | None]
    crops_per_s: NotRequired[float | None]
    val_psnr: NotRequired[float]


class _Model(TypedDict):
    """What is shown of model/config.json."""

    scores: Annotated[dict[str, Any], Field(max_length=10_000)]


class _Live(TypedDict):
    """live.json, as meter.LiveFile writes it."""

    time: _Seconds
    epoch: float
    epochs: int
    loss: float | None
    crops_per_s: float | None
    left_s: _Seconds | None
    started: NotRequired[str]
    stage: NotRequired[str]


def run_folder(data: Path, name: str) -> Path:
    """DATA/runs/NAME."""
    return data / RUNS / name


def new_name(name: str, *folders: Path) -> str:
    """`name`, or the first of `name-2`, `name-3`, ... after which no file or folder in `folders` is called.

    Names from the time have seconds: two runs may start in the same one.
    """
    used = {entry.name.removesuffix(".md") for folder in folders if folder.is_dir() for entry in folder.iterdir()}
    numbered = (f"{name}-{number}" for number in itertools.count(2))
    return next(free for free in itertools.chain([name], numbered) if free not in used)


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
        return read_json(path, StoredRun)
    except (SmallJsonError, OSError) as error:
        raise RunFolderError(f"{error}; it describes the run: start a new one") from error


def last_report(folder: Path, note: Callable[[str], None] | None = None) -> dict[str, Any]:
    """The run's newest validation, the last whole line of progress.jsonl; {} before the first.

    Args:
        note: takes one line if damaged lines, or the whole file, are ignored.
    """
    path = folder / PROGRESS
    damage = ""
    found: dict[str, Any] = {}
    try:
        for line in reversed(_last_lines(path)):
            try:
                found = cast("dict[str, Any]", parse_json(line, str(path), _Report))
                break
            except SmallJsonError as error:
                damage = damage or str(error)
    except FileNotFoundError:
        pass
    except OSError as error:
        damage = str(error)
    if damage and note:
        note(f"ignored: {damage}")
    return found


def reports(folder: Path) -> list[dict[str, Any]]:
    """The run's validations in order, from the whole lines of progress.jsonl; damaged ones are left out."""
    path, found = folder / PROGRESS, []
    with path.open("rb") as file:
        for line in file:
            try:
                found.append(cast("dict[str, Any]", parse_json(line, str(path), _Report)))
            except SmallJsonError:
                continue
    return found


def first_report(folder: Path) -> dict[str, Any]:
    """The run's first validation, before the first step; {} if there is none, or its line is damaged."""
    path = folder / PROGRESS
    try:
        with path.open("rb") as file:
            line = file.readline(_TAIL_BYTES)
        return cast("dict[str, Any]", parse_json(line, str(path), _Report))
    except (SmallJsonError, OSError):
        return {}


def model_scores(folder: Path, note: Callable[[str], None]) -> dict[str, float]:
    """val_psnr of the model that a finished run kept; {} if it states none. `note` takes a line about damage."""
    try:
        stored = read_json(folder / MODEL / DESCRIPTION, _Model)["scores"].get("val_psnr")
    except FileNotFoundError:
        return {}
    except (SmallJsonError, OSError) as error:
        note(f"ignored: {error}")
        return {}
    return {"val_psnr": float(stored)} if isinstance(stored, float | int) else {}


def _last_lines(path: Path) -> list[bytes]:
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(size - _TAIL_BYTES, 0))
        lines = file.read(_TAIL_BYTES).splitlines()
    return lines[1:] if size > _TAIL_BYTES and len(lines) > 1 else lines


def live(folder: Path, note: Callable[[str], None] | None = None) -> dict[str, Any]:
    """What rank 0 wrote last to live.json; {} if it has written nothing or does not share this folder.

    Args:
        note: takes one line if the file is damaged, and so ignored.
    """
    try:
        return cast("dict[str, Any]", read_json(folder / LIVE, _Live))
    except FileNotFoundError:
        return {}
    except (SmallJsonError, OSError) as error:
        if note:
            note(f"ignored: {error}")
        return {}


def _to_json(index: ShardIndex) -> dict[str, Any]:
    # Not asdict: ShardInfo.options is a mapping of plain values that JSON can store unchanged.
    return {field.name: getattr(index, field.name) for field in fields(index)} | {"info": index.info.__dict__}

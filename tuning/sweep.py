"""A sweep by Ray Tune (Optuna proposes, ASHA stops early) over any train function, recorded in MLflow, resumable.

    train(overrides, report) -> metrics

`overrides` maps dotted names to the values of this trial. `train` calls `report` (tuning.trial.Report) once per epoch.
"""

import json
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from mlflow import MlflowClient
from pydantic import TypeAdapter, ValidationError

from tuning import summary
from tuning.search import SearchPlan, require_slots, search
from tuning.space import Space, SweepError, Value, check_space, describe
from tuning.tracking import (
    BEST_TAG,
    SWEEP_TAG,
    SweepRun,
    TrialRow,
    best_trial,
    close_child,
    read_trials,
)
from tuning.trial import Train, make_trial

RECORD = "sweep.json"
_MOST_BYTES = 16_000_000


class InterruptedSweepError(SweepError):
    """The sweep ended before all of its trials; it can be resumed."""


@dataclass(frozen=True)
class SweepResult:
    best_overrides: dict[str, Value]
    best_score: float
    trials: list[TrialRow]
    """Best first, including failed trials with their reasons."""
    parent_run_id: str
    folder: Path
    """STORAGE/NAME: trials.txt, epochs.png, parameters.png and Ray Tune's state."""


@dataclass(frozen=True)
class Record:
    """The settings of a sweep, stored as sweep.json in its folder. A resume must have the same settings."""

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


def run_sweep(
    train: Train,
    space: Space,
    *,
    name: str,
    storage_path: str | Path,
    tracking_uri: str,
    experiment_id: str,
    num_trials: int,
    max_epochs: int,
    metric: str = "val_psnr",
    mode: str = "max",
    max_concurrent: int = 1,
    seed: int = 0,
    resume: bool = False,
    parent_tags: dict[str, str] | None = None,
    grace_epochs: int = 1,
) -> SweepResult:
    """Run, or with `resume` continue, the sweep `name` and return its best trial.

    Ray must be running with the resource `trial_slot`, and the MLflow experiment must exist. On resume,
    finished trials are kept, unfinished ones restart with the same overrides, trial_id and MLflow run, and failed ones
    get one more try.

    A trial's score is that of its best epoch; the trial with the best score wins. Epoch 0 (the untrained network) is
    recorded but not counted.

    Args:
        train: picklable by cloudpickle. Trials run in the caller's working folder, so relative paths stay valid.
        max_concurrent: the largest number of trials at once; each needs one `trial_slot`.
        grace_epochs: ASHA stops no trial before this epoch.

    Raises:
        SweepError: invalid space or number, a name in use (when resuming: an unknown name), settings that differ from
            the sweep to resume, no `trial_slot`, an interrupted sweep, or all trials failed (with the first reason).
    """
    folder = check_sweep(name, storage_path, num_trials=num_trials, resume=resume)
    _check_numbers(max_epochs, max_concurrent, grace_epochs, mode, metric)
    space = check_space(space)
    require_slots()
    _prepare_folder(folder, resume)
    client = MlflowClient(tracking_uri=tracking_uri)
    experiment = client.get_experiment(experiment_id).name
    grace_epochs = min(grace_epochs, max_epochs)
    asked = Record(name, experiment, "", describe(space), metric, mode, num_trials, max_epochs, grace_epochs, seed)
    record = _resume(folder, asked) if resume else _start(folder, asked, client, experiment_id, parent_tags or {})
    run = SweepRun(name, tracking_uri, experiment_id, record.parent_run_id, metric, mode, max_epochs)
    try:
        client.update_run(run.parent_run_id, status="RUNNING")
        plan = SearchPlan(record.num_trials, record.grace_epochs, record.seed, max_concurrent)
        search(make_trial(train, run, Path.cwd()), space, run, plan, folder)
        return _finish(client, run, folder, num_trials)
    except BaseException as error:
        killed = isinstance(error, KeyboardInterrupt | SystemExit | InterruptedSweepError)
        for row in read_trials(run) if killed else ():
            if row.status == "running":
                close_child(client, row.run_id, "interrupted")
        client.set_terminated(run.parent_run_id, "KILLED" if killed else "FAILED")
        raise


def check_sweep(name: str, storage_path: str | Path, *, num_trials: int, resume: bool) -> Path:
    """Check the options of a sweep before Ray and MLflow are started, and return its folder, STORAGE/NAME.

    Raises:
        SweepError: invalid name or number of trials, a name that is in use or (resume) unknown.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise SweepError(f"sweep name: expected letters, digits, '.', '_' or '-', got {name!r}")
    if num_trials < 1:
        raise SweepError(f"sweep, trials: expected at least 1, got {num_trials}")
    storage = Path(storage_path).expanduser().resolve()
    known = (storage / name / RECORD).is_file()
    if resume and not known:
        others = sorted(path.parent.name for path in storage.glob(f"*/{RECORD}"))
        raise SweepError(f"{storage}: expected a sweep {name!r} to resume, got {', '.join(others) or 'none'}")
    if not resume and known:
        raise SweepError(
            f"{storage}: expected no sweep {name!r}, got an existing one; resume it or choose another name"
        )
    return storage / name


def _finish(client: MlflowClient, run: SweepRun, folder: Path, num_trials: int) -> SweepResult:
    """Write the summary, mark the best trial and end the parent run."""
    trials = read_trials(run)
    done = [row for row in trials if row.status in ("finished", "stopped", "failed")]
    if len(done) < num_trials:
        raise InterruptedSweepError(
            f"sweep {run.name!r}: expected {num_trials} ended trials, got {len(done)} when interrupted; resume it"
        )
    for row in trials:
        if row.status == "running":  # Tune was killed before it saved this trial, and has started another
            close_child(client, row.run_id, "abandoned", "its record was lost when the sweep was killed")
    trials = read_trials(run)
    files = summary.write(trials, folder, metric=run.metric, mode=run.mode)
    for file in files:
        client.log_artifact(run.parent_run_id, str(file), "sweep")
    best = best_trial(trials)
    if best is None or best.score is None:
        first = next((row.reason for row in trials if row.reason), "no reason recorded")
        raise SweepError(
            f"sweep {run.name!r}: expected a trial with a result, got {len(done)} without one; the first: {first}"
        )
    for row in trials:
        client.set_tag(row.run_id, BEST_TAG, str(row is best).lower())
    client.log_metric(run.parent_run_id, f"best_{run.metric}", best.score)
    client.set_tag(run.parent_run_id, "sdan.best_run_id", best.run_id)
    client.set_tag(run.parent_run_id, "sdan.best_overrides", json.dumps(best.overrides, sort_keys=True))
    client.set_terminated(run.parent_run_id)
    return SweepResult(best.overrides, best.score, trials, run.parent_run_id, folder)


def _start(
    folder: Path, asked: Record, client: MlflowClient, experiment_id: str, parent_tags: dict[str, str]
) -> Record:
    parent = client.create_run(experiment_id, tags={**parent_tags, SWEEP_TAG: asked.name}, run_name=asked.name)
    record = Record(**{**asdict(asked), "parent_run_id": parent.info.run_id})
    for key in ("metric", "mode", "num_trials", "max_epochs", "grace_epochs", "seed"):
        client.log_param(parent.info.run_id, f"sweep.{key}", getattr(record, key))
    for parameter, text in record.space.items():
        client.log_param(parent.info.run_id, f"space.{parameter}", text)
    aside = folder / f"{RECORD}.part"
    aside.write_text(json.dumps(asdict(record), indent=2) + "\n")
    aside.replace(folder / RECORD)
    return record


def _resume(folder: Path, asked: Record) -> Record:
    path = folder / RECORD
    with path.open("rb") as file:
        data = file.read(_MOST_BYTES + 1)
    try:
        record = TypeAdapter(Record).validate_json(data, strict=True)
    except ValidationError as error:
        got = error.errors(include_url=False, include_context=False, include_input=False)[0]["msg"]
        raise SweepError(f"{path}: expected a sweep's description, got {got}; start a sweep of another name") from None
    for key, value in asdict(record).items():
        got = getattr(asked, key)
        if key != "parent_run_id" and got != value:
            raise SweepError(
                f"sweep {record.name!r}, {key}: expected {value} (as at its start), got {got}; resume with that value"
            )
    return record


def _prepare_folder(folder: Path, resume: bool) -> None:
    try:
        if not resume and folder.exists():
            shutil.rmtree(folder)  # left by a start that was killed before it recorded anything
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SweepError(
            f"{folder}: expected a writable folder, got: {error.strerror}; choose another folder"
        ) from error


def _check_numbers(max_epochs: int, max_concurrent: int, grace_epochs: int, mode: str, metric: str) -> None:
    numbers = {
        "epochs": max_epochs,
        "concurrent trials": max_concurrent,
        "grace epochs": grace_epochs,
    }
    for label, number in numbers.items():
        if number < 1:
            raise SweepError(f"sweep, {label}: expected at least 1, got {number}")
    if mode not in ("min", "max"):
        raise SweepError(f"sweep, mode: expected 'min' or 'max', got {mode!r}")
    if metric in ("", "epoch"):
        raise SweepError(f"sweep, metric: expected a score such as 'val_psnr', got {metric!r}")

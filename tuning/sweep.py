"""A sweep: Ray Tune (Optuna proposes, ASHA stops early) over any train function, recorded in MLflow, resumable.

    train(overrides, report) -> metrics

`overrides` maps dotted names to the values of this trial, `report` (tuning.trial.Report) is called once per epoch.
"""

import json
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from mlflow import MlflowClient

from tuning import summary
from tuning.search import SearchPlan, search
from tuning.space import Space, SweepError, Value, check_space, describe
from tuning.tracking import (
    BEST_TAG,
    SWEEP_TAG,
    SweepRun,
    TrialRow,
    best_trial,
    close_child,
    open_experiment,
    read_trials,
)
from tuning.trial import Train, make_trial

RECORD = "sweep.json"


@dataclass(frozen=True)
class SweepResult:
    best_overrides: dict[str, Value]
    best_score: float
    trials: list[TrialRow]
    """Best first; failed trials are in it, with their reason."""
    parent_run_id: str
    folder: Path
    """STORAGE/NAME: trials.txt, epochs.png, parameters.png and Ray Tune's own state."""


@dataclass(frozen=True)
class Record:
    """What a sweep was started with: sweep.json in its folder. A resume must agree with it."""

    name: str
    experiment: str
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
    experiment: str,
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
    """Runs (or with `resume` goes on with) the sweep `name` and returns its best trial.

    Ray is started with `max_concurrent` trial slots when it is not running; a running Ray must offer `trial_slot`.
    `train` must be picklable by cloudpickle; the relative paths it uses are kept, since trials work in the caller's
    folder. On a resume finished trials are kept, unfinished ones start their train function again with the same
    overrides, trial_id and MLflow run, and failed ones are tried once more.

    The result is the trial with the best epoch; an epoch 0 (the untrained network) is recorded and not counted.

    Raises SweepError, one line: a wrong space or number, a name in use or (resume) unknown, other settings than the
    sweep was started with, Ray without trial slots, an interrupted sweep, or all trials failed (the first reason).
    """
    _check_numbers(num_trials, max_epochs, max_concurrent, grace_epochs, mode, metric)
    space = check_space(space)
    folder = _folder(name, Path(storage_path).expanduser().resolve(), resume)
    asked = Record(
        name, experiment, "", describe(space), metric, mode, num_trials, max_epochs, min(grace_epochs, max_epochs), seed
    )
    client = MlflowClient(tracking_uri=tracking_uri)
    experiment_id = open_experiment(client, experiment, tracking_uri, folder.parent / "mlartifacts")
    record = _go_on(folder, asked) if resume else _start(folder, asked, client, experiment_id, parent_tags or {})
    run = SweepRun(name, tracking_uri, experiment_id, record.parent_run_id, metric, mode, max_epochs)
    try:
        client.update_run(run.parent_run_id, status="RUNNING")
        plan = SearchPlan(record.num_trials, record.grace_epochs, record.seed, max_concurrent)
        search(make_trial(train, run, Path.cwd()), space, run, plan, folder)
        return _conclude(client, run, folder, num_trials)
    except BaseException as error:
        stopped = isinstance(error, KeyboardInterrupt | SystemExit) or "interrupted" in str(error)
        client.set_terminated(run.parent_run_id, "KILLED" if stopped else "FAILED")
        raise


def _conclude(client: MlflowClient, run: SweepRun, folder: Path, num_trials: int) -> SweepResult:
    """Writes the summary, marks the best trial and ends the parent run."""
    trials = read_trials(run)
    done = [row for row in trials if row.status in ("finished", "stopped", "failed")]
    if len(done) < num_trials:
        for row in trials:
            if row.status == "running":
                close_child(client, row.run_id, "interrupted")
        raise SweepError(
            f"sweep {run.name!r} was interrupted after {len(done)} of {num_trials} trials; go on with resume"
        )
    for row in trials:
        if row.status == "running":  # started after Tune's last snapshot before a kill: Tune has made another for it
            close_child(client, row.run_id, "abandoned", "its record was lost when the sweep was killed")
    trials = read_trials(run)
    files = summary.write(trials, folder, metric=run.metric, mode=run.mode)
    for file in files:
        client.log_artifact(run.parent_run_id, str(file), "sweep")
    best = best_trial(trials)
    if best is None or best.score is None:
        first = next((row.reason for row in trials if row.reason), "no reason recorded")
        raise SweepError(f"sweep {run.name!r}: no trial of {len(done)} ended with a result; the first: {first}")
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


def _go_on(folder: Path, asked: Record) -> Record:
    record = Record(**json.loads((folder / RECORD).read_text()))
    for key, value in asdict(record).items():
        got = getattr(asked, key)
        if key != "parent_run_id" and got != value:
            raise SweepError(f"sweep {record.name!r} was started with {key} {value}, got {got}; resume with the same")
    return record


def _folder(name: str, storage: Path, resume: bool) -> Path:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise SweepError(f"sweep name: got {name!r}, expected letters, digits, '.', '_' or '-'")
    folder = storage / name
    known = (folder / RECORD).is_file()
    if resume and not known:
        others = sorted(path.parent.name for path in storage.glob(f"*/{RECORD}"))
        raise SweepError(f"no sweep {name!r} in {storage} to resume; there: {', '.join(others) or 'none'}")
    if not resume and known:
        raise SweepError(f"sweep {name!r} exists in {storage}; resume it, or choose another name")
    try:
        if not resume and folder.exists():
            shutil.rmtree(folder)  # left by a start that was cut off before anything was recorded
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SweepError(f"{folder}: cannot write there ({error.strerror}); choose another folder") from error
    return folder


def _check_numbers(
    num_trials: int, max_epochs: int, max_concurrent: int, grace_epochs: int, mode: str, metric: str
) -> None:
    numbers = {"trials": num_trials, "epochs": max_epochs, "concurrent trials": max_concurrent, "grace": grace_epochs}
    for label, number in numbers.items():
        if number < 1:
            raise SweepError(f"sweep: got {number} {label}, expected at least 1")
    if mode not in ("min", "max"):
        raise SweepError(f"sweep: got mode {mode!r}, expected 'min' or 'max'")
    if metric in ("", "epoch"):
        raise SweepError(f"sweep: got the metric {metric!r}, expected a score such as 'val_psnr'")

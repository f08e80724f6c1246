"""A sweep: Ray Tune (Optuna proposes, ASHA stops early) over any train function, recorded in MLflow, resumable.

    train(overrides, report) -> metrics

`overrides` maps dotted names to the values of this trial, `report` (tuning.trial.Report) is called once per epoch.
Trials hold one unit of the resource `trial_slot` and no CPU, so that what they start (a Ray Train run) gets the CPUs.
"""

import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import ray
from mlflow import MlflowClient
from optuna import distributions
from ray import tune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.optuna import OptunaSearch

from tuning import summary
from tuning.space import Choice, Distribution, Space, SweepError, Uniform, Value, check_space, describe
from tuning.tracking import (
    BEST_TAG,
    SWEEP_TAG,
    EndOfTrial,
    SweepRun,
    TrialRow,
    best_trial,
    close_child,
    open_experiment,
    read_trials,
)
from tuning.trial import Train, make_trial

SLOT = "trial_slot"
RECORD = "sweep.json"
REDUCTION_FACTOR = 3
"""ASHA: at epochs grace, 3 grace, 9 grace, ... the best third goes on."""


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
        with _ray_with_slots(max_concurrent), _frequent_snapshots(), _no_tracebacks():
            _fit(train, space, run, record, folder, max_concurrent)
        return _conclude(client, run, folder, num_trials)
    except BaseException as error:
        stopped = isinstance(error, KeyboardInterrupt | SystemExit) or "interrupted" in str(error)
        client.set_terminated(run.parent_run_id, "KILLED" if stopped else "FAILED")
        raise


def _fit(train: Train, space: Space, run: SweepRun, record: Record, folder: Path, max_concurrent: int) -> None:
    trial = tune.with_resources(make_trial(train, run, Path.cwd()), {SLOT: 1})
    if tune.Tuner.can_restore(str(folder)):
        tuner = tune.Tuner.restore(str(folder), trial, resume_unfinished=True, restart_errored=True)
    else:
        search = OptunaSearch(_optuna_space(space), metric=run.metric, mode=run.mode, seed=record.seed)
        asha = ASHAScheduler(
            time_attr="epoch",  # training_iteration starts again after a restore
            max_t=run.max_epochs,
            grace_period=record.grace_epochs,
            reduction_factor=REDUCTION_FACTOR,
        )
        tuner = tune.Tuner(
            trial,
            tune_config=tune.TuneConfig(
                metric=run.metric,
                mode=run.mode,
                num_samples=record.num_trials,
                max_concurrent_trials=max_concurrent,
                search_alg=search,
                scheduler=asha,
            ),
            run_config=tune.RunConfig(
                name=folder.name, storage_path=str(folder.parent), callbacks=[EndOfTrial(run)], verbose=0
            ),
        )
    tuner.fit()


def _conclude(client: MlflowClient, run: SweepRun, folder: Path, num_trials: int) -> SweepResult:
    """Writes the summary, marks the best trial and ends the parent run."""
    trials = read_trials(run)
    done = [row for row in trials if row.status in ("finished", "stopped", "failed")]
    if len(done) < num_trials:
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
        raise SweepError(f"sweep {run.name!r}: all {len(done)} trials failed; the first: {first}")
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


def _optuna_space(space: Space) -> dict[str, distributions.BaseDistribution]:
    return {name: _optuna(distribution) for name, distribution in space.items()}


def _optuna(distribution: Distribution) -> distributions.BaseDistribution:
    if isinstance(distribution, Choice):
        return distributions.CategoricalDistribution(distribution.values)
    if isinstance(distribution, Uniform):
        return distributions.FloatDistribution(distribution.low, distribution.high, log=distribution.log)
    return distributions.IntDistribution(distribution.low, distribution.high, log=distribution.log)


@contextmanager
def _ray_with_slots(max_concurrent: int) -> Iterator[None]:
    """Ray with trial slots: the one that runs, the cluster of RAY_ADDRESS, or a local one for the sweep's time."""
    started = not ray.is_initialized()
    if started and os.environ.get("RAY_ADDRESS"):
        ray.init()
    elif started:
        # The dashboard stays on: without it later trials hang (Ray 2.60).
        ray.init(
            address="local",
            resources={SLOT: max_concurrent},
            include_dashboard=True,
            log_to_driver=False,
            _node_ip_address="127.0.0.1",
        )
    try:
        slots = ray.cluster_resources().get(SLOT, 0)
        if slots < 1:
            raise SweepError(
                f"Ray runs without the resource {SLOT!r}, so trials could never start; "
                f"start it with resources={{'{SLOT}': {max_concurrent}}} or let the sweep start Ray"
            )
        yield
    finally:
        if started:
            ray.shutdown()


@contextmanager
def _frequent_snapshots() -> Iterator[None]:
    """A kill loses what Tune has not yet snapshot; by default that is up to the last 10 seconds or more."""
    key = "TUNE_GLOBAL_CHECKPOINT_S"
    before = os.environ.get(key)
    os.environ[key] = before or "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[key]


@contextmanager
def _no_tracebacks() -> Iterator[None]:
    """Tune prints a failed trial's whole traceback; its reason stands in the table and its traceback in error.txt."""
    loggers = [logging.getLogger(name) for name in ("ray.tune.execution.tune_controller", "ray.tune.tune")]
    before = [each.level for each in loggers]
    for each in loggers:
        each.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for each, level in zip(loggers, before, strict=True):
            each.setLevel(level)

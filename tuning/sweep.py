"""A sweep by Ray Tune (Optuna proposes, ASHA stops early) over any train function, recorded in MLflow, resumable.

    train(overrides, report) -> metrics

`overrides` maps dotted names to the values of this trial. `train` calls `report` (tuning.trial.Report) once per epoch.
"""

import json
import re
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import ray
from mlflow import MlflowClient
from mlflow.entities import Metric, RunTag
from mlflow.exceptions import MlflowException

from tuning import page, summary
from tuning.folder import (
    CROPS,
    LIMITS,
    RECORD,
    Limits,
    Record,
    read_json,
    read_refused,
    write_json,
    write_live,
)
from tuning.plan import REPEATED, duration
from tuning.search import METHODS, SearchPlan, repeat, require_slots, search
from tuning.space import (
    Constraint,
    Space,
    SweepError,
    Value,
    check_buildable,
    check_space,
    combinations,
    contains,
    describe,
)
from tuning.tracking import (
    BEST_TAG,
    NOTE_TAG,
    SECONDS,
    SWEEP_TAG,
    EndOfTrial,
    SweepRun,
    TrialRow,
    best_name,
    best_trial,
    close_child,
    read_trials,
)
from tuning.trial import TILES, Train, kept_tiles, make_trial
from tuning.winners import Scored, Verdict, judge

__all__ = ["RECORD", "Record", "SweepError", "SweepOptions", "SweepResult", "check_sweep", "run_sweep"]


class InterruptedSweepError(SweepError):
    """The sweep ended before all of its trials; it can be resumed."""


@dataclass(frozen=True)
class SweepOptions:
    """What a sweep can do beyond searching one metric."""

    method: str = "tpe"
    """tpe, random or grid (every setting of a finite space)."""
    also: Mapping[str, str] = field(default_factory=dict)
    """Further objectives, metric -> mode; ASHA and the comparison use the main metric."""
    constraint: Constraint | None = None
    """What cannot be built is never started."""
    default: Mapping[str, Value] | None = None
    """The default setting. It is the first trial if the space contains it; the best is compared with it."""
    repeats: int = 1
    """Seeds of the best three settings and the default one."""
    time_budget_s: float | None = None
    """The time that this start or resume may take. What has not ended by then can be resumed."""
    command: Callable[[Mapping[str, Value]], str] | None = None
    """The command that trains a setting at full length, for the page."""


@dataclass(frozen=True)
class SweepResult:
    best_overrides: dict[str, Value]
    best_score: float
    trials: list[TrialRow]
    """Best first, including failed trials with their reasons, and repeats with other seeds."""
    parent_run_id: str
    folder: Path
    """STORAGE/NAME: sweep.html, trials.txt and Ray Tune's state."""
    verdict: Verdict
    """Whether the best is better than chance, in words."""
    chosen: TrialRow
    """The trial to use: the best, or the cheapest of those that cannot be told from it."""
    metric: str
    command: str
    """Trains the chosen setting at full length; '' if unknown."""
    ended: str
    """'' if all trials ended; else why not, and how to go on."""


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
    options: SweepOptions | None = None,
) -> SweepResult:
    """Run, or with `resume` continue, the sweep `name` and return its best trial.

    Ray must be running with the resource `trial_slot`, and the MLflow experiment must exist. On resume,
    finished trials are kept, unfinished ones restart with the same overrides, trial_id and MLflow run, and failed ones
    get one more try. A resume may raise the number of trials and the repeats, and set another time budget.

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
    options = options or SweepOptions()
    folder = check_sweep(name, storage_path, num_trials=num_trials, resume=resume)
    _check_numbers(max_epochs, max_concurrent, grace_epochs, mode, metric)
    space, num_trials = check_search(space, options, num_trials)
    require_slots()
    _prepare_folder(folder, resume)
    asked = Record(
        name, "", "", describe(space), metric, mode, num_trials, max_epochs, min(grace_epochs, max_epochs), seed,
        options.method, dict(options.also), options.repeats,
    )  # fmt: skip
    run = _open(folder, asked, tracking_uri, experiment_id, resume, parent_tags or {})
    client = run.client()
    try:
        client.update_run(run.parent_run_id, status="RUNNING")
        ends_at = time.time() + options.time_budget_s if options.time_budget_s else None
        write_json(folder / LIMITS, Limits(num_trials, max_concurrent, ends_at))
        in_time = _train_all(train, space, run, folder, options)
        return _finish(run, folder, space, options, in_time=in_time)
    except BaseException as error:
        _close(run, error)
        raise


def check_search(space: Space, options: SweepOptions, num_trials: int) -> tuple[Space, int]:
    """Check the space with its constraint, before Ray is started.

    Returns:
        the sorted space, and the number of trials: not more than a finite space has settings that can be built.

    Raises:
        SweepError: an invalid space or method, a grid over a continuous space or one of more than `num_trials`
            settings, or no setting that can be built.
    """
    space = check_space(space)
    if options.method not in METHODS:
        raise SweepError(f"--search: expected one of {', '.join(METHODS)}, got {options.method!r}")
    if options.repeats < 1:
        raise SweepError(f"--repeats: expected at least 1, got {options.repeats}")
    if options.time_budget_s is not None and options.time_budget_s <= 0:
        raise SweepError(f"--time-budget: expected more than 0 s, got {options.time_budget_s:g}")
    buildable = check_buildable(space, options.constraint or (lambda values: None))
    if options.method == "grid":
        if combinations(space) is None or buildable is None:
            continuous = [f"{name}: {text}" for name, text in describe(space).items() if "uniform" in text]
            got = ", ".join(continuous) or "a larger one"
            raise SweepError(
                f"--search grid: expected only choice and integer, got {got}; use choice([...]), or --search random"
            )
        if buildable > num_trials:
            raise SweepError(
                f"--search grid: expected a trial for each of {buildable} settings, got {num_trials}; "
                f"use --trials {buildable}"
            )
    return space, num_trials if buildable is None else min(num_trials, buildable)


def _open(
    folder: Path, asked: Record, tracking_uri: str, experiment_id: str, resume: bool, parent_tags: dict[str, str]
) -> SweepRun:
    """Create the parent run and sweep.json, or compare them with those of the sweep that is resumed."""
    client = MlflowClient(tracking_uri=tracking_uri)
    asked = replace(asked, experiment=client.get_experiment(experiment_id).name)
    record = _resume(folder, asked) if resume else _start(folder, asked, client, experiment_id, parent_tags)
    return SweepRun(
        record.name,
        tracking_uri,
        experiment_id,
        record.parent_run_id,
        record.metric,
        record.mode,
        record.max_epochs,
        tuple(record.also.items()),
    )


def _train_all(train: Train, space: Space, run: SweepRun, folder: Path, options: SweepOptions) -> bool:
    """The search, then the repeats; False if the time budget was spent first."""
    record, limits = read_json(folder / RECORD, Record), read_json(folder / LIMITS, Limits)
    default = options.default if options.default and contains(space, options.default) else None
    plan = SearchPlan(limits.num_trials, record.grace_epochs, record.seed, limits.at_once, record.method, default)
    trial = make_trial(train, run, Path.cwd(), folder)
    EndOfTrial.started[run.parent_run_id] = run
    if not search(trial, space, run, plan, folder, options.constraint):
        return False
    if record.repeats == 1:
        return True
    again = missing_repeats(read_trials(run), record.repeats, default)
    return repeat(trial, again, run, limits.at_once, folder)


def missing_repeats(
    trials: list[TrialRow], repeats: int, default: Mapping[str, Value] | None
) -> list[tuple[str, int, Mapping[str, Value]]]:
    """(trial_id, number of the repeat, overrides) of what is still to be trained with other seeds: the best finished
    trials and the default setting.

    Args:
        trials: best first.
    """
    finished = [row for row in trials if row.status == "finished" and not row.repeat and row.score is not None]
    wanted = finished[:REPEATED] + [row for row in finished[REPEATED:] if row.overrides == default]
    done = {(row.repeat_of, row.repeat) for row in trials if row.repeat and row.status == "finished"}
    return [
        (row.trial_id, number, row.overrides)
        for row in wanted
        for number in range(1, repeats)
        if (row.trial_id, number) not in done
    ]


def _close(run: SweepRun, error: BaseException) -> None:
    """End the parent run and, after an interrupt, the trials that still run.

    Other errors wait for an MLflow that does not answer; a Ctrl-C does not.
    """
    interrupted = isinstance(error, KeyboardInterrupt | SystemExit)
    if interrupted:
        ray.shutdown()  # else a trial that lives on could set its run to RUNNING again
    status = "KILLED" if interrupted or isinstance(error, InterruptedSweepError) else "FAILED"
    client = MlflowClient(tracking_uri=run.tracking_uri) if interrupted else run.client()
    with suppress(MlflowException, OSError):  # the error that ended the sweep says more than MLflow's own
        for row in read_trials(run, client) if status == "KILLED" else ():
            if row.status == "running":
                close_child(client, row.run_id, "interrupted")
        client.set_terminated(run.parent_run_id, status)


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


def _finish(run: SweepRun, folder: Path, space: Space, options: SweepOptions, *, in_time: bool) -> SweepResult:
    """Write the summary and the page, mark the best trial and end the parent run."""
    trials = _ended_trials(run, folder, options, in_time=in_time)
    best = best_trial(trials)
    verdict = judge_trials(trials, folder, run, options.default)
    chosen = next((row for row in trials if row.trial_id == verdict.best), best)
    short = "" if in_time else f"the time budget of {duration(options.time_budget_s or 0)} is spent; --resume goes on"
    command = options.command(chosen.overrides) if options.command and chosen else ""
    report = page.Report(
        run.name, run.objectives, trials, verdict, read_refused(folder), space, options.default, command,
        folder / CROPS, read_json(folder / RECORD, Record), short,
    )  # fmt: skip
    client = run.client()
    for file in (summary.write(trials, folder, metric=run.metric), page.write(report, folder)):
        client.log_artifact(run.parent_run_id, str(file), "sweep")
    if best is None or chosen is None or best.score is None:
        first = next((row.reason for row in trials if row.reason), "no reason recorded")
        raise SweepError(
            f"sweep {run.name!r}: expected a trial with a result, got {len(trials)} without one; the first: {first}"
        )
    _mark(run, trials, best, chosen, verdict, command)
    write_live(folder, len(trials), 0, done=in_time)
    return SweepResult(
        best.overrides, best.score, trials, run.parent_run_id, folder, verdict, chosen, run.metric, command, short
    )


def _ended_trials(run: SweepRun, folder: Path, options: SweepOptions, *, in_time: bool) -> list[TrialRow]:
    """All trials, after those that nobody trains any more were closed in MLflow.

    Raises:
        InterruptedSweepError: fewer trials have ended than there should be.
    """
    trials = read_trials(run)
    ended = [row for row in trials if row.status in ("finished", "stopped", "failed") and not row.repeat]
    expected = read_json(folder / LIMITS, Limits).num_trials
    if in_time and len(ended) < expected and not read_refused(folder).exhausted:
        raise InterruptedSweepError(
            f"sweep {run.name!r}: expected {expected} ended trials, got {len(ended)} when interrupted; resume it"
        )
    if not in_time and not any(row.status in ("finished", "stopped") for row in ended):
        reached = max((row.epochs for row in trials), default=0)
        raise InterruptedSweepError(
            f"sweep {run.name!r}: expected a finished trial within {duration(options.time_budget_s or 0)}, got none "
            f"(epoch {reached} of {run.max_epochs}); resume it with a larger --time-budget"
        )
    # In time: Tune was killed before it saved a trial, and has started another in its place.
    status, reason = ("abandoned", "its record was lost when the sweep was killed") if in_time else ("interrupted", "")
    for row in trials:
        if row.status == "running":
            close_child(run.client(), row.run_id, status, reason)
    return [replace(row, status=status, reason=reason) if row.status == "running" else row for row in trials]


def judge_trials(trials: list[TrialRow], folder: Path, run: SweepRun, default: Mapping[str, Value] | None) -> Verdict:
    """Compare the finished trials by their per-tile scores; repeats count for the setting that they repeat."""
    finished = [row for row in trials if row.status == "finished"]
    settings = []
    for row in finished:
        if row.repeat:
            continue
        same = [row, *(each for each in finished if each.repeat_of == row.trial_id)]
        tiles = [kept_tiles(folder / TILES / f"{each.trial_id}.json")[1] for each in same]
        cost = next((row.values[name] for name, _ in run.also if name.startswith("ms_") and name in row.values), None)
        seconds = row.values.get(SECONDS) if cost is None else cost
        settings.append(Scored(row.trial_id, row.overrides, tuple(each for each in tiles if each), seconds))
    best = best_trial(trials)
    of_default = next((each.trial_id for each in settings if each.overrides == default), None)
    return judge(settings, metric=run.metric, mode=run.mode, default=of_default, best=best.trial_id if best else None)


def _mark(
    run: SweepRun, trials: list[TrialRow], best: TrialRow, chosen: TrialRow, verdict: Verdict, command: str
) -> None:
    """Write the outcome to MLflow: scores of the trials to sort by, the parent's description, its end."""
    client = run.client()
    for row in trials:
        if row.marked == (row is best) and row.recorded == row.score:
            continue  # of 1,000 trials almost all
        tags = [RunTag(BEST_TAG, str(row is best).lower())]
        now = int(time.time() * 1000)
        scores = [] if row.score is None else [Metric(best_name(run), row.score, now, 0)]
        client.log_batch(row.run_id, metrics=scores, tags=tags)
    client.log_metric(run.parent_run_id, best_name(run), best.score or 0.0)
    client.set_tag(run.parent_run_id, "sdan.best_run_id", best.run_id)
    client.set_tag(run.parent_run_id, "sdan.best_overrides", json.dumps(best.overrides, sort_keys=True))
    client.set_tag(run.parent_run_id, "sdan.chosen_run_id", chosen.run_id)
    note = "\n\n".join([str(verdict), *([f"`{command}`"] if command else [])])
    client.set_tag(run.parent_run_id, NOTE_TAG, note)
    client.set_terminated(run.parent_run_id)


def _start(
    folder: Path, asked: Record, client: MlflowClient, experiment_id: str, parent_tags: dict[str, str]
) -> Record:
    parent = client.create_run(experiment_id, tags={**parent_tags, SWEEP_TAG: asked.name}, run_name=asked.name)
    record = Record(**{**asdict(asked), "parent_run_id": parent.info.run_id})
    for key in ("metric", "mode", "num_trials", "max_epochs", "grace_epochs", "seed", "method", "repeats"):
        client.log_param(parent.info.run_id, f"sweep.{key}", getattr(record, key))
    for parameter, text in record.space.items():
        client.log_param(parent.info.run_id, f"space.{parameter}", text)
    write_json(folder / RECORD, record)
    return record


def _resume(folder: Path, asked: Record) -> Record:
    record = read_json(folder / RECORD, Record)
    for key, value in asdict(record).items():
        got = getattr(asked, key)
        if key == "parent_run_id" or got == value or (key in ("num_trials", "repeats") and got > value):
            continue
        raise SweepError(
            f"sweep {record.name!r}, {key}: expected {value} (as at its start), got {got}; resume with that value"
        )
    record = replace(record, num_trials=asked.num_trials, repeats=asked.repeats)
    write_json(folder / RECORD, record)
    return record


def _prepare_folder(folder: Path, resume: bool) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left in () if resume else folder.iterdir():  # by a start that was killed before it recorded anything
            shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
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

"""What a sweep writes to MLflow: one parent run, and one child run per trial, which a restarted trial reuses."""

import functools
import json
import logging
import math
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar, cast

from mlflow import MlflowClient
from mlflow.entities import Metric, Run, RunTag
from mlflow.exceptions import MlflowException
from ray import tune

from tuning.folder import read_limits, write_live
from tuning.plan import duration, rounds
from tuning.space import Value

logger = logging.getLogger(__name__)
T = TypeVar("T")

REPEAT = "sdan_repeat"
"""The only entry of the config that Ray Tune hands to the trial of a repeat."""
BEAT_S = 2.0
"""How often a sweep writes live.json."""
_NO_ANSWER = ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE")
"""MLflow's codes for a server that does not answer, or a database that is locked or away."""

PARENT_TAG = "mlflow.parentRunId"
SWEEP_TAG = "sdan.sweep"
TRIAL_TAG = "sdan.trial_id"
OVERRIDES_TAG = "sdan.overrides"
STATUS_TAG = "sdan.status"
REASON_TAG = "sdan.reason"
BEST_TAG = "sdan.best"
EPOCHS_TAG = "sdan.epochs"
"""The last epoch of a trial that has ended."""
REPEAT_TAG = "sdan.repeat"
OF_TAG = "sdan.repeat_of"
NOTE_TAG = "mlflow.note.content"
"""MLflow shows this tag as the run's description."""
NOTHING_LEFT = "sdan_nothing_left"
"""In the last result that Ray Tune gets of a trial: its train function has returned."""
SECONDS = "trial_seconds"
PATIENCE_S = 300.0
"""How long a sweep waits for an MLflow that does not answer."""
RETRY_S = 3.0
MOST_HISTORIES = 100
"""Trials whose learning curves are read, the best ones: MLflow takes a request for each."""


@dataclass(frozen=True)
class SweepRun:
    """Where and how a sweep's trials are recorded; sent to every trial.

    Ray Tune pickles it, inside EndOfTrial and without its address, into a sweep's folder: keep both names and these
    fields, so that sweeps can be resumed.
    """

    name: str
    tracking_uri: str
    experiment_id: str
    parent_run_id: str
    metric: str
    mode: str
    max_epochs: int
    also: tuple[tuple[str, str], ...] = ()
    """Further objectives: (metric, mode)."""

    @property
    def objectives(self) -> dict[str, str]:
        """Metric -> mode, the main one first."""
        return {self.metric: self.mode, **dict(self.also)}

    def client(self) -> MlflowClient:
        """A client that waits while MLflow does not answer."""
        return cast("MlflowClient", PatientClient(self.tracking_uri))


class PatientClient:
    """An MlflowClient whose calls are repeated, for at most PATIENCE_S, while the server or database does not answer:
    a sweep of hours must not lose a trial because MLflow restarts."""

    def __init__(self, tracking_uri: str) -> None:
        # MLflow's own seven retries wait up to two minutes each: a server that was away for one is noticed too late.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"  # the address may hold a password
        self._client = MlflowClient(tracking_uri=tracking_uri)

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._client, name)
        if not callable(call):
            return call

        @functools.wraps(call)
        def patient(*arguments: Any, **options: Any) -> Any:
            return patiently(lambda: call(*arguments, **options))

        return patient


def patiently(call: Callable[[], T], *, patience_s: float = PATIENCE_S, retry_s: float = RETRY_S) -> T:
    """The result of `call`, which is repeated while MLflow does not answer.

    Raises:
        MlflowException: it still does not answer after `patience_s`, or it refuses the call.
    """
    give_up = time.monotonic() + patience_s
    while True:
        try:
            return call()
        except MlflowException as error:
            if error.error_code not in _NO_ANSWER or time.monotonic() > give_up:
                raise
            logger.warning("MLflow does not answer; trying again: %s", str(error).partition("\n")[0][:200])
        except OSError as error:  # an artifact store that does not answer
            if time.monotonic() > give_up:
                raise
            logger.warning("MLflow's store does not answer; trying again: %s", error)
        time.sleep(retry_s)


@dataclass(frozen=True)
class TrialKey:
    """Which trial, and with which seed."""

    trial_id: str
    repeat: int = 0
    """0: in the search; 1, 2, ...: the setting trained again with another seed."""
    repeat_of: str = ""
    """The trial_id in the search whose setting a repeat trains."""


def identify(config: Mapping[str, Any], trial_id: str) -> tuple[TrialKey, dict[str, Value]]:
    """(key, overrides) of a trial, from what Ray Tune hands it; those of repeats are below REPEAT (`repeat_config`)."""
    if REPEAT not in config:
        return TrialKey(trial_id), dict(config)
    again = config[REPEAT]
    key = TrialKey(f"{again['of']}-r{again['repeat']}", int(again["repeat"]), str(again["of"]))
    return key, dict(again["overrides"])


def repeat_config(of: str, repeat: int, overrides: Mapping[str, Value]) -> dict[str, Any]:
    """What Ray Tune hands to the trial that trains the setting of trial `of` again."""
    return {"of": of, "repeat": repeat, "overrides": dict(overrides)}


@dataclass(frozen=True)
class TrialRow:
    """One trial, as recorded in MLflow."""

    trial_id: str
    run_id: str
    overrides: dict[str, Value]
    status: str
    """running, finished, stopped (by ASHA), failed, interrupted, or abandoned (Tune lost its record in a kill)."""
    score: float | None
    """The best value of the sweep's metric over the trial's epochs."""
    epochs: int
    history: tuple[tuple[int, float], ...]
    """(epoch, metric) in order; empty for trials that have ended and are not among the best MOST_HISTORIES."""
    reason: str
    """Why the trial failed, one line; empty if it did not."""
    repeat: int = 0
    repeat_of: str = ""
    values: Mapping[str, float] = field(default_factory=dict)
    """The last value of each objective of the sweep, and SECONDS."""
    marked: bool = field(default=False, compare=False)
    """Whether its run has the tag of the best trial."""
    recorded: float | None = field(default=None, compare=False)
    """The score as its run has it, to sort runs by; None: not yet."""


def open_child(run: SweepRun, key: TrialKey, overrides: Mapping[str, Value]) -> Run:
    """The trial's child run: the existing one after a restart, else a new one with its overrides as params."""
    client = run.client()
    found = find_child(run, key.trial_id)
    if found is not None:
        if found.data.tags.get(STATUS_TAG) != "finished":
            client.update_run(found.info.run_id, status="RUNNING")
            client.set_tag(found.info.run_id, STATUS_TAG, "running")
            client.set_tag(found.info.run_id, REASON_TAG, "")
        return found
    tags = {
        PARENT_TAG: run.parent_run_id,
        SWEEP_TAG: run.name,
        TRIAL_TAG: key.trial_id,
        OVERRIDES_TAG: json.dumps(dict(overrides), sort_keys=True),
        STATUS_TAG: "running",
        BEST_TAG: "false",
    }
    if key.repeat:
        tags |= {REPEAT_TAG: str(key.repeat), OF_TAG: key.repeat_of}
    child = client.create_run(run.experiment_id, tags=tags, run_name=f"{run.name}-{key.trial_id}")
    for name, value in sorted(overrides.items()):
        client.log_param(child.info.run_id, name, value)
    return child


def find_child(run: SweepRun, trial_id: str) -> Run | None:
    """The trial's child run, or None before it has one."""
    query = f"tags.`{PARENT_TAG}` = '{run.parent_run_id}' and tags.`{TRIAL_TAG}` = '{trial_id}'"
    found = run.client().search_runs([run.experiment_id], filter_string=query, max_results=1)
    return found[0] if found else None


def log_metrics(client: MlflowClient, run_id: str, metrics: Mapping[str, float], epoch: int) -> None:
    """Write each metric at `epoch` unless it has a value there.

    A restarted trial repeats epochs, and a train function may write to the child run directly.
    """
    for name, value in metrics.items():
        if all(entry.step != epoch for entry in client.get_metric_history(run_id, name)):
            client.log_metric(run_id, name, value, step=epoch)


def log_best(client: MlflowClient, run: SweepRun, run_id: str) -> None:
    """Write a trial's score, that of its best epoch, as a metric to sort runs by, and its last epoch."""
    history = _history(client, run, run_id)
    score = _score(run, history)
    if score is not None:
        metric = Metric(best_name(run), score, int(time.time() * 1000), 0)
        client.log_batch(run_id, metrics=[metric], tags=[RunTag(EPOCHS_TAG, str(history[-1][0]))])


def best_name(run: SweepRun) -> str:
    """The metric of `log_best`."""
    return f"best_{run.metric}"


def close_child(client: MlflowClient, run_id: str, status: str, reason: str = "") -> None:
    """End a child run with this status: finished, stopped, failed, interrupted or abandoned."""
    client.set_tag(run_id, STATUS_TAG, status)
    if reason:
        client.set_tag(run_id, REASON_TAG, reason[:500])
    ended_well = status in ("finished", "stopped")
    client.set_terminated(run_id, "FINISHED" if ended_well else "FAILED" if status == "failed" else "KILLED")


class TimeIsUpError(Exception):
    """The sweep's time budget is spent."""


class EndOfTrial(tune.Callback):
    """Runs in the sweep's own process, in Ray Tune's loop: ends the MLflow runs of trials that cannot do so themselves
    because ASHA stopped them or their process died, prints a line per trial, and ends the sweep in time."""

    folder: Path | None = None
    """The sweep's; sweeps of older versions were pickled without it."""
    started: ClassVar[dict[str, SweepRun]] = {}
    """parent_run_id -> a sweep that this process has started or resumed."""

    def __init__(self, run: SweepRun, folder: Path | None = None) -> None:
        self.run = run
        self.folder = folder

    def __getstate__(self) -> dict[str, Any]:
        # Ray Tune writes this to a file, and MLflow's address may hold a password.
        return self.__dict__ | {"run": replace(self.run, tracking_uri="")}

    def setup(self, *arguments: Any, **info: Any) -> None:
        """Once per start or resume, before the first trial. A resumed sweep's MLflow may have another address."""
        self.run = self.started.get(self.run.parent_run_id, self.run)
        self.pace = Pace(time.monotonic())
        self.limits = read_limits(self.folder)
        self.limits_read = 0.0

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """End the sweep if its time is up, and show `sdan status` that it lives."""
        now = time.monotonic()
        if self.folder is not None and now - self.limits_read > BEAT_S:
            self.limits_read = now
            states = Counter(str(trial.status) for trial in trials)
            write_live(self.folder, states["TERMINATED"] + states["ERROR"], states["RUNNING"])
        if self.limits.ends_at is not None and time.time() > self.limits.ends_at:
            raise TimeIsUpError

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        key, overrides = identify(trial.config, trial.trial_id)
        self.pace.start(key.trial_id, time.monotonic())
        logger.info("%s started with %s", _label(trials, trial), _settings(overrides))

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        key, _ = identify(trial.config, trial.trial_id)
        child = find_child(self.run, key.trial_id)
        if child is not None and child.data.tags.get(STATUS_TAG) != "finished":
            client = self.run.client()
            log_best(client, self.run, child.info.run_id)
            close_child(client, child.info.run_id, "stopped")
        self._log_end(trials, trial, key)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        # A trial that died before it opened its run gets one here.
        key, overrides = identify(trial.config, trial.trial_id)
        child = find_child(self.run, key.trial_id) or open_child(self.run, key, overrides)
        if child.data.tags.get(STATUS_TAG) != "failed":
            close_child(self.run.client(), child.info.run_id, "failed", f"the trial's process died: {_cause(trial)}")
        self._log_end(trials, trial, key)

    def _log_end(self, trials: Sequence[Any], trial: Any, key: TrialKey) -> None:
        """Log one line: how the trial ended, its best epoch, its settings, and the time left."""
        self.pace.end(key.trial_id, time.monotonic())
        child = find_child(self.run, key.trial_id)
        if child is None:
            return
        row, label = _row(self.run.client(), self.run, child), _label(trials, trial)
        total = len(trials) if key.repeat else max(self.limits.num_trials, len(trials))
        left = self.pace.left(total, self.limits.at_once)
        if row.score is None:
            logger.info("%s %s: %s%s", label, row.status, row.reason or "no result", left)
            return
        epoch = next(epoch for epoch, value in row.history if value == row.score)
        shown = _settings(row.overrides)
        logger.info(
            "%s %s: %s %.4f at epoch %d, with %s%s", label, row.status, self.run.metric, row.score, epoch, shown, left
        )


@dataclass
class Pace:
    """How long trials take, for the time that is left; one for each start or resume."""

    began: float
    starts: dict[str, float] = field(default_factory=dict)
    spent: dict[str, float] = field(default_factory=dict)

    def start(self, trial_id: str, now: float) -> None:
        self.starts[trial_id] = now

    def end(self, trial_id: str, now: float) -> None:
        if trial_id in self.starts:
            self.spent[trial_id] = now - self.starts[trial_id]

    def left(self, total: int, at_once: int) -> str:
        """E.g. "; 3 of 8 ended, about 12 min left"; '' before the first has ended, and after the last."""
        ended = len(self.spent)
        if not 0 < ended < total:
            return ""
        mean = sum(self.spent.values()) / ended
        return f"; {ended} of {total} ended, about {duration(mean * rounds(total - ended, at_once))} left"


def _label(trials: Sequence[Any], trial: Any) -> str:
    """E.g. "trial 3 (1f2a_00002)", counted from 1 in the order of the sweep."""
    key, _ = identify(trial.config, trial.trial_id)
    if key.repeat:
        return f"trial {key.repeat_of} with seed {key.repeat + 1} ({key.trial_id})"
    numbers = {each.trial_id: number for number, each in enumerate(trials, 1)}
    return f"trial {numbers.get(trial.trial_id, len(numbers) + 1)} ({trial.trial_id})"


def _settings(overrides: Mapping[str, Any]) -> str:
    """E.g. "model.packing_kernel=4, loss.align_weight=0.3142"."""
    shown = {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in overrides.items()}
    return ", ".join(f"{name}={value}" for name, value in shown.items())


def read_trials(run: SweepRun, client: MlflowClient | None = None) -> list[TrialRow]:
    """All trials of a sweep, repeats included, best first; trials without a score come last.

    Args:
        client: None: one that waits while MLflow does not answer.
    """
    client = client or run.client()
    query = f"tags.`{PARENT_TAG}` = '{run.parent_run_id}' and tags.`{SWEEP_TAG}` = '{run.name}'"
    rows: list[TrialRow] = []
    page = client.search_runs([run.experiment_id], filter_string=query)
    while True:
        rows.extend(_ended_row(run, child) or _row(client, run, child) for child in page)
        if not page.token:
            break
        page = client.search_runs([run.experiment_id], filter_string=query, page_token=page.token)
    sign = -1.0 if run.mode == "max" else 1.0
    rows.sort(key=lambda row: (math.inf if row.score is None else sign * row.score, row.trial_id))
    for number, row in enumerate(rows[:MOST_HISTORIES]):
        if row.score is not None and not row.history:
            rows[number] = replace(row, history=_history(client, run, row.run_id))
    return rows


def best_trial(trials: Sequence[TrialRow]) -> TrialRow | None:
    """The first trial of the search with a score that finished or was stopped by ASHA. `trials` is sorted by
    read_trials."""
    ended = (row for row in trials if row.status in ("finished", "stopped") and not row.repeat)
    return next((row for row in ended if row.score is not None), None)


def _ended_row(run: SweepRun, child: Run) -> TrialRow | None:
    """The row of a trial that has ended with a score, without its history, from what `log_best` wrote."""
    tags, score = child.data.tags, child.data.metrics.get(best_name(run))
    if tags.get(STATUS_TAG) not in ("finished", "stopped") or EPOCHS_TAG not in tags or score is None:
        return None  # or a trial of an older version
    return _as_row(run, child, (), score, int(tags[EPOCHS_TAG]))


def _row(client: MlflowClient, run: SweepRun, child: Run) -> TrialRow:
    history = _history(client, run, child.info.run_id)
    return _as_row(run, child, history, _score(run, history), history[-1][0] if history else 0)


def _as_row(
    run: SweepRun, child: Run, history: tuple[tuple[int, float], ...], score: float | None, epochs: int
) -> TrialRow:
    tags = child.data.tags
    return TrialRow(
        trial_id=tags[TRIAL_TAG],
        run_id=child.info.run_id,
        overrides=json.loads(tags[OVERRIDES_TAG]),
        status=tags.get(STATUS_TAG, "running"),
        score=score,
        epochs=epochs,
        history=history,
        reason=tags.get(REASON_TAG, ""),
        repeat=int(tags.get(REPEAT_TAG, "0")),
        repeat_of=tags.get(OF_TAG, ""),
        values={name: child.data.metrics[name] for name in (*run.objectives, SECONDS) if name in child.data.metrics},
        marked=tags.get(BEST_TAG) == "true",
        recorded=child.data.metrics.get(best_name(run)),
    )


def _history(client: MlflowClient, run: SweepRun, run_id: str) -> tuple[tuple[int, float], ...]:
    """(epoch, metric) in order, without epoch 0, which is the untrained network."""
    every = client.get_metric_history(run_id, run.metric)
    return tuple(sorted({entry.step: entry.value for entry in every if entry.step > 0}.items()))


def _score(run: SweepRun, history: Sequence[tuple[int, float]]) -> float | None:
    """The best value of the sweep's metric; None before the first epoch."""
    pick = max if run.mode == "max" else min
    return pick((value for _, value in history), default=None)


def _cause(trial: Any) -> str:
    """The last exception in Tune's error.txt of the trial, or the file's first line."""
    record = Path(trial.local_path or "") / "error.txt"
    text = record.read_text() if record.is_file() else ""
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("Failure #")]
    named = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
    return (named[-1:] or lines[:1] or ["no reason recorded"])[0]

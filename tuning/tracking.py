"""What a sweep writes to MLflow: one parent run, and one child run per trial, which a restarted trial reuses."""

import json
import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Run
from ray import tune

from tuning.space import Value

logger = logging.getLogger(__name__)

PARENT_TAG = "mlflow.parentRunId"
SWEEP_TAG = "sdan.sweep"
TRIAL_TAG = "sdan.trial_id"
OVERRIDES_TAG = "sdan.overrides"
STATUS_TAG = "sdan.status"
REASON_TAG = "sdan.reason"
BEST_TAG = "sdan.best"


@dataclass(frozen=True)
class SweepRun:
    """Where and how a sweep's trials are recorded; sent to every trial.

    Ray Tune pickles it, inside EndOfTrial, into a sweep's folder: keep both names and these fields, so that sweeps can
    be resumed.
    """

    name: str
    tracking_uri: str
    experiment_id: str
    parent_run_id: str
    metric: str
    mode: str
    max_epochs: int

    def client(self) -> MlflowClient:
        return MlflowClient(tracking_uri=self.tracking_uri)


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
    """(epoch, metric) in order."""
    reason: str
    """Why the trial failed, one line; empty if it did not."""


def open_child(run: SweepRun, trial_id: str, overrides: Mapping[str, Value]) -> Run:
    """The trial's child run: the existing one after a restart, else a new one with its overrides as params."""
    client = run.client()
    found = find_child(run, trial_id)
    if found is not None:
        if found.data.tags.get(STATUS_TAG) != "finished":
            client.update_run(found.info.run_id, status="RUNNING")
            client.set_tag(found.info.run_id, STATUS_TAG, "running")
            client.set_tag(found.info.run_id, REASON_TAG, "")
        return found
    tags = {
        PARENT_TAG: run.parent_run_id,
        SWEEP_TAG: run.name,
        TRIAL_TAG: trial_id,
        OVERRIDES_TAG: json.dumps(dict(overrides), sort_keys=True),
        STATUS_TAG: "running",
    }
    child = client.create_run(run.experiment_id, tags=tags, run_name=f"{run.name}-{trial_id}")
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


def close_child(client: MlflowClient, run_id: str, status: str, reason: str = "") -> None:
    """End a child run with this status: finished, stopped, failed, interrupted or abandoned."""
    client.set_tag(run_id, STATUS_TAG, status)
    if reason:
        client.set_tag(run_id, REASON_TAG, reason[:500])
    ended_well = status in ("finished", "stopped")
    client.set_terminated(run_id, "FINISHED" if ended_well else "FAILED" if status == "failed" else "KILLED")


class EndOfTrial(tune.Callback):
    """Ends the MLflow runs of trials that cannot do so themselves because ASHA stopped them or their process died."""

    def __init__(self, run: SweepRun) -> None:
        self.run = run

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        logger.info("%s started with %s", _label(trials, trial), _settings(trial.config))

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        child = find_child(self.run, trial.trial_id)
        if child is not None and child.data.tags.get(STATUS_TAG) != "finished":
            close_child(self.run.client(), child.info.run_id, "stopped")
        _log_end(self.run, _label(trials, trial), trial)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        # A trial that died before it opened its run gets one here.
        child = find_child(self.run, trial.trial_id) or open_child(self.run, trial.trial_id, trial.config)
        if child.data.tags.get(STATUS_TAG) != "failed":
            close_child(self.run.client(), child.info.run_id, "failed", f"the trial's process died: {_cause(trial)}")
        _log_end(self.run, _label(trials, trial), trial)


def _label(trials: Sequence[Any], trial: Any) -> str:
    """E.g. "trial 3 (1f2a_00002)", counted from 1 in the order of the sweep."""
    numbers = {each.trial_id: number for number, each in enumerate(trials, 1)}
    return f"trial {numbers.get(trial.trial_id, len(numbers) + 1)} ({trial.trial_id})"


def _settings(overrides: Mapping[str, Any]) -> str:
    """E.g. "model.packing_kernel=4, loss.align_weight=0.3142"."""
    shown = {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in overrides.items()}
    return ", ".join(f"{name}={value}" for name, value in shown.items())


def _log_end(run: SweepRun, label: str, trial: Any) -> None:
    """Log one line: how the trial ended, its best epoch, and its settings."""
    child = find_child(run, trial.trial_id)
    if child is None:
        return
    row = _row(run.client(), run, child)
    if row.score is None:
        logger.info("%s %s: %s", label, row.status, row.reason or "no result")
        return
    epoch = next(epoch for epoch, value in row.history if value == row.score)
    settings = _settings(row.overrides)
    logger.info("%s %s: %s %.4f at epoch %d, with %s", label, row.status, run.metric, row.score, epoch, settings)


def read_trials(run: SweepRun) -> list[TrialRow]:
    """All trials of a sweep, best first; trials without a score come last."""
    client = run.client()
    query = f"tags.`{PARENT_TAG}` = '{run.parent_run_id}' and tags.`{SWEEP_TAG}` = '{run.name}'"
    rows: list[TrialRow] = []
    page = client.search_runs([run.experiment_id], filter_string=query)
    while True:
        rows.extend(_row(client, run, child) for child in page)
        if not page.token:
            break
        page = client.search_runs([run.experiment_id], filter_string=query, page_token=page.token)
    sign = -1.0 if run.mode == "max" else 1.0
    return sorted(rows, key=lambda row: (math.inf if row.score is None else sign * row.score, row.trial_id))


def best_trial(trials: Sequence[TrialRow]) -> TrialRow | None:
    """The first trial with a score that finished or was stopped by ASHA. `trials` is sorted by read_trials."""
    return next((row for row in trials if row.score is not None and row.status in ("finished", "stopped")), None)


def _row(client: MlflowClient, run: SweepRun, child: Run) -> TrialRow:
    run_id = child.info.run_id
    every = client.get_metric_history(run_id, run.metric)
    steps = {entry.step: entry.value for entry in every if entry.step > 0}  # epoch 0 is the untrained network
    history = tuple(sorted(steps.items()))
    pick = max if run.mode == "max" else min
    tags = child.data.tags
    return TrialRow(
        trial_id=tags[TRIAL_TAG],
        run_id=run_id,
        overrides=json.loads(tags[OVERRIDES_TAG]),
        status=tags.get(STATUS_TAG, "running"),
        score=pick(steps.values()) if steps else None,
        epochs=history[-1][0] if history else 0,
        history=history,
        reason=tags.get(REASON_TAG, ""),
    )


def _cause(trial: Any) -> str:
    """The last exception in Tune's error.txt of the trial, or the file's first line."""
    record = Path(trial.local_path or "") / "error.txt"
    text = record.read_text() if record.is_file() else ""
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("Failure #")]
    named = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
    return (named[-1:] or lines[:1] or ["no reason recorded"])[0]

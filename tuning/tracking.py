"""What a sweep writes to MLflow: one parent run, and one child run per trial that is found again after a restart."""

import json
import logging
import math
import re
from collections.abc import Mapping
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
STATUS_TAG = "sdan.status"  # running, finished, stopped (by ASHA), failed, interrupted, abandoned
REASON_TAG = "sdan.reason"
BEST_TAG = "sdan.best"


@dataclass(frozen=True)
class SweepRun:
    """Where a sweep's trials are recorded; travels to every trial."""

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
    """One trial as MLflow knows it."""

    trial_id: str
    run_id: str
    overrides: dict[str, Value]
    status: str
    """finished, stopped (by ASHA), failed, running, interrupted or abandoned (its record was lost in a kill)."""
    score: float | None
    """The best value of the sweep's metric over the trial's epochs."""
    epochs: int
    history: tuple[tuple[int, float], ...]
    """(epoch, metric) in order."""
    reason: str
    """Why a failed trial failed, one line."""


def open_experiment(client: MlflowClient, name: str, tracking_uri: str, artifacts: Path) -> str:
    """The experiment's id; a new one in a local database keeps its artifacts in `artifacts`, not the working folder."""
    found = client.get_experiment_by_name(name)
    if found is not None:
        return str(found.experiment_id)
    local = tracking_uri.startswith("sqlite:")
    return client.create_experiment(name, artifact_location=artifacts.as_uri() if local else None)


def open_child(run: SweepRun, trial_id: str, overrides: Mapping[str, Value]) -> Run:
    """The trial's child run: the one it had before a restart, or a new one with its overrides as params."""
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
    query = f"tags.`{PARENT_TAG}` = '{run.parent_run_id}' and tags.`{TRIAL_TAG}` = '{trial_id}'"
    found = run.client().search_runs([run.experiment_id], filter_string=query, max_results=1)
    return found[0] if found else None


def log_metrics(client: MlflowClient, run_id: str, metrics: Mapping[str, float], epoch: int) -> None:
    """Writes each metric at `epoch` unless it stands there: a restarted trial, or a train function that writes to the
    child run itself, must not give a step two values."""
    for name, value in metrics.items():
        if all(entry.step != epoch for entry in client.get_metric_history(run_id, name)):
            client.log_metric(run_id, name, value, step=epoch)


def close_child(client: MlflowClient, run_id: str, status: str, reason: str = "") -> None:
    """Ends a child run as finished, stopped, failed, interrupted or abandoned."""
    client.set_tag(run_id, STATUS_TAG, status)
    if reason:
        client.set_tag(run_id, REASON_TAG, reason[:500])
    ended_well = status in ("finished", "stopped")
    client.set_terminated(run_id, "FINISHED" if ended_well else "FAILED" if status == "failed" else "KILLED")


class EndOfTrial(tune.Callback):
    """Closes in MLflow what a trial cannot close itself: it was stopped by ASHA, or its process died."""

    def __init__(self, run: SweepRun) -> None:
        self.run = run

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        child = find_child(self.run, trial.trial_id)
        if child is not None and child.data.tags.get(STATUS_TAG) != "finished":
            close_child(self.run.client(), child.info.run_id, "stopped")
        _say(self.run, trial, trial.last_result)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        child = open_child_of(self.run, trial)
        if child.data.tags.get(STATUS_TAG) != "failed":
            close_child(self.run.client(), child.info.run_id, "failed", f"the trial's process died: {_cause(trial)}")
        _say(self.run, trial, {})


def _say(run: SweepRun, trial: Any, result: Mapping[str, Any]) -> None:
    score = f"{run.metric} {result[run.metric]:.4f} at epoch {result['epoch']}" if run.metric in result else "failed"
    logger.info("%s: trial %s %s: %s", run.name, trial.trial_id, trial.config, score)


def open_child_of(run: SweepRun, trial: Any) -> Run:
    """As open_child, for a trial that may have died before it made its run; leaves an existing run as it is."""
    return find_child(run, trial.trial_id) or open_child(run, trial.trial_id, trial.config)


def read_trials(run: SweepRun) -> list[TrialRow]:
    """All trials of a sweep, best first; those without a score last."""
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


def best_trial(trials: list[TrialRow]) -> TrialRow | None:
    """The best trial that was not abandoned or failed; `trials` as read_trials sorts them."""
    return next((row for row in trials if row.score is not None and row.status in ("finished", "stopped")), None)


def _row(client: MlflowClient, run: SweepRun, child: Run) -> TrialRow:
    run_id = child.info.run_id
    every = client.get_metric_history(run_id, run.metric)
    steps = {entry.step: entry.value for entry in every if entry.step > 0}  # 0: before training, the same for all
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
    """The last exception that Tune's own record of the failure names, or the record's first line."""
    record = Path(trial.local_path or "") / "error.txt"
    text = record.read_text() if record.is_file() else ""
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("Failure #")]
    named = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
    return (named[-1:] or lines[:1] or ["no reason recorded"])[0]

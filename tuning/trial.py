"""One trial: runs the train function with its overrides and passes its reports to Ray Tune and MLflow."""

import json
import math
import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ray import tune
from ray.util.queue import Queue

from tuning.space import SweepError, Value
from tuning.tracking import (
    NOTHING_LEFT,
    SECONDS,
    STATUS_TAG,
    SweepRun,
    TrialKey,
    close_child,
    identify,
    log_best,
    log_metrics,
    open_child,
)

TILES = "tiles"
"""Folder in the sweep's folder: one file per trial with the per-tile scores of its best epoch."""
_MOST_BYTES = 64_000_000
READY_S = 60
"""How long the next trial in a process waits for the end of the one before, which takes far less than a second."""
Deliver = Callable[[dict[str, float], dict[str, float] | None], None]


class Report:
    """The train function calls it once per epoch: report({"epoch": 3, "val_psnr": 27.1, "loss": 0.04}).

    Without "epoch" the reports are counted from 1. Every report must contain the sweep's metric; if that is not finite,
    the trial has diverged and fails. A report may be pickled and called in any process of the Ray cluster, such as a
    Ray Train controller. In the trial's process it returns after ASHA has decided, and raises SystemExit if the trial
    is stopped. In other processes it returns at once, and Ray ends the processes of a stopped trial.

    Attributes:
        run_id: the trial's MLflow run. A train function that logs more than it reports writes to this run instead of
            creating one; a metric that it has written at an epoch is not written again. It should not end the run.
        parent_run_id: the sweep's MLflow run.
        trial_id: stays the same when a killed sweep is resumed, so checkpoints can be named after it.
        repeat: 0 in the search; 1, 2, ... when a setting is trained again, which needs another seed.
    """

    def __init__(self, run: SweepRun, run_id: str, key: TrialKey, deliver: Deliver) -> None:
        self.run_id = run_id
        self.parent_run_id = run.parent_run_id
        self.trial_id = key.trial_id
        self.repeat = key.repeat
        self._metric = run.metric
        self._deliver = deliver
        self._queue: Queue | None = None
        self._pump: threading.Thread | None = None
        self._pump_error: BaseException | None = None

    def __call__(self, metrics: Mapping[str, float], tiles: Mapping[str, float] | None = None) -> None:
        """Deliver the metrics of one epoch.

        Args:
            tiles: the sweep's metric of each held-out tile by "SEQUENCE/REST", always the same tiles. Those of the best
                epoch are kept; tuning/winners.py compares trials by them.

        Raises:
            SweepError: a value is not a number, or the sweep's metric is missing or not finite.
        """
        values = _as_numbers(metrics)
        if self._metric not in values:
            raise SweepError(f"report: expected the sweep's metric {self._metric!r}, got only {sorted(values)}")
        if not math.isfinite(values[self._metric]):
            raise SweepError(
                f"report, {self._metric}: expected a finite number, got {values[self._metric]}; the trial diverged"
            )
        self._deliver(values, None if tiles is None else _as_numbers(tiles))

    def close(self) -> None:
        """Wait until every report from other processes has been delivered."""
        if self._queue is not None and self._pump is not None:
            self._queue.put(None)
            self._pump.join()
            self._queue.shutdown(force=True)
        if self._pump_error is not None:
            raise self._pump_error

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy for another process puts its reports into a queue. The first copy creates the queue."""
        if self._queue is None:
            self._queue = Queue(actor_options={"num_cpus": 0})
            self._pump = threading.Thread(target=self._forward, args=(self._queue,), daemon=True)
            self._pump.start()
        key = TrialKey(self.trial_id, self.repeat)
        return _remote_report, (self.run_id, self.parent_run_id, key, self._metric, self._queue)

    def _forward(self, queue: Queue) -> None:
        while (reported := queue.get()) is not None:
            if self._pump_error is not None:
                continue  # keep emptying the queue; close() raises the first error
            try:
                self._deliver(*reported)
            except Exception as error:
                self._pump_error = error


def _remote_report(run_id: str, parent_run_id: str, key: TrialKey, metric: str, queue: Queue) -> Report:
    report = Report.__new__(Report)
    report.run_id, report.parent_run_id = run_id, parent_run_id
    report.trial_id, report.repeat = key.trial_id, key.repeat
    report._metric, report._queue = metric, queue
    report._deliver = lambda values, tiles: queue.put((values, tiles))
    report._pump = report._pump_error = None
    return report


Train = Callable[[dict[str, Value], Report], Mapping[str, float] | None]


def make_trial(train: Train, run: SweepRun, working_folder: Path, folder: Path) -> Callable[[dict[str, Any]], None]:
    """The function that Ray Tune runs for each trial. Tune compares its name on a restore, so it must not change.

    Args:
        folder: of the sweep; per-tile scores are kept there.
    """

    def sdan_trial(config: dict[str, Any]) -> None:
        os.environ["TUNE_FUNCTION_THREAD_TIMEOUT_S"] = str(READY_S)
        key, overrides = identify(config, tune.get_context().get_trial_id())
        if working_folder.is_dir():
            os.chdir(working_folder)  # Tune changes the working folder, which breaks relative paths
        run_trial(train, run, folder, key, overrides)

    return sdan_trial


def run_trial(train: Train, run: SweepRun, folder: Path, key: TrialKey, overrides: dict[str, Value]) -> None:
    """Run one trial to its end. If the train function raises, record the reason in MLflow and raise it again."""
    client = run.client()
    child = open_child(run, key, overrides)
    run_id = child.info.run_id
    delivery = _Delivery(run, run_id, folder / TILES / f"{key.trial_id}.json")
    if child.data.tags.get(STATUS_TAG) == "finished":
        # It finished after Tune's last save, so Tune runs it again: report the recorded result.
        delivery.replay()
        return
    report = Report(run, run_id, key, delivery)
    began = time.monotonic()
    try:
        returned = train(dict(overrides), report)
        report.close()
        delivery.record_returned(returned)
    except Exception as error:
        # ASHA ends a trial's processes, which the train function may see as a failure of its workers.
        if not delivery.stopped:
            close_child(client, run_id, "failed", reason_of(error))
        raise
    if not child.data.metrics:  # the time of a resumed trial would be too short
        log_metrics(client, run_id, {SECONDS: time.monotonic() - began}, delivery.epoch)
    log_best(client, run, run_id)
    close_child(client, run_id, "finished")
    delivery.finish()


class _Delivery:
    """Passes reports, in the trial's process, to MLflow and then to Tune, which may stop the trial.

    The last epoch's report is held back until the train function has returned: ASHA ends a trial at its last epoch,
    which would cut off the final evaluation and the checkpoint.
    """

    def __init__(self, run: SweepRun, run_id: str, tiles: Path) -> None:
        """Args:
        tiles: the file for the per-tile scores of the best epoch.
        """
        self._run, self._run_id, self._tiles = run, run_id, tiles
        self._client = run.client()
        self._lock = threading.Lock()
        self._best = kept_tiles(tiles)[0]
        self.epoch = 0
        self._reported = False
        self.stopped = False
        self._held: dict[str, Any] | None = None

    def __call__(self, metrics: dict[str, float], tiles: dict[str, float] | None = None) -> None:
        with self._lock:
            self._reported = True
            self.epoch = int(metrics.get("epoch", self.epoch + 1))
            values = {name: value for name, value in metrics.items() if name != "epoch"}
            log_metrics(self._client, self._run_id, values, self.epoch)
            if self.epoch < 1:
                return  # the untrained network says nothing about the trial
            self._keep_tiles(values[self._run.metric], tiles)
            result = {"epoch": self.epoch} | self._objectives(values)
            if self.epoch >= self._run.max_epochs:
                self._held = result
                return
            self._held = None
            try:
                tune.report(result)
            except SystemExit:
                self.stopped = True
                raise

    def _objectives(self, values: Mapping[str, float]) -> dict[str, float]:
        """Those of the sweep's metrics that `values` has."""
        return {name: values[name] for name in self._run.objectives if name in values}

    def _keep_tiles(self, score: float, tiles: Mapping[str, float] | None) -> None:
        """Write the per-tile scores of the best epoch so far; of equal ones the first, as _row in tracking.py."""
        better = self._best is None or (score > self._best if self._run.mode == "max" else score < self._best)
        if tiles and better:
            self._best = score
            self._tiles.parent.mkdir(parents=True, exist_ok=True)
            aside = self._tiles.with_suffix(".part")
            aside.write_text(json.dumps({"score": score, "tiles": dict(tiles)}))
            aside.replace(self._tiles)

    def record_returned(self, returned: Mapping[str, float] | None) -> None:
        """Record the returned metrics. If the train function has reported nothing, they are its only report."""
        values = {name: value for name, value in _as_numbers(returned or {}).items() if name != "epoch"}
        if self._reported:
            log_metrics(self._client, self._run_id, values, self.epoch)
            if self._held is not None:
                self._held = self._objectives(values) | self._held
            return
        metric = self._run.metric
        if last := self._last_recorded():  # resumed after its last epoch, so nothing was left to train
            self.epoch = last["epoch"]
            log_metrics(self._client, self._run_id, values, self.epoch)
            self._held = self._objectives(values) | last
            return
        if metric not in values:
            raise SweepError(f"train: expected a report or a returned {metric!r}, got only {sorted(values)}")
        if not math.isfinite(values[metric]):
            raise SweepError(f"train, {metric}: expected a finite number, got {values[metric]}; the trial diverged")
        self.epoch = 1
        log_metrics(self._client, self._run_id, values, 1)
        self._held = {"epoch": 1} | self._objectives(values)

    def finish(self) -> None:
        """Report the last epoch, which was held back, to Tune; nothing is left to do in this process."""
        if self._held is not None:
            tune.report(self._held | {NOTHING_LEFT: True})

    def replay(self) -> None:
        """Report the result that is recorded in MLflow to Tune."""
        self._held = self._last_recorded()
        self.finish()

    def _last_recorded(self) -> dict[str, Any] | None:
        history = self._client.get_metric_history(self._run_id, self._run.metric)
        last = max(history, key=lambda entry: entry.step, default=None)
        if last is None:
            return None
        recorded = self._client.get_run(self._run_id).data.metrics
        return {"epoch": last.step} | self._objectives(recorded) | {self._run.metric: last.value}


def kept_tiles(path: Path) -> tuple[float | None, dict[str, float]]:
    """(score, per-tile scores) of a trial's best epoch; (None, {}) if it has none, or the file is damaged."""
    try:
        with path.open("rb") as file:
            kept = json.loads(file.read(_MOST_BYTES))
        return float(kept["score"]), {str(name): float(value) for name, value in kept["tiles"].items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None, {}


def _as_numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The metrics as floats; 0-d arrays and tensors count as numbers.

    Raises:
        SweepError: a value is not a number.
    """
    values: dict[str, float] = {}
    for name, value in metrics.items():
        try:
            values[name] = float(value)
        except (TypeError, ValueError):
            raise SweepError(f"report, {name}: expected a number, got {value!r}") from None
    return values


def reason_of(error: BaseException) -> str:
    """One line, 'ValueError: crop too large', for the root cause of an error.

    Ray wraps errors: this unwraps a failed Ray Train run to the error of its first failed worker (or its controller),
    and a Ray task error to its cause. Only the first line of a message is kept.
    """
    failures: dict[int, BaseException] = getattr(error, "worker_failures", None) or {}
    if failures:
        return reason_of(failures[min(failures)])
    inner = getattr(error, "controller_failure", None) or getattr(error, "cause", None)
    if isinstance(inner, BaseException) and inner is not error:
        return reason_of(inner)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"

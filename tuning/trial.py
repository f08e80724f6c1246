"""One trial: runs the train function with its overrides and passes its reports to Ray Tune and MLflow."""

import math
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ray import tune
from ray.util.queue import Queue

from tuning.space import SweepError, Value
from tuning.tracking import STATUS_TAG, SweepRun, close_child, log_metrics, open_child


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
    """

    def __init__(self, run: SweepRun, run_id: str, trial_id: str, deliver: Callable[[dict[str, float]], None]) -> None:
        self.run_id = run_id
        self.parent_run_id = run.parent_run_id
        self.trial_id = trial_id
        self._metric = run.metric
        self._deliver = deliver
        self._queue: Queue | None = None
        self._pump: threading.Thread | None = None
        self._pump_error: BaseException | None = None

    def __call__(self, metrics: Mapping[str, float]) -> None:
        """Deliver the metrics of one epoch.

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
        self._deliver(values)

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
        return _remote_report, (self.run_id, self.parent_run_id, self.trial_id, self._metric, self._queue)

    def _forward(self, queue: Queue) -> None:
        while (metrics := queue.get()) is not None:
            if self._pump_error is not None:
                continue  # keep emptying the queue; close() raises the first error
            try:
                self._deliver(metrics)
            except Exception as error:
                self._pump_error = error


def _remote_report(run_id: str, parent_run_id: str, trial_id: str, metric: str, queue: Queue) -> Report:
    report = Report.__new__(Report)
    report.run_id, report.parent_run_id, report.trial_id = run_id, parent_run_id, trial_id
    report._metric, report._queue, report._deliver = metric, queue, queue.put
    report._pump = report._pump_error = None
    return report


Train = Callable[[dict[str, Value], Report], Mapping[str, float] | None]


def make_trial(train: Train, run: SweepRun, working_folder: Path) -> Callable[[dict[str, Value]], None]:
    """The function that Ray Tune runs for each trial. Tune compares its name on a restore, so it must not change."""

    def sdan_trial(config: dict[str, Value]) -> None:
        run_trial(train, run, working_folder, config)

    return sdan_trial


def run_trial(train: Train, run: SweepRun, working_folder: Path, overrides: dict[str, Value]) -> None:
    """Run one trial to its end. If the train function raises, record the reason in MLflow and raise it again."""
    if working_folder.is_dir():
        os.chdir(working_folder)  # Tune changes the working folder, which breaks relative paths
    trial_id = tune.get_context().get_trial_id()
    client = run.client()
    child = open_child(run, trial_id, overrides)
    run_id = child.info.run_id
    delivery = _Delivery(run, run_id)
    if child.data.tags.get(STATUS_TAG) == "finished":
        # It finished after Tune's last save, so Tune runs it again: report the recorded result.
        delivery.replay()
        return
    report = Report(run, run_id, trial_id, delivery)
    try:
        returned = train(dict(overrides), report)
        report.close()
        delivery.record_returned(returned)
    except Exception as error:
        # ASHA ends a trial's processes, which the train function may see as a failure of its workers.
        if not delivery.stopped:
            close_child(client, run_id, "failed", reason_of(error))
        raise
    close_child(client, run_id, "finished")
    delivery.finish()


class _Delivery:
    """Passes reports, in the trial's process, to MLflow and then to Tune, which may stop the trial.

    The last epoch's report is held back until the train function has returned: ASHA ends a trial at its last epoch,
    which would cut off the final evaluation and the checkpoint.
    """

    def __init__(self, run: SweepRun, run_id: str) -> None:
        self._run, self._run_id = run, run_id
        self._client = run.client()
        self._lock = threading.Lock()
        self._epoch = 0
        self._reported = False
        self.stopped = False
        self._held: dict[str, Any] | None = None

    def __call__(self, metrics: dict[str, float]) -> None:
        with self._lock:
            self._reported = True
            self._epoch = int(metrics.get("epoch", self._epoch + 1))
            values = {name: value for name, value in metrics.items() if name != "epoch"}
            log_metrics(self._client, self._run_id, values, self._epoch)
            if self._epoch < 1:
                return  # the untrained network says nothing about the trial
            result = {"epoch": self._epoch, self._run.metric: values[self._run.metric]}
            if self._epoch >= self._run.max_epochs:
                self._held = result
                return
            self._held = None
            try:
                tune.report(result)
            except SystemExit:
                self.stopped = True
                raise

    def record_returned(self, returned: Mapping[str, float] | None) -> None:
        """Record the returned metrics. If the train function has reported nothing, they are its only report."""
        values = {name: value for name, value in _as_numbers(returned or {}).items() if name != "epoch"}
        if self._reported:
            log_metrics(self._client, self._run_id, values, self._epoch)
            return
        metric = self._run.metric
        if last := self._last_recorded():  # resumed after its last epoch, so nothing was left to train
            log_metrics(self._client, self._run_id, values, last["epoch"])
            self._held = last
            return
        if metric not in values:
            raise SweepError(f"train: expected a report or a returned {metric!r}, got only {sorted(values)}")
        if not math.isfinite(values[metric]):
            raise SweepError(f"train, {metric}: expected a finite number, got {values[metric]}; the trial diverged")
        log_metrics(self._client, self._run_id, values, 1)
        self._held = {"epoch": 1, metric: values[metric]}

    def finish(self) -> None:
        """Report the last epoch, which was held back, to Tune."""
        if self._held is not None:
            tune.report(self._held)

    def replay(self) -> None:
        """Report the result that is recorded in MLflow to Tune."""
        self._held = self._last_recorded()
        self.finish()

    def _last_recorded(self) -> dict[str, Any] | None:
        history = self._client.get_metric_history(self._run_id, self._run.metric)
        last = max(history, key=lambda entry: entry.step, default=None)
        return {"epoch": last.step, self._run.metric: last.value} if last else None


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

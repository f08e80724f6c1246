"""One trial: runs the train function with its overrides and carries its reports to Ray Tune and to MLflow."""

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
    """What a train function calls once per epoch: report({"epoch": 3, "val_psnr": 27.1, "loss": 0.04}).

    Without "epoch" the reports are counted from 1. Every report holds the sweep's metric, and that must be finite:
    a diverged trial ends there as failed. It may be pickled and called in any process of the Ray cluster, such as a
    Ray Train controller; only in the trial's own process does it return after ASHA's verdict (a stopped trial leaves
    by SystemExit), elsewhere it returns at once and a stopped trial's processes are ended from outside.

    Attributes:
        run_id: the trial's MLflow run. A train function that logs more than it reports writes there and creates no
            run of its own; what it has written at an epoch is not written again. It should not end the run.
        parent_run_id: the sweep's MLflow run.
        trial_id: stays the same when a killed sweep is resumed: a name for checkpoints to go on from.
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
        """Raises SweepError when the metric is missing or not finite."""
        values = as_numbers(metrics)
        if self._metric not in values:
            raise SweepError(f"report: got {sorted(values)}, expected the sweep's metric {self._metric!r} among them")
        if not math.isfinite(values[self._metric]):
            raise SweepError(f"report: {self._metric} is {values[self._metric]}; the trial diverged")
        self._deliver(values)

    def close(self) -> None:
        """Waits until every report from other processes has been delivered."""
        if self._queue is not None and self._pump is not None:
            self._queue.put(None)
            self._pump.join()
            self._queue.shutdown(force=True)
        if self._pump_error is not None:
            raise self._pump_error

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy for another process puts its reports into a queue, which is made when the first copy is."""
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
    """The function that Ray Tune runs for each trial. Its name must not change: a restore compares it."""

    def sdan_trial(config: dict[str, Value]) -> None:
        run_trial(train, run, working_folder, config)

    return sdan_trial


def run_trial(train: Train, run: SweepRun, working_folder: Path, overrides: dict[str, Value]) -> None:
    """Runs one trial to its end, or raises what the train function raised after noting the reason in MLflow."""
    if working_folder.is_dir():
        os.chdir(working_folder)  # Tune moves trials to a folder of their own, where relative paths lead nowhere
    trial_id = tune.get_context().get_trial_id()
    client = run.client()
    child = open_child(run, trial_id, overrides)
    run_id = child.info.run_id
    delivery = _Delivery(run, run_id)
    if child.data.tags.get(STATUS_TAG) == "finished":
        # Finished after Tune's last snapshot, so Tune asks again: answer from the record.
        delivery.replay()
        return
    report = Report(run, run_id, trial_id, delivery)
    try:
        returned = train(dict(overrides), report)
        report.close()
        delivery.take_returned(returned)
    except Exception as error:
        # ASHA ends a trial by ending its processes, which the train function may see as a failure of its workers.
        if not delivery.stopped:
            close_child(client, run_id, "failed", reason_of(error))
        raise
    close_child(client, run_id, "finished")
    delivery.finish()


class _Delivery:
    """Takes reports in the trial's process: to MLflow, then to Tune, which may stop the trial there.

    The last epoch's report is kept back until the train function has returned, since ASHA ends a trial at its last
    epoch, and what comes after it (the final evaluation, the checkpoint) would be cut off.
    """

    def __init__(self, run: SweepRun, run_id: str) -> None:
        self._run, self._run_id = run, run_id
        self._client = run.client()
        self._lock = threading.Lock()
        self._epoch = 0
        self._reported = False
        self.stopped = False
        self._kept: dict[str, Any] | None = None

    def __call__(self, metrics: dict[str, float]) -> None:
        with self._lock:
            self._reported = True
            self._epoch = int(metrics.get("epoch", self._epoch + 1))
            values = {name: value for name, value in metrics.items() if name != "epoch"}
            log_metrics(self._client, self._run_id, values, self._epoch)
            if self._epoch < 1:
                return  # before training: nothing to judge the trial by
            result = {"epoch": self._epoch, self._run.metric: values[self._run.metric]}
            if self._epoch >= self._run.max_epochs:
                self._kept = result
                return
            self._kept = None
            try:
                tune.report(result)
            except SystemExit:
                self.stopped = True
                raise

    def take_returned(self, returned: Mapping[str, float] | None) -> None:
        """Records the returned metrics; they are the trial's only report where the train function made none."""
        values = {name: value for name, value in as_numbers(returned or {}).items() if name != "epoch"}
        if self._reported:
            log_metrics(self._client, self._run_id, values, self._epoch)
            return
        metric = self._run.metric
        if last := self._last_recorded():  # resumed after its last epoch: nothing was left to train
            log_metrics(self._client, self._run_id, values, last["epoch"])
            self._kept = last
            return
        if metric not in values:
            raise SweepError(f"train reported nothing and returned {sorted(values)}; expected {metric!r}")
        if not math.isfinite(values[metric]):
            raise SweepError(f"train returned {metric} = {values[metric]}; the trial diverged")
        log_metrics(self._client, self._run_id, values, 1)
        self._kept = {"epoch": 1, metric: values[metric]}

    def finish(self) -> None:
        if self._kept is not None:
            tune.report(self._kept)

    def replay(self) -> None:
        """Gives Tune the result that stands in MLflow."""
        self._kept = self._last_recorded()
        self.finish()

    def _last_recorded(self) -> dict[str, Any] | None:
        history = self._client.get_metric_history(self._run_id, self._run.metric)
        last = max(history, key=lambda entry: entry.step, default=None)
        return {"epoch": last.step, self._run.metric: last.value} if last else None


def as_numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The metrics as floats (0-d arrays and tensors count as numbers), or SweepError that names what is not one."""
    values: dict[str, float] = {}
    for name, value in metrics.items():
        try:
            values[name] = float(value)
        except (TypeError, ValueError):
            raise SweepError(f"report: {name} is {value!r}, expected a number") from None
    return values


def reason_of(error: BaseException) -> str:
    """One line that names the cause; for a failed Ray Train run that is the first worker's error."""
    failures: dict[int, BaseException] = getattr(error, "worker_failures", None) or {}
    if failures:
        return reason_of(failures[min(failures)])
    inner = getattr(error, "controller_failure", None) or getattr(error, "cause", None)
    if isinstance(inner, BaseException) and inner is not error:
        return reason_of(inner)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"

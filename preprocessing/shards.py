"""The preprocessing job: RAW sequences -> one Parquet file per pair, through Ray Data.

A pair's file is named by what it was made from and put in place in one step, so a run that is killed and started again
redoes nothing that was finished, and runs side by side overwrite each other with the same bytes.
"""

import contextlib
import itertools
import json
import logging
import os
import re
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import pyarrow as pa
import ray
import ray.data
import ray.exceptions
from tqdm import tqdm

from preprocessing.estimate import Estimate, Rate, estimate, memory_bytes, tile_bytes
from preprocessing.isolation import IsolatedProcess
from preprocessing.ledger import Ledger
from preprocessing.pairs import PairResult
from preprocessing.plan import PairJob, Plan, PreprocessError, PreprocessOptions, QuarantineEntry, make_plan
from preprocessing.storage import Folder, one_line, open_folder

__all__ = ["PreprocessError", "PreprocessOptions", "PreprocessReport", "QuarantineEntry", "preprocess"]

_RETRIES = 2
_READ_FAULTS = 8
"""So many pairs in a row that a bucket does not give us end the run: each has cost all of a request's retries."""
_CHUNK_PAIRS = 1000
_CHUNK_PAIRS_PER_CPU = 16
"""Enough that CPUs which have nothing to do while the last pairs of a chunk end hardly count."""
_PROCESS = IsolatedProcess()
"""In a Ray worker: the child that serves its tasks. Other processes never start it."""
_DEATHS = (
    ray.exceptions.WorkerCrashedError,
    ray.exceptions.OutOfMemoryError,
    ray.exceptions.NodeDiedError,
    ray.exceptions.ObjectLostError,
)
_EXECUTOR = "ray.data._internal.execution.streaming_executor_state"
"""The logger by which Ray Data 2.60 tells of tasks that it goes on without."""


@dataclass
class PreprocessReport:
    """What one run did, and what SHARDS holds after it."""

    pairs: int = 0
    """Pairs found in RAW."""
    todo: int = 0
    """Those that were neither finished nor given up by an earlier run."""
    written: int = 0
    skipped: int = 0
    """Pairs finished by an earlier run."""
    rows: int = 0
    """Tiles written by this run."""
    bytes: int = 0
    """Size of the files written by this run."""
    raw_bytes: int = 0
    """Of the same tiles, uncompressed."""
    task_seconds: float = 0.0
    """Summed over the tasks that wrote them."""
    quarantined: list[QuarantineEntry] = field(default_factory=list)
    """All that could not be used, now or in earlier runs."""
    notes: list[str] = field(default_factory=list)
    """What was left out on purpose, and what else a user should know."""
    new_sequences: list[str] = field(default_factory=list)
    """Sequences that had no shard before this run and have one now."""
    splits: dict[str, int] = field(default_factory=dict)
    """Finished pairs in SHARDS by split: train, val, test."""
    seconds: float = 0.0
    estimate: Estimate | None = None
    """With dry_run: what the pairs to do will come to."""


def preprocess(
    raw: str,
    shards: str,
    options: PreprocessOptions,
    *,
    dry_run: bool = False,
    progress: bool = True,
    start_ray: Callable[[], object] = ray.init,
) -> PreprocessReport:
    """Turn the zoom sequences below `raw` into shards below `shards` (local folders or `s3://` URIs).

    Pairs already finished are skipped; what cannot be used is quarantined with the reason, reported, and skipped while
    its inputs stay the same.

    Args:
        dry_run: count and estimate; write nothing.
        progress: show a progress bar.
        start_ray: starts or joins Ray; called if there is work and Ray is not running, after all checks.

    Raises:
        PreprocessError: the run as a whole is impossible; one line.
    """
    began = time.monotonic()
    source, target = _open(raw), _open(shards)
    with _storage_fault(target, "read"):
        ledger = Ledger.read(target, options)
    # What --val held out once must not slip into training in a later run that does not repeat it.
    asked_val = options.val
    options = replace(options, val=tuple(sorted({*options.val, *ledger.val})))
    with _storage_fault(source, "read"):
        plan = make_plan(source, options, ledger.splits)
    todo, done, given_up = ledger.sort_out(plan)
    had_shards = {job.sequence for job in plan.jobs if ledger.shards[job.key]}
    report = PreprocessReport(pairs=len(plan.jobs), todo=len(todo), skipped=len(done), notes=list(plan.notes))
    report.quarantined = [*plan.faults, *given_up]
    if dry_run:
        with _storage_fault(target, "read"):
            report.estimate = estimate(todo, options, Rate.read(target), _cpus(start_ray))
    else:
        if todo and not ray.is_initialized():
            start_ray()
        with _storage_fault(target, "written"):
            ledger.prepare(plan, options)
            for job in done:
                ledger.tidy(job)
            written = _work(source, ledger, todo, options, report, progress=progress)
            ledger.finish(plan)
            ledger.quarantine_only(report.quarantined, plan)
            if report.rows:
                Rate(report.rows, report.bytes, report.raw_bytes, report.task_seconds).write(target)
        report.new_sequences = sorted(written - had_shards)
    with _storage_fault(target, "read"):
        report.splits = ledger.count()
    report.notes += [f"--val {name}: no such sequence in RAW" for name in asked_val if name not in plan.sequences]
    report.notes += _advice(report, plan, dry_run=dry_run)
    report.seconds = time.monotonic() - began
    return report


def _work(
    source: Folder,
    ledger: Ledger,
    todo: list[PairJob],
    options: PreprocessOptions,
    report: PreprocessReport,
    *,
    progress: bool,
) -> set[str]:
    """Run the jobs and settle each as it ends; the sequences that got a shard. A failed run keeps what is finished."""
    waiting = {job.key: job for job in todo}
    written: set[str] = set()
    read_faults = 0
    with tqdm(total=len(todo), desc="preprocess", unit="pair", disable=not progress or not todo) as bar:

        def settle(job: PairJob, result: PairResult) -> None:
            entry = ledger.settle(job, result)
            if entry is not None:
                report.quarantined.append(entry)
            else:
                report.written, report.rows, report.bytes = (
                    report.written + 1,
                    report.rows + result.rows,
                    report.bytes + result.bytes,
                )
                report.raw_bytes += result.rows * tile_bytes(options, truth=job.has_truth)
                report.task_seconds += result.seconds
                written.add(job.sequence)
            bar.update()

        for result in _results(source, ledger.target, todo, options):
            if result.status == "unwritable":
                raise OSError(result.reason)
            read_faults = read_faults + 1 if result.status == "unreadable" and not source.is_local else 0
            if read_faults == _READ_FAULTS:
                raise PreprocessError(
                    f"{source.label}: {read_faults} pairs in a row could not be read (the last: {result.reason}); what "
                    "is finished stays: mend that and run again"
                )
            settle(waiting.pop(result.key), result)
        for job in waiting.values():
            reason = "its Ray worker died each time: too little memory, or ended from outside; run again"
            settle(job, PairResult(job.key, "died", f"{job.lr_raw}: {reason}"))
    return written


def _results(source: Folder, target: Folder, todo: list[PairJob], options: PreprocessOptions) -> Iterator[PairResult]:
    """One task per pair, in the order they end; none for a pair whose Ray worker died in each of three tries."""
    if not todo:
        return
    with _quiet_ray_data() as failures:
        for chunk, memory in _chunks(todo):
            blocks = [{"job": json.dumps(asdict(job))} for job in chunk]
            jobs = ray.data.from_items(blocks, override_num_blocks=len(blocks))
            with warnings.catch_warnings():
                # Ray 2.64 drops max_retries here and names no successor; without it too little memory is retried for
                # ever.
                warnings.simplefilter("ignore")
                results = jobs.map(
                    partial(_task, source=source, target=target, options=options),
                    memory=memory,
                    max_retries=_RETRIES,
                )
            for row in results.iter_rows():
                yield PairResult(**row)
            _require_deaths(failures)


def _chunks(todo: list[PairJob]) -> Iterator[tuple[list[PairJob], float]]:
    """(pairs for one Ray Data job, memory of a task in bytes): what it plans for all pairs at once, the driver holds.

    A task that asks for more than any node has would wait for ever: it gets the largest node for itself.
    """
    most = max(node["Resources"].get("memory", 0.0) for node in ray.nodes() if node["Alive"])
    length = max(_CHUNK_PAIRS, int(_CHUNK_PAIRS_PER_CPU * ray.cluster_resources().get("CPU", 1)))
    by_memory = sorted(todo, key=memory_bytes)
    for memory, group in itertools.groupby(by_memory, memory_bytes):
        while chunk := list(itertools.islice(group, length)):
            yield chunk, min(float(memory), most)


def _task(row: dict[str, Any], source: Folder, target: Folder, options: PreprocessOptions) -> dict[str, Any]:
    job = PairJob.from_dict(json.loads(row["job"]))
    return asdict(_PROCESS.run(job, source, target, options))


def _cpus(start_ray: Callable[[], object]) -> float:
    """CPUs of the running Ray or of the cluster at RAY_ADDRESS, else of this machine."""
    if not ray.is_initialized() and os.environ.get("RAY_ADDRESS"):
        start_ray()
    return float(ray.cluster_resources().get("CPU", 1)) if ray.is_initialized() else float(os.cpu_count() or 1)


class _Failures(logging.Handler):
    """Collects what Ray Data only logs when it goes on without a failed task: the exceptions."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[BaseException] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and record.exc_info[1] is not None:
            self.found.append(record.exc_info[1])


@contextlib.contextmanager
def _quiet_ray_data() -> Iterator[_Failures]:
    """Ray Data goes on without failed tasks, and shows no bars, plans or tracebacks: we have one bar and a report.

    Yields the failures as they come. The caller's settings come back afterwards.
    """
    context = ray.data.DataContext.get_current()
    ours = {"enable_progress_bars": False, "print_on_execution_start": False, "max_errored_blocks": -1}
    before = {name: getattr(context, name) for name in ours}
    loggers = [logging.getLogger(name) for name in ("ray.data", _EXECUTOR)]
    states = [(logger.level, logger.propagate) for logger in loggers]
    failures = _Failures()
    for name, value in ours.items():
        setattr(context, name, value)
    loggers[0].setLevel(logging.CRITICAL)
    loggers[1].setLevel(logging.ERROR)
    loggers[1].propagate = False
    loggers[1].addHandler(failures)
    try:
        yield failures
    finally:
        loggers[1].removeHandler(failures)
        for logger, (level, propagate) in zip(loggers, states, strict=True):
            logger.setLevel(level)
            logger.propagate = propagate
        for name, value in before.items():
            setattr(context, name, value)


def _require_deaths(failures: _Failures) -> None:
    """A process that dies is its pair's affair; a task that fails in any other way is a fault of the installation."""
    for error in failures.found:
        if not isinstance(error, _DEATHS):
            named = re.findall(r"^(?!ray\.)[\w.]*(?:Error|Exception)\b.*", str(error), re.MULTILINE) or [
                type(error).__name__
            ]
            raise PreprocessError(f"Ray's workers cannot run the tasks ({named[-1]}); install this sdan on every node")


def _open(uri: str) -> Folder:
    try:
        return open_folder(uri)
    except (OSError, pa.ArrowException) as error:
        raise PreprocessError(f"{uri}: {one_line(error)}; expected a folder or an s3:// URI") from error


@contextlib.contextmanager
def _storage_fault(folder: Folder, deed: str) -> Iterator[None]:
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        remedy = "what is finished stays: mend that and run again" if deed == "written" else "mend that and run again"
        raise PreprocessError(f"{folder.label}: cannot be {deed} ({one_line(error)}); {remedy}") from error


def _advice(report: PreprocessReport, plan: Plan, *, dry_run: bool) -> list[str]:
    in_val = report.splits["val"] or (dry_run and any(job.split == "val" for job in plan.jobs))
    train = sorted({job.sequence for job in plan.jobs if job.split == "train"})
    if in_val or not train:
        return []
    return [f"no sequence fell into val, so training cannot be judged: name some, e.g. --val {train[0]}"]

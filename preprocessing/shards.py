"""The preprocessing job: RAW sequences, or sequences of pictures -> one Parquet file per pair, with Ray Data.

A pair's file is named by a fingerprint of its inputs and written atomically. So a run that was killed can be restarted
without repeating finished pairs, and concurrent runs overwrite each other's files with identical bytes.
"""

import contextlib
import itertools
import json
import logging
import os
import re
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import pyarrow as pa
import ray
import ray.data
import ray.exceptions
from tqdm import tqdm

from preprocessing.estimate import Estimate, Rate, estimate, memory_bytes, require_room_for_a_tile, tile_bytes
from preprocessing.isolation import IsolatedProcess
from preprocessing.ledger import Ledger
from preprocessing.pairs import PairResult
from preprocessing.plan import (
    PairJob,
    Plan,
    PreprocessError,
    PreprocessOptions,
    QuarantineEntry,
    list_sequences,
    make_plan,
)
from preprocessing.storage import Folder, one_line, open_folder

__all__ = ["PreprocessError", "PreprocessOptions", "PreprocessReport", "QuarantineEntry", "preprocess"]

_RETRIES = 2
"""Retries of a task whose Ray worker died."""
_MAX_READ_FAILURES = 8
"""Stop after this many consecutive pairs that S3 could not deliver; each has already been retried."""
_CHUNK_PAIRS = 1000
_CHUNK_PAIRS_PER_CPU = 16
"""Large enough that CPUs idling at the end of a chunk cost little."""
_PROCESS = IsolatedProcess()
"""The child process that handles a Ray worker's pairs. It starts at the first pair, so the driver never has one."""
_WORKER_DEATHS = (
    ray.exceptions.WorkerCrashedError,
    ray.exceptions.OutOfMemoryError,
    ray.exceptions.NodeDiedError,
    ray.exceptions.ObjectLostError,
)
_RUN_AGAIN = "fix this and run again; finished pairs are kept"
_EXECUTOR = "ray.data._internal.execution.streaming_executor_state"
"""The logger to which Ray Data 2.60 reports failed tasks that it skips."""


@dataclass
class PreprocessReport:
    """What one run did, and the content of SHARDS afterwards."""

    pairs: int = 0
    """Pairs found in RAW."""
    todo: int = 0
    """Pairs that no earlier run has finished or quarantined."""
    written: int = 0
    skipped: int = 0
    """Pairs finished by an earlier run."""
    fallbacks: int = 0
    """Pairs written by this run that could not be registered and fell back to the focal lengths."""
    unaligned: int = 0
    """Pairs written by this run whose pictures do not show the same thing (keep_unaligned)."""
    rows: int = 0
    """Tiles written by this run."""
    bytes: int = 0
    """Size of the files written by this run."""
    raw_bytes: int = 0
    """Size of the same tiles uncompressed."""
    task_seconds: float = 0.0
    """Sum over the tasks that wrote them."""
    quarantined: list[QuarantineEntry] = field(default_factory=list)
    """Everything that could not be used, in this run or earlier ones."""
    remarks: Counter[str] = field(default_factory=Counter)
    """Remarks on the files of pairs written by this run, and on how many pairs."""
    notes: list[str] = field(default_factory=list)
    """Excluded frames, and advice for the user; one line each."""
    new_sequences: list[str] = field(default_factory=list)
    """Sequences that got their first shard in this run."""
    splits: dict[str, int] = field(default_factory=dict)
    """Finished pairs in SHARDS by split: train, val, test."""
    seconds: float = 0.0
    estimate: Estimate | None = None
    """With dry_run: tiles, bytes and time of the remaining pairs."""


def preprocess(
    raw: str,
    shards: str,
    options: PreprocessOptions,
    *,
    dry_run: bool = False,
    progress: bool = True,
    start_ray: Callable[[], object] | None = None,
    on_pair: Callable[[str, int], None] | None = None,
) -> PreprocessReport:
    """Turn the zoom sequences below `raw` into shards below `shards` (local folders or `s3://` URIs).

    Finished pairs are skipped. Pairs that cannot be used are quarantined with the reason, reported, and skipped until
    their inputs change.

    Args:
        dry_run: count and estimate; write nothing.
        progress: show a progress bar.
        start_ray: starts or joins Ray; called after all checks, if there is work. None: Ray must be running.
        on_pair: called with (status, tiles) of each pair that ends.

    Raises:
        PreprocessError: the whole run failed; one line.
    """
    began = time.monotonic()
    source, target = _open(raw), _open(shards)
    asked_val = options.val
    ledger, plan, options = _planned(source, target, options)
    if not ledger.has_shards:
        require_room_for_a_tile(plan.jobs, options)
    todo, done, quarantined = ledger.classify(plan, keep_unaligned=options.keep_unaligned)
    had_shards = {job.sequence for job in plan.jobs if ledger.shards[job.key]}
    report = PreprocessReport(pairs=len(plan.jobs), todo=len(todo), skipped=len(done), notes=list(plan.notes))
    if options.pictures:
        report.notes.append("pictures without RAW: only models of RGB input (--set model.input=rgb) can use them")
    report.quarantined = [*plan.faults, *quarantined]
    if dry_run:
        cpus = _cpus(start_ray)
        with _storage_errors(target, "read"):
            report.estimate = estimate(todo, options, Rate.read(target), cpus)
    else:
        _require_ray(start_ray, needed=bool(todo))
        with _storage_errors(target, "written"):
            ledger.prepare(plan, options)
            for job in done:
                ledger.keep_one_shard(job)
            written = _run_jobs(source, ledger, todo, options, report, progress=progress, on_pair=on_pair)
            ledger.finish(plan, options)
            ledger.update_quarantine(report.quarantined, plan)
            if report.rows:
                Rate(report.rows, report.bytes, report.raw_bytes, report.task_seconds).write(target)
        report.new_sequences = sorted(written - had_shards)
    with _storage_errors(target, "read"):
        report.splits = ledger.count()
    report.notes += _val_advice(report, plan, asked_val, dry_run=dry_run)
    report.seconds = time.monotonic() - began
    return report


def _planned(source: Folder, target: Folder, options: PreprocessOptions) -> tuple[Ledger, Plan, PreprocessOptions]:
    """(the state of SHARDS, what there is to do, the options with what SHARDS and the files decide)"""
    with _storage_errors(source, "read"):
        listing = list_sequences(source)
    options = replace(options, pictures=listing.pictures)
    with _storage_errors(target, "read"):
        ledger = Ledger.read(target, options)
    options = replace(
        options,
        # A sequence once held out with --val must not return to training in a later run without that option.
        val=tuple(sorted({*options.val, *ledger.val})),
        curve=options.curve or ledger.curve or "srgb",
        zoom=options.zoom or ledger.zoom,
    )
    with _storage_errors(source, "read"):
        return ledger, make_plan(source, options, ledger.splits, listing), options


def _run_jobs(
    source: Folder,
    ledger: Ledger,
    todo: list[PairJob],
    options: PreprocessOptions,
    report: PreprocessReport,
    *,
    progress: bool,
    on_pair: Callable[[str, int], None] | None = None,
) -> set[str]:
    """Run the jobs, record each result when it arrives, and return the sequences that got a shard."""
    waiting = {job.key: job for job in todo}
    written: set[str] = set()
    read_failures = 0
    with tqdm(total=len(todo), desc="preprocess", unit="pair", disable=not progress or not todo) as bar:

        def record(job: PairJob, result: PairResult) -> None:
            entry = ledger.record(job, result)
            if entry is not None:
                report.quarantined.append(entry)
            else:
                report.written += 1
                report.rows += result.rows
                report.bytes += result.bytes
                report.raw_bytes += result.rows * tile_bytes(options, truth=job.has_truth)
                report.task_seconds += result.seconds
                report.remarks.update(result.notes.splitlines())
                report.fallbacks += result.aligned_by == "scale_fallback"
                report.unaligned += result.aligned_by == "unaligned"
                written.add(job.sequence)
            if on_pair is not None:
                on_pair(result.status, result.rows)
            bar.update()

        for result in run_tasks(todo, partial(_task, source=source, target=ledger.target, options=options)):
            if result.status == "unwritable":
                raise OSError(result.reason)
            read_failures = read_failures + 1 if result.status == "unreadable" and not source.is_local else 0
            if read_failures == _MAX_READ_FAILURES:
                raise PreprocessError(
                    f"{source.label}: expected readable pairs, got {read_failures} consecutive pairs that cannot be "
                    f"read (the last: {result.reason}); {_RUN_AGAIN}"
                )
            record(waiting.pop(result.key), result)
        for job in waiting.values():
            reason = f"its Ray worker died in {1 + _RETRIES} attempts: out of memory, or killed; run again"
            record(job, PairResult(job.key, "died", f"{job.input}: {reason}"))
    return written


def run_tasks(todo: list[PairJob], task: Callable[[dict[str, Any]], dict[str, Any]]) -> Iterator[PairResult]:
    """Run one task per pair and yield results as they arrive; a pair whose Ray worker died every time has none.

    Args:
        task: takes {"job": a PairJob as JSON}, returns a PairResult as a dictionary.
    """
    if not todo:
        return
    with quiet_ray_data() as failures:
        for chunk, memory in chunks(todo):
            blocks = [{"job": json.dumps(asdict(job))} for job in chunk]
            jobs = ray.data.from_items(blocks, override_num_blocks=len(blocks))
            with warnings.catch_warnings():
                # Ray 2.64 will remove max_retries without a replacement. Without it, a task that runs out of memory is
                # retried for ever.
                warnings.simplefilter("ignore")
                results = jobs.map(task, memory=memory, max_retries=_RETRIES)
            for row in results.iter_rows():
                yield PairResult(**row)
            require_only_deaths(failures)


def chunks(todo: list[PairJob]) -> Iterator[tuple[list[PairJob], float]]:
    """(pairs of one Ray Data job, bytes of memory per task). Chunks limit what the driver holds of Ray Data's plan.

    A request for more memory than any node has would wait for ever, so it is reduced to that of the largest node.
    """
    largest = max(node["Resources"].get("memory", 0.0) for node in ray.nodes() if node["Alive"])
    length = max(_CHUNK_PAIRS, int(_CHUNK_PAIRS_PER_CPU * ray.cluster_resources().get("CPU", 1)))
    by_memory = sorted(todo, key=memory_bytes)
    for memory, group in itertools.groupby(by_memory, memory_bytes):
        while chunk := list(itertools.islice(group, length)):
            yield chunk, min(float(memory), largest)


def _task(row: dict[str, Any], source: Folder, target: Folder, options: PreprocessOptions) -> dict[str, Any]:
    job = PairJob.from_dict(json.loads(row["job"]))
    return asdict(_PROCESS.run(job, source, target, options))


def _require_ray(start_ray: Callable[[], object] | None, *, needed: bool) -> None:
    if ray.is_initialized() or not needed:
        return
    if start_ray is None:
        raise PreprocessError("Ray: expected a running one, got none; call ray.init() first, or pass start_ray")
    start_ray()


def _cpus(start_ray: Callable[[], object] | None) -> float:
    """CPUs of the running Ray or of the cluster at RAY_ADDRESS, else of this machine."""
    if not ray.is_initialized() and os.environ.get("RAY_ADDRESS") and start_ray is not None:
        start_ray()
    return float(ray.cluster_resources().get("CPU", 1)) if ray.is_initialized() else float(os.cpu_count() or 1)


class _Failures(logging.Handler):
    """Collects the exceptions of failed tasks, which Ray Data only logs."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[BaseException] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and record.exc_info[1] is not None:
            self.found.append(record.exc_info[1])


@contextlib.contextmanager
def quiet_ray_data() -> Iterator[_Failures]:
    """Make Ray Data continue after failed tasks and print nothing. Yields the failures, collected as they occur.

    Restores the caller's settings at the end.
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


def require_only_deaths(failures: _Failures) -> None:
    """Raise PreprocessError if a task failed other than by its worker's death. The installation is then broken."""
    for error in failures.found:
        if not isinstance(error, _WORKER_DEATHS):
            named = re.findall(r"^(?!ray\.)[\w.]*(?:Error|Exception)\b.*", str(error), re.MULTILINE) or [
                type(error).__name__
            ]
            raise PreprocessError(
                f"Ray workers: expected tasks to run, got {named[-1]}; install this sdan on every node"
            )


def _open(uri: str) -> Folder:
    try:
        return open_folder(uri)
    except (OSError, pa.ArrowException) as error:
        raise PreprocessError(f"{uri}: expected a folder or an s3:// URI, got {one_line(error)}; check it") from error


@contextlib.contextmanager
def _storage_errors(folder: Folder, action: str) -> Iterator[None]:
    """Turn storage errors into a PreprocessError; `action` is "read" or "written"."""
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        remedy = _RUN_AGAIN if action == "written" else "fix this and run again"
        raise PreprocessError(
            f"{folder.label}: expected a folder that can be {action}, got {one_line(error)}; {remedy}"
        ) from error


def _val_advice(report: PreprocessReport, plan: Plan, asked_val: Iterable[str], *, dry_run: bool) -> list[str]:
    unknown = [f"--val: expected a sequence in RAW, got {name}" for name in asked_val if name not in plan.sequences]
    if report.splits["val"] or (not dry_run and not any(report.splits.values())):
        return unknown
    if any(job.split == "val" for job in plan.jobs):
        return unknown if dry_run else [*unknown, "all pairs in val are set aside, so training cannot be evaluated"]
    train = sorted({job.sequence for job in plan.jobs if job.split == "train"})
    if not train:
        return unknown
    return [*unknown, f"no sequence is in val, so training cannot be evaluated; add one, e.g. --val {train[0]}"]

"""`sdan zoom` for folders and buckets: finished photographs are skipped, bad ones set aside, and the rest continues."""

from __future__ import annotations

import csv
import importlib.util
import io
import os
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial

import torch
from tqdm import tqdm

from pipelines.zoom import resampling_note
from pipelines.zoom_folder.places import Place, PlaceError, open_place
from pipelines.zoom_folder.plan import Job, Plan, make_plan, open_sources, options_of
from pipelines.zoom_folder.worker import Result, Settings, ZoomWorker
from pipelines.zooming.models import Chosen
from pipelines.zooming.request import Output, ZoomError, check_batch
from preprocessing.storage import one_line
from sdan import checkpoint

SET_ASIDE = "set_aside.csv"
SMALL = 4
"""Photographs below which a start of Ray on this machine does not pay."""
_MAX_READ_FAILURES = 8
"""Stop after this many consecutive photographs that a bucket could not deliver; each has already been retried."""
CPUS_FOR_RAY = 8
"""CPUs from which on several workers use this machine better than one."""
_RUN_AGAIN = "fix this and run again; finished photographs are kept"
_BAR = "{desc}: {percentage:3.0f}%|{bar}| {n:.1f}/{total} [{elapsed}<{remaining}]"


@dataclass
class BatchReport:
    """What one run did."""

    out: str
    """OUT for messages."""
    written: int = 0
    there: int = 0
    """Photographs whose outputs were whole before."""
    set_aside: list[tuple[str, str]] = field(default_factory=list)
    """(photograph, reason)."""
    notes: Counter[str] = field(default_factory=Counter)
    """What was done to photographs besides the usual, and to how many."""
    seconds: float = 0.0

    def summary(self) -> str:
        """One line, after a line per note."""
        lines = [f"{count} of {self.written}: {note}" for note, count in self.notes.most_common()]
        aside = f"{len(self.set_aside)} set aside (see {self.report})" if self.set_aside else "0 set aside"
        return "\n".join([*lines, f"{self.written} zoomed in {self.seconds:.0f} s, {self.there} were there, {aside}"])

    @property
    def report(self) -> str:
        return f"{self.out.rstrip('/')}/{SET_ASIDE}"


def zoom_batch(
    chosen: Chosen,
    inputs: Sequence[str],
    out: str,
    *,
    strength: float,
    output: Output,
    device: str = "auto",
    say: Callable[[str], None],
    warn: Callable[[str], None],
) -> BatchReport:
    """Zoom the photographs of folders and buckets; names and folders are kept below `out`.

    Ray is used if RAY_ADDRESS names a cluster, or if it is installed and several workers fit on this machine; else one
    worker takes one photograph after another.

    Args:
        inputs: folders, files, s3:// URIs.
        out: a folder or s3:// URI.
        device: as Zoomer.load takes it; cuda:N means this machine's, without Ray.
        say: takes lines about the run.
        warn: takes one line per photograph that is set aside.

    Raises:
        ZoomError: nothing could be done, or the run cannot go on; one line.
    """
    began = time.monotonic()
    check_batch(out, output)
    target = open_place(out)
    plan = _plan(chosen, inputs, target, strength, output, say)
    report = BatchReport(target.label(), there=plan.there)
    for_raw, for_pictures = (str(folder.absolute()) for folder in (chosen.for_raw, chosen.for_pictures))
    notes = (chosen.raw_note, chosen.picture_note)
    settings = Settings(target.uri, for_raw, for_pictures, *notes, strength, asdict(output), device)
    try:
        _run(plan, target, settings, report, warn)
    finally:
        if report.set_aside:
            with _writing(target):
                target.write(SET_ASIDE, _as_csv(report.set_aside))
    if not report.set_aside:
        with _writing(target):
            target.delete(SET_ASIDE)  # that of an earlier run
    report.seconds = time.monotonic() - began
    if not report.written + report.there:
        reason = report.set_aside[0][1]
        raise ZoomError(
            f"{', '.join(inputs)}: expected photographs that can be zoomed, got {len(report.set_aside)} set aside "
            f"(see {report.report}), the first because: {reason}"
        )
    return report


def _plan(
    chosen: Chosen, inputs: Sequence[str], target: Place, strength: float, output: Output, say: Callable[[str], None]
) -> Plan:
    """Load the models for their scale and digests, and list what there is to do."""
    models = [checkpoint.load(folder).model for folder in (chosen.for_raw, chosen.for_pictures)]
    network = models[0].config
    scale = output.scale or network.scale
    digests = [checkpoint.weights_digest(model.state_dict()) for model in models]
    named = {"model": digests[0], "model for pictures": digests[1]}
    for line in filter(None, (chosen.note, resampling_note(network.scale, scale))):
        say(line)
    with _writing(target):
        plan = make_plan(
            open_sources(inputs, target),
            target,
            output,
            scale=scale,
            takes_raw=chosen.for_pictures != chosen.for_raw or not network.is_rgb,
            options=options_of(output, named, scale=scale, strength=strength),
        )
    for line in plan.notes:
        say(line)
    target.sweep(job.output for job in plan.todo)
    return plan


def _run(plan: Plan, target: Place, settings: Settings, report: BatchReport, warn: Callable[[str], None]) -> None:
    """Zoom what is left, and record each result when it arrives."""
    waiting = {job.output: job for job in plan.todo}
    read_failures = 0

    def set_aside(label: str, reason: str) -> None:
        report.set_aside.append((label, reason))
        with tqdm.external_write_mode():
            warn(f"set aside: {reason}")

    for label, reason in plan.set_aside:
        set_aside(label, reason)
    with (
        tqdm(total=len(plan.todo), desc="zoom", bar_format=_BAR, smoothing=0, disable=not plan.todo) as bar,
        closing(_results(plan.todo, settings, bar)) as results,
    ):
        for result in results:
            _require_progress(result, target)
            job = waiting.pop(result.output)
            if result.status == "written":
                report.written += 1
                report.notes.update(result.notes)
                with _writing(target):
                    for record in plan.stale[job.output]:
                        if record != job.record(result.bytes):
                            target.delete(record)
            else:
                set_aside(job.label, result.reason)
            read_failures = read_failures + 1 if result.status == "unreadable" and "://" in job.source else 0
            if read_failures == _MAX_READ_FAILURES:
                raise PlaceError(
                    f"{job.label}: expected readable photographs, got {read_failures} consecutive ones that are not; "
                    f"{_RUN_AGAIN}"
                )
            bar.update(len(plan.todo) - len(waiting) - bar.n)
        for job in waiting.values():
            set_aside(job.label, f"{job.label}: expected its Ray worker to live, got its end several times; run again")


def _require_progress(result: Result, target: Place) -> None:
    if result.status == "broken":
        raise ZoomError(result.reason)
    if result.status == "unwritable":
        raise PlaceError(
            f"-o {target.label()}: expected a place that can be written, got {result.reason}; {_RUN_AGAIN}"
        )


def _results(jobs: Sequence[Job], settings: Settings, bar: tqdm) -> Generator[Result]:
    if not jobs:
        return
    if ray_pays(len(jobs), SMALL, settings.device):
        from pipelines.cluster import start_ray
        from pipelines.zoom_folder.pool import zoom_in_pool

        start_ray()
        yield from zoom_in_pool(settings, jobs)
        return
    worker, current = ZoomWorker(settings), jobs[0]
    try:
        for number, current in enumerate(jobs):
            yield worker.run(current, partial(_move, bar, number))
    finally:
        worker.close(current)


def _move(bar: tqdm, before: int, done: int, total: int) -> None:
    """Show `before` photographs and a share of the next."""
    bar.update(before + done / total - bar.n)


def ray_pays(count: int, small: int, device: str = "auto") -> bool:
    """Whether Ray's workers are faster than this process: for photographs to zoom, and for crops to score.

    Args:
        count: the pieces of work.
        small: pieces below which a start of Ray on this machine does not pay.
        device: as Zoomer.load takes it.
    """
    if importlib.util.find_spec("ray") is None or device.startswith("cuda:"):
        return False
    if os.environ.get("RAY_ADDRESS"):
        return True
    several = (device != "cpu" and torch.cuda.is_available()) or (os.cpu_count() or 1) >= CPUS_FOR_RAY
    return several and count >= small


@contextmanager
def _writing(target: Place) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise PlaceError(
            f"-o {target.label()}: expected a place that can be written, got {error.strerror or one_line(error)}; "
            f"{_RUN_AGAIN}"
        ) from error


def _as_csv(rows: Sequence[tuple[str, str]]) -> bytes:
    text = io.StringIO()
    csv.writer(text).writerows([("photograph", "reason"), *rows])
    return text.getvalue().encode()

"""Runs benchmark tables one after another in another process, within a total time.

A GPU error such as an illegal memory access breaks every later call of its process, and a hang never ends. After a
table that failed, a new process measures the next one. This module imports neither torch nor Triton.
"""

import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

Case = TypeVar("Case")

ROOT = Path(__file__).parents[2]
GRACE_S = 30.0
"""Time after the end of a table's share until its process is killed. A row that has begun may finish in it."""
LONGEST_REASON = 200
"""Characters of an error's message that a table shows."""


@dataclass
class Session:
    """What a table's function is given."""

    device: str
    """cuda or cpu."""
    stop_at: float
    """time.monotonic() after which no further row begins."""
    rehearsal: bool = False
    """Tiny shapes, to check that each table runs; its times mean nothing."""
    failed: list[str] = field(default_factory=list)
    """First cells of the rows that failed."""
    left_out: list[str] = field(default_factory=list)
    """First cells of the rows that were not measured for lack of time."""

    def rows(self, cases: Iterable[Case], name: Callable[[Case], str], row: Callable[[Case], str]) -> Iterator[str]:
        """The row of each case. A row that fails shows its reason, and one that would begin too late says so.

        Args:
            name: the row's first cell.
            row: measures a case and returns its whole row.
        """
        for case in cases:
            if time.monotonic() >= self.stop_at:
                self.left_out.append(name(case))
                yield f"| {name(case)} | not measured: the table's time was used up |"
                continue
            try:
                yield row(case)
            except (Exception, SystemExit) as error:
                self.failed.append(name(case))
                yield f"| {name(case)} | failed: {reason(error)} |"


@dataclass(frozen=True)
class Table:
    """One table: `rows` is a module-level function that yields its Markdown lines."""

    name: str
    title: str
    rows: Callable[[Session], Iterator[str]]
    share_s: float
    """Its part of the total time relative to those of the other tables."""


@dataclass
class Outcome:
    """What became of a table."""

    table: Table
    lines: list[str] = field(default_factory=list)
    error: str | None = None
    """Why the table ended early."""
    failed: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    @property
    def good(self) -> bool:
        return self.error is None and not self.failed


class Worker:
    """A process that measures tables. A GPU error breaks every later call of a process, so failures end it."""

    def __init__(self, limit_s: float) -> None:
        context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,))
        self._process.start()
        theirs.close()  # so that this side sees the end of a process that crashed
        self._end = time.monotonic() + limit_s
        try:
            self._next_message()
        except (EOFError, OSError):  # TimeoutError is an OSError
            self.stop()
            raise

    def run(self, table: Table, session: Session, limit_s: float, say: Callable[[str], None]) -> Outcome:
        """Measure a table; after `limit_s` seconds it counts as failed."""
        outcome = Outcome(table)
        self._end = time.monotonic() + limit_s
        try:
            self._pipe.send((table, session))
            while isinstance(message := self._next_message(), str):
                outcome.lines.append(message)
                say(message)
            outcome.error, outcome.failed, outcome.left_out = message
        except TimeoutError:
            outcome.error = f"stopped: expected an end within {limit_s:.0f} s; give more with --minutes"
        except (EOFError, OSError):
            self._process.join()
            outcome.error = f"its process ended with exit code {self._process.exitcode}"
        return outcome

    def stop(self) -> None:
        """End the process and those that it started, whatever they are doing."""
        assert self._process.pid  # it was started
        with suppress(ProcessLookupError):  # it has no group of its own before it is ready
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()
        self._process.join()
        self._pipe.close()

    def _next_message(self) -> Any:
        """A line of the table, or at its end (error, failed rows, rows left out)."""
        if not self._pipe.poll(max(0.0, self._end - time.monotonic())):
            raise TimeoutError
        return self._pipe.recv()


def _serve(pipe: Connection) -> None:
    """The worker's process; those that it starts belong to its group."""
    os.setpgid(0, 0)
    pipe.send("ready")
    while True:
        try:
            table, session = pipe.recv()
        except EOFError:  # the parent has ended
            return
        error = None
        try:
            for line in table.rows(session):
                pipe.send(line)
        except (Exception, SystemExit) as caught:
            error = reason(caught)
        pipe.send((error, session.failed, session.left_out))


def run_tables(
    tables: Sequence[Table], device: str, seconds: float, rehearsal: bool, say: Callable[[str], None]
) -> Iterator[Outcome]:
    """Measure all tables within `seconds`; time that a table leaves over goes to the later ones.

    Args:
        say: receives each line as soon as it is measured.
    """
    end = time.monotonic() + seconds
    worker: Worker | None = None
    try:
        for place, table in enumerate(tables):
            say(f"\n### {table.title}\n")
            outcome = Outcome(table)
            try:
                worker = worker or Worker(end - time.monotonic())
                left = end - time.monotonic()
                share = share_of(left - GRACE_S, [later.share_s for later in tables[place:]])
                session = Session(device, time.monotonic() + share, rehearsal)
                outcome = worker.run(table, session, min(share + GRACE_S, left), say)
            except (EOFError, OSError):
                outcome.error = "not measured: its process did not start in time"
            if outcome.error:
                say(f"{table.name}: {outcome.error}")
            if worker and not outcome.good:
                worker.stop()
                worker = None
            yield outcome
    finally:
        if worker:
            worker.stop()


def share_of(left_s: float, shares: Sequence[float]) -> float:
    """Seconds for the first of the tables that are still to run, in proportion to their shares; at least 0."""
    return max(0.0, left_s) * shares[0] / sum(shares)


def reason(error: BaseException) -> str:
    """Type, first line of the message, and the last line of this repository that was running."""
    message = (str(error).strip().splitlines() or [""])[0].replace("|", "/")[:LONGEST_REASON]
    places = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).is_relative_to(ROOT)]
    ours = [frame for frame in places if ".venv" not in Path(frame.filename).parts]
    where = f" ({Path(ours[-1].filename).relative_to(ROOT)}:{ours[-1].lineno})" if ours else ""
    return f"{type(error).__name__}: {message}{where}"

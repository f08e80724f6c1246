"""Zooms one photograph after another in a child process that holds the models.

LibRaw is C++ and reads untrusted files. A photograph that crashes it, or takes all memory, costs only that photograph
and one more start of the child.
"""

from __future__ import annotations

import faulthandler
import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from pipelines.zoom import Zoomer, load_models, unexpected, zoom_one
from pipelines.zoom_folder.places import Place, open_place, sweep_folder
from pipelines.zoom_folder.plan import Job
from pipelines.zooming.models import Chosen
from pipelines.zooming.request import Output, OutputError, kind_of_photo, shown
from preprocessing.child import CRASHES, ChildProcess, streams_of
from preprocessing.storage import one_line, writer_id

LIMIT_S = 900.0
"""Seconds without a tile after which a photograph is given up: several times what decoding 150 megapixels and a slow
download take."""
_ATTEMPTS = 2
_TEMPORARY = "sdan-zoom~"
"""Start of the name of a folder in the system's folder for temporary files."""


@dataclass(frozen=True)
class Settings:
    """What a worker needs besides the photographs; JSON values only."""

    target: str
    """URI of OUT."""
    for_raw: str
    """Checkpoint folder."""
    for_pictures: str
    raw_note: str
    picture_note: str
    strength: float
    output: dict[str, Any]
    """The fields of Output."""
    device: str = "auto"
    """As Zoomer.load takes it."""


@dataclass(frozen=True)
class Result:
    """What became of one photograph."""

    output: str
    """Job.output."""
    status: str
    """written; set aside; unreadable (its place did not deliver it); unwritable (OUT did not take the result); broken
    (nothing can be zoomed)."""
    reason: str = ""
    notes: tuple[str, ...] = ()
    """What was done to it besides the usual."""
    bytes: int = 0
    """Size of the output."""


class ZoomWorker:
    """Runs the child. It starts at the first photograph, and again after it has died."""

    def __init__(self, settings: Settings, *, threads: int | None = None, limit_s: float = LIMIT_S) -> None:
        self._settings = settings
        self._target = open_place(settings.target)
        self._limit_s = limit_s
        environment = {"OMP_NUM_THREADS": str(threads)} if threads else {}
        self._child = ChildProcess("pipelines.zoom_folder.worker", [str(limit_s)], environment)
        sweep_temporary()

    def run(self, job: Job, progress: Callable[[int, int], None] | None = None) -> Result:
        """Zoom one photograph in the child. Returns its result, or one that says how the child died.

        Args:
            progress: called with (tiles done, total tiles).

        Raises OSError if no child can be started.
        """
        code = 0
        for _ in range(_ATTEMPTS):
            if self._child.pid is None and (broken := self._load()):
                return Result(job.output, "broken", broken)
            answer, code = self._child.ask(json.dumps(asdict(job)))
            while answer:
                reply = json.loads(answer)
                if "status" in reply:
                    return Result(**reply | {"notes": tuple(reply["notes"])})
                if progress is not None:
                    progress(*reply["progress"])
                answer, code = self._child.read()
            self._sweep(job)
            if code > 0 or -code in CRASHES:
                break  # the next run of the command tries it again
        return Result(job.output, "set aside", f"{job.label}: {_death(code, self._limit_s)}")

    def close(self, job: Job | None = None) -> None:
        """Kill the child, and remove what it had written of `job`."""
        self._child.close()
        self._sweep(job)

    def _load(self) -> str:
        """Start the child and load the models. Returns why that failed; "" if it worked."""
        answer, code = self._child.ask(json.dumps(asdict(self._settings)))
        if answer:
            return str(json.loads(answer)["broken"])
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return f"the model: expected it to load, got the end of its process ({how}); see `sdan doctor`"

    def _sweep(self, job: Job | None) -> None:
        sweep_temporary()
        if job is not None:
            self._target.sweep([job.output])


def sweep_temporary() -> None:
    """Remove the temporary folders of processes of this machine that have ended."""
    sweep_folder(Path(tempfile.gettempdir()), _TEMPORARY)


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder that `sweep_temporary` removes if this process is killed."""
    folder = Path(tempfile.gettempdir(), f"{_TEMPORARY}{writer_id()}")
    folder.mkdir(mode=0o700)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _death(code: int, limit_s: float) -> str:
    if -code in CRASHES:
        how = f"a crash of the decoder ({signal.Signals(-code).name})"
        return f"expected a photograph that can be decoded, got {how}; convert it to DNG or export it as JPG"
    if code < 0:
        how = f"its process killed {_ATTEMPTS} times ({signal.Signals(-code).name})"
        return f"expected memory for this photograph, got {how}; run again, or use --crop"
    return f"expected progress, got none for {limit_s:g} s; copy or export it again"


def _serve(requests: IO[str], replies: IO[str], limit_s: float) -> None:
    """The child's loop: settings, then one photograph per line; each is answered with lines of JSON."""
    with Path(os.devnull).open("w") as nowhere, temporary_folder() as folder:

        def watch() -> None:
            # This timer's thread needs no GIL, so it ends the process even if a hanging decoder holds the GIL.
            faulthandler.dump_traceback_later(limit_s, exit=True, file=nowhere)

        def reply(**values: Any) -> None:
            print(json.dumps(values), file=replies, flush=True)

        def move(done: int, total: int) -> None:
            watch()
            reply(progress=(done, total))

        settings = Settings(**json.loads(requests.readline()))
        target = open_place(settings.target)
        try:
            zoomers = load_zoomers(settings)
        except ValueError as error:
            reply(broken=str(error))
            return
        reply(broken="")
        for line in requests:
            watch()
            result = zoom_job(Job(**json.loads(line)), zoomers, target, settings, folder, move)
            faulthandler.cancel_dump_traceback_later()
            reply(**asdict(result))


def load_zoomers(settings: Settings) -> dict[str, Zoomer]:
    """Kind of photograph -> its model, ready to zoom. Raises ValueError."""
    chosen = Chosen(
        Path(settings.for_raw),
        Path(settings.for_pictures),
        raw_note=settings.raw_note,
        picture_note=settings.picture_note,
    )
    raw, pictures = load_models(chosen, settings.strength, settings.device)
    for zoomer in (raw, pictures):
        zoomer.wait()
    return {"raw": raw, "picture": pictures}


def zoom_job(
    job: Job,
    zoomers: dict[str, Zoomer],
    target: Place,
    settings: Settings,
    folder: Path,
    progress: Callable[[int, int], None],
) -> Result:
    """Fetch, zoom and deliver one photograph in this process.

    Args:
        zoomers: as `load_zoomers`.
        folder: for temporary files; it is emptied.
        progress: called with (tiles done, total tiles).
    """
    notes: list[str] = []
    fields: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in settings.output.items()
    }
    aside = target.aside(job.output, folder)
    photo = Path(job.path)
    try:
        try:
            photo = open_place(job.source).fetch(job.path, folder)
            zoom_one(
                photo, aside, zoomers[kind_of_photo(photo)], Output(**fields), notes.append, progress, replace=True
            )
        except OSError as error:
            return Result(job.output, "unreadable", f"{job.label}: expected a readable file, got {one_line(error)}")
        size = aside.stat().st_size
        target.deliver(job.output, aside)
        target.write(job.record(size), b"")
    except (OSError, OutputError) as error:
        return Result(job.output, "unwritable", one_line(error))
    except Exception as error:
        reason = " ".join((str(error) if isinstance(error, ValueError) else unexpected(photo, error)).split())
        for local, label in ((aside, target.label(job.output)), (photo, job.label)):
            reason = reason.replace(shown(local), label)
        return Result(job.output, "set aside", reason)
    finally:
        for file in folder.iterdir():
            file.unlink()
    start = f"{shown(photo)}: "
    return Result(job.output, "written", notes=tuple(note.removeprefix(start) for note in notes), bytes=size)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it
    _serve(*streams_of(int(sys.argv[1])), float(sys.argv[2]))

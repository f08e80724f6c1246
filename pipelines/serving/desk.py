"""The work on photographs: who is let in, who waits, and what happens to a photograph from its upload to its answer.

A few photographs are in work at once (limits.SEATS), each in a thread of its own with a decoder of its own. The network
runs in one more thread, which takes rows of tiles from the photographs in turn, so a small photograph does not wait for
a large one to end. Tiles of different photographs do not share a batch: on a CPU one tile already is a batch, and on a
GPU two megapixels fill one (`sdan/inference.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from pipelines.monitoring import published
from pipelines.serving.decoding import RETRY_S, Decoded, Decoder, kind_of_upload
from pipelines.serving.limits import SEATS, Limits, Refused
from pipelines.serving.models import Models
from pipelines.serving.uploads import remove
from pipelines.zoom import Zoomer, write_levels
from pipelines.zooming.request import FORMATS, Output, ZoomError
from preprocessing.storage import one_line

_LOG = logging.getLogger(__name__)
_FIRST_GUESS_S = 5.0
"""Time per photograph before any was measured, for Retry-After."""
_PREVIEW_PX = 2048
"""Longest side of a preview."""
_KEPT_S = 60.0
"""How long the progress of a finished request can be asked for."""
_MOST_TICKETS = 256


@dataclass(frozen=True)
class Wish:
    """What a request asks for."""

    output: Output
    """Its format is set."""
    strength: float = 1.0
    """As for Zoomer."""
    preview: bool = False
    """Whether the photograph as it was decoded is kept, for browsers, which cannot show RAW."""


@dataclass
class Ticket:
    """A request that was let in; other threads read and write it."""

    deadline: float
    """In time.monotonic()."""
    stage: str = "receiving"
    """receiving, waiting, decoding, zooming, writing, done or refused."""
    done: int = 0
    """Tiles."""
    total: int = 0
    stop: threading.Event = field(default_factory=threading.Event)
    """Set when nobody waits for the answer any more."""
    preview: bytes | None = None
    """JPG."""

    def move(self, done: int, total: int) -> None:
        self.stage, self.done, self.total = "zooming", done, total
        self.check()

    def check(self) -> None:
        """Raise _Stopped once nobody waits for the answer."""
        if self.stop.is_set() or time.monotonic() > self.deadline:
            raise _Stopped


class _Stopped(Exception):
    pass


@dataclass(frozen=True)
class Answer:
    """An enlarged photograph."""

    file: BinaryIO
    """Open at its start; it has no name any more, so its space is free once it is closed."""
    name: str
    bytes: int
    width: int
    height: int
    model: str
    notes: tuple[str, ...]


class Desk:
    """Lets requests in and works on them. All methods but the private ones belong to the event loop's thread."""

    def __init__(self, models: Models, limits: Limits, folder: Path) -> None:
        """
        Args:
            folder: where photographs and results are kept while they are in work.
        """
        self.models, self.limits = models, limits
        self.inside = 0
        """Requests that were let in and have no answer yet."""
        self._folder = folder
        self._tickets: dict[str, Ticket] = {}
        self._seconds = _FIRST_GUESS_S
        self._network = ThreadPoolExecutor(1, thread_name_prefix="network")
        self._local = threading.local()
        self._decoders: list[Decoder] = []
        self._seats = ThreadPoolExecutor(SEATS, thread_name_prefix="seat", initializer=self._sit_down)

    def start(self) -> None:
        """Start the threads and their decoders."""
        everyone = threading.Barrier(SEATS)
        for _ in range(SEATS):
            self._seats.submit(everyone.wait)

    def close(self) -> None:
        """Give up what is in work."""
        for ticket in list(self._tickets.values()):
            ticket.stop.set()
        for decoder in self._decoders:
            decoder.close()
        for pool in (self._seats, self._network):
            pool.shutdown(wait=False, cancel_futures=True)

    @contextlib.contextmanager
    def place(self, identifier: str | None) -> Iterator[Ticket]:
        """Let a request in, for as long as it is in work. Raises Refused with 503 if too many are.

        Args:
            identifier: under which `ticket` finds it; None: it is not found.
        """
        if self.inside >= self.limits.places:
            got = f"{self.inside - SEATS} waiting"
            line = f"queue: expected fewer than {self.limits.queue} waiting photographs, got {got}; send it again later"
            raise Refused(503, line, self._retry_s())
        ticket = Ticket(time.monotonic() + self.limits.timeout_s)
        if identifier is not None:
            if len(self._tickets) >= _MOST_TICKETS:
                self._tickets.pop(next(iter(self._tickets)))
            self._tickets[identifier] = ticket
        self.inside += 1
        self._publish()
        try:
            yield ticket
            ticket.stage = "done"
        except BaseException:
            ticket.stage = "refused"
            raise
        finally:
            ticket.stop.set()
            self.inside -= 1
            self._publish()
            published.count("sdan_serve_photographs", outcome="answered" if ticket.stage == "done" else "refused")
            if identifier is not None:
                asyncio.get_running_loop().call_later(_KEPT_S, self._forget, identifier, ticket)

    def ticket(self, identifier: str) -> Ticket | None:
        """The request of that identifier, also for a while after its answer."""
        return self._tickets.get(identifier)

    def new_folder(self) -> Path:
        """An empty folder for one request; `zoom` removes it."""
        return Path(tempfile.mkdtemp(dir=self._folder))

    async def zoom(self, ticket: Ticket, path: Path, wish: Wish) -> Answer:
        """Enlarge the photograph `path`, alone in its folder, which is removed whatever happens.

        Raises Refused: as `Decoder.read`; 415 for another kind of file; 422 for an output that cannot be written; 503
            if it takes too long, or too little memory is free.
        """
        ticket.stage = "waiting"
        work = self._seats.submit(self._work, ticket, path, wish)
        work.add_done_callback(lambda _: remove(path.parent))
        try:
            async with asyncio.timeout(max(0.0, ticket.deadline - time.monotonic())):
                return await asyncio.wrap_future(work)
        except (TimeoutError, _Stopped):
            limit = f"{self.limits.timeout_s:g} s"
            line = f"{path.name}: expected to be ready within {limit}, got no result; send it again later, or crop it"
            raise Refused(503, line, self._retry_s()) from None

    def _publish(self) -> None:
        published.gauge("sdan_serve_waiting", max(0, self.inside - SEATS))
        published.gauge("sdan_serve_in_work", min(self.inside, SEATS))

    def _retry_s(self) -> int:
        """The time that the work on all requests takes, by the mean time of the last ones."""
        return max(1, math.ceil(self._seconds * self.inside / SEATS))

    def _forget(self, identifier: str, ticket: Ticket) -> None:
        if self._tickets.get(identifier) is ticket:
            del self._tickets[identifier]

    def _sit_down(self) -> None:
        """The start of a seat's thread."""
        self._local.decoder = Decoder(self.limits)
        self._decoders.append(self._local.decoder)
        self._local.decoder.start()

    def _work(self, ticket: Ticket, path: Path, wish: Wish) -> Answer:
        """`zoom`, in a seat's thread."""
        began = time.monotonic()
        try:
            ticket.check()
            answer = self._zoomed(ticket, path, wish)
        except (Refused, _Stopped):
            raise
        except ZoomError as error:
            # A full disk or GPU is no fault of the request's.
            later = isinstance(error.__cause__, OSError | torch.OutOfMemoryError)
            raise Refused(503 if later else 422, str(error), RETRY_S if later else None) from error
        except Exception as error:
            if isinstance(error, MemoryError) or "not enough memory" in str(error):
                line = f"{path.name}: expected memory to enlarge it, got too little; send it again later, or crop"
                raise Refused(503, line, RETRY_S) from error
            _LOG.exception("%s", path.name)
            got = f"{type(error).__name__}: {one_line(error)[:200]}"
            raise Refused(500, f"{path.name}: expected to enlarge it, got {got}; please report it") from error
        self._seconds += 0.2 * (time.monotonic() - began - self._seconds)
        return answer

    def _zoomed(self, ticket: Ticket, path: Path, wish: Wish) -> Answer:
        served = self.models.current
        chosen = served.pictures if kind_of_upload(path) == "picture" else served.raw
        zoomer = replace(chosen, strength=wish.strength)
        ticket.stage = "decoding"
        decoded = self._local.decoder.read(path, zoomer.model.config, wish.output)
        if wish.preview:
            ticket.preview = _preview(decoded)
        output, photo = wish.output, decoded.photo
        scale = output.scale or zoomer.model.config.scale
        size = zoomer.size(photo, output.scale)
        target = path.with_name(f"{path.stem}_{scale}x{FORMATS[output.format or 'png'][0]}")
        bits = output.chosen_bits(target)
        parts = self._in_turn(zoomer, decoded, bits, ticket, output.scale)
        write_levels(parts, target, size, bits, output=output, exif=decoded.exif)
        notes = (*photo.notes, *((chosen.note,) if chosen.note else ()))
        return Answer(target.open("rb"), target.name, target.stat().st_size, *size, served.name, notes)

    def _in_turn(
        self, zoomer: Zoomer, decoded: Decoded, bits: int, ticket: Ticket, scale: int | None
    ) -> Iterator[NDArray[Any]]:
        """`Zoomer.levels`, computed in the network's thread: the next rows of each photograph queue there."""
        parts = zoomer.levels(decoded.photo, bits, ticket.move, scale=scale)
        try:
            while (part := self._in_network(next, parts, None)) is not None:
                yield part
        finally:
            self._in_network(parts.close)  # type: ignore[attr-defined]  # it is a generator

    def _in_network(self, function: Any, *arguments: Any) -> Any:
        work: Future[Any] = self._network.submit(function, *arguments)
        return work.result()


def _preview(decoded: Decoded) -> bytes:
    """The decoded photograph as a JPG, reduced to _PREVIEW_PX."""
    top, left, height, width = decoded.photo.window
    part = decoded.photo.rendering[:, top : top + height, left : left + width]
    picture: NDArray[np.float32] = np.ascontiguousarray(part.permute(1, 2, 0).numpy()[..., ::-1])
    share = _PREVIEW_PX / max(height, width)
    if share < 1:
        size = max(1, round(width * share)), max(1, round(height * share))
        picture = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)  # type: ignore[assignment]
    return cv2.imencode(".jpg", (255 * picture).round().astype(np.uint8), [cv2.IMWRITE_JPEG_QUALITY, 92])[1].tobytes()

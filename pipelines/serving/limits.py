"""What one request may take, and the answer if it takes more."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields

SEATS = 2
"""Photographs in work at once. One is decoded or written while another is in the network; more would only take memory.
"""


class ServeError(ValueError):
    """The service cannot be started; the message says what to do."""


class Refused(Exception):
    """A request that gets no picture. Its answer is one line of text."""

    def __init__(self, status: int, line: str, retry_after_s: int | None = None) -> None:
        """
        Args:
            status: HTTP's; 4xx if the request must be changed, 503 if it may be sent again.
            line: what, where: expected A, got B; do C. Names of options as `sdan zoom` has them are changed to those of
                the query.
            retry_after_s: when to send it again.
        """
        super().__init__(_as_query(line))
        self.status, self.retry_after_s = status, retry_after_s


@dataclass(frozen=True)
class Limits:
    """Bounds of a request. Raises ServeError: a value below 1."""

    upload_mb: float = 200
    """Megabytes of a photograph."""
    megapixels: float = 50
    """Of a photograph, before it is enlarged."""
    queue: int = 32
    """Photographs that wait; SEATS more are in work."""
    timeout_s: float = 600
    """Seconds from the arrival of a request to the start of its answer."""
    upload_s: float = 60
    """Seconds within which the photograph must have arrived."""

    def __post_init__(self) -> None:
        for field, option in zip(fields(self), OPTIONS, strict=True):
            if not getattr(self, field.name) >= 1:
                raise ServeError(f"{option}: expected at least 1, got {getattr(self, field.name):g}")

    @property
    def upload_bytes(self) -> int:
        return int(self.upload_mb * 1e6)

    @property
    def places(self) -> int:
        """Requests that are let in."""
        return self.queue + SEATS


OPTIONS = ("--max-upload", "--max-megapixels", "--queue", "--timeout", "--upload-timeout")
"""The options of the command line that set the fields of Limits."""


def _as_query(line: str) -> str:
    """`--crop: ...` -> `crop: ...`, on one line."""
    line = re.sub(r"^-o \S+: ", "", " ".join(line.split()))
    return re.sub(r"--(?=(format|bits|quality|scale|crop)\b)", "", line)

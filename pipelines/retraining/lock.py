"""One retraining at a time: a lock on the data folder, and one in SHARDS if that is a bucket.

Locally the kernel's flock is the lock; it ends with its process, however that ends. The file's content only says who
holds it. In a bucket the lock is an object that a conditional write creates (If-None-Match: *) and that its holder
writes again every HEARTBEAT_S. It is stale, and the next run replaces it by another conditional write, if

- its process is gone: same machine, and another boot id or no such process; or
- it is from another machine, and STALE_S old by the server's clock.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from preprocessing.shard_folder.small_json import SmallJsonError, parse_json
from preprocessing.storage import Folder, machine, one_line, open_folder, process

if TYPE_CHECKING:
    from collections.abc import Callable

LOCK = "retrain.lock"
"""In the data folder."""
SHARDS_LOCK = "_retrain.lock"
"""In SHARDS, if that is a bucket."""
HEARTBEAT_S = 60.0
STALE_S = 15 * 60.0
"""A holder on another machine that has been silent for this long counts as dead."""
ATTEMPTS = 5
"""Conditional writes that may lose to other runs before this one gives way."""
_UNSUPPORTED = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)


class RetrainRunning(Exception):
    """Another retraining is at work. Not an error: what this one would do, the other does."""


class LockError(ValueError):
    """The lock cannot be taken or was lost; one line."""


def boot_id() -> str:
    """The kernel's id of this boot; "" without /proc (macOS)."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def local_time(time_s: float) -> str:
    """Seconds since 1970 as local time with its zone, e.g. "2026-11-28 02:00 CET"."""
    return time.strftime("%Y-%m-%d %H:%M %Z", time.localtime(time_s))


@dataclass(frozen=True)
class Holder:
    """Who holds a lock."""

    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)
    since: float = field(default_factory=time.time)
    """Seconds since 1970 (UTC)."""
    machine: str = field(default_factory=machine)
    boot: str = field(default_factory=boot_id)
    process: str = field(default_factory=lambda: process("self"))
    """Process id and start time, because ids are used again."""
    token: str = field(default_factory=lambda: uuid.uuid4().hex)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {local_time(self.since)}"

    @property
    def is_here(self) -> bool:
        """Whether this machine can tell if the holder still runs."""
        return self.machine == machine() and bool(self.process)

    @property
    def runs_here(self) -> bool:
        """Whether it is a running process of this machine."""
        return self.is_here and self.boot == boot_id() and process(str(self.pid)) == self.process

    def is_stale(self, silent_s: float) -> bool:
        """Whether the holder is gone.

        Args:
            silent_s: seconds since it wrote the lock last.
        """
        return not self.runs_here if self.is_here else silent_s > STALE_S

    def to_json(self) -> bytes:
        """The lock's content; the time makes each heartbeat another version of the object."""
        return json.dumps(asdict(self) | {"heartbeat": time.time()}).encode()


def _parse(content: bytes, where: str) -> Holder | None:
    """The holder in a lock's content; None if that is damaged, or of an earlier version."""
    try:
        return parse_json(content, where, Holder, max_bytes=10_000)
    except SmallJsonError:
        return None


class Held:
    """The locks of this process."""

    def __init__(self) -> None:
        self.shards_lock: _ObjectLock | None = None
        self.notes: list[str] = []
        """One line for each stale lock that was replaced."""

    def require(self) -> None:
        """Check that the locks are still ours, before a step that must not happen twice.

        Raises:
            LockError: this process was silent for so long that another took the lock.
        """
        if self.shards_lock is not None and not self.shards_lock.is_ours():
            raise LockError(
                f"{self.shards_lock.label}: expected to hold the lock until the end, got a process that was silent for "
                f"{STALE_S / 60:.0f} minutes and lost it; the champion stays, the next run goes on"
            )


@contextmanager
def hold(data: Path, shards: str) -> Iterator[Held]:
    """Hold the lock of the data folder, and that of SHARDS in a bucket.

    Raises:
        RetrainRunning: another retraining holds one of them; the message says which, and since when.
        LockError: a file system without locks, or a bucket without conditional writes.
    """
    held = Held()
    with _file_lock(data):
        if "://" not in shards or (folder := open_folder(shards)).is_local:
            yield held
            return
        held.shards_lock = _ObjectLock(folder, held.notes.append)
        with held.shards_lock:
            yield held


@contextmanager
def _file_lock(data: Path) -> Iterator[None]:
    data.mkdir(parents=True, exist_ok=True)
    path = data / LOCK
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _UNSUPPORTED:
                raise LockError(
                    f"--data, {data}: expected a file system with locks, got {error.strerror}; "
                    "put --data on another file system"
                ) from error
            file.seek(0)
            holder = _parse(file.read(10_000).encode(), str(path))
            raise _running(str(path), holder) from error
        file.truncate(0)
        file.write(Holder().to_json().decode())
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


def _running(label: str, holder: Holder | None) -> RetrainRunning:
    return RetrainRunning(f"{label}: a retraining is running ({holder or 'another process'}); this one ends")


class _ObjectLock:
    """The lock object in a bucket, with a thread that keeps it fresh."""

    def __init__(self, folder: Folder, note: Callable[[str], None]) -> None:
        self.uri, self.path, self.note = folder.uri, folder.path(SHARDS_LOCK), note
        self.label = f"{folder.label.rstrip('/')}/{SHARDS_LOCK}"
        self.holder = Holder()
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._beat, name="retrain-lock", daemon=True)

    def __enter__(self) -> _ObjectLock:
        try:
            self._acquire()
        except OSError as error:
            raise LockError(
                f"{self.label}: expected a bucket that takes conditional writes, got {one_line(error)}; "
                "check the address and the rights to write there"
            ) from error
        self.thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        from preprocessing import s3

        self.over.set()
        self.thread.join()
        with suppress(OSError):  # left behind, it is stale at once: its process is gone
            if self.is_ours():
                s3.delete(self.uri, self.path)

    def is_ours(self) -> bool:
        """Whether the object still names this process. Raises OSError."""
        return self._look()[0]

    def _look(self) -> tuple[bool, str | None]:
        """(whether the lock is ours, its version)"""
        from preprocessing import s3

        content, version = s3.get(self.uri, self.path)
        found = _parse(content, self.label) if content is not None else None
        return found is not None and found.token == self.holder.token, version

    def _acquire(self) -> None:
        from preprocessing import s3

        for _ in range(ATTEMPTS):
            content, version, age_s = s3.get_aged(self.uri, self.path)
            if content is not None:
                other = _parse(content, self.label)
                if other is not None and other.token == self.holder.token:
                    return  # the answer to our own write was lost on the way
                if not (other.is_stale(age_s) if other is not None else age_s > STALE_S):
                    raise _running(self.label, other)
            if s3.put_if_unchanged(self.uri, self.path, self.holder.to_json(), version):
                if content is not None:
                    self.note(f"{self.label}: a lock that was left behind ({other or 'unreadable'}) was replaced")
                return
        raise _running(self.label, None)

    def _beat(self) -> None:
        """Write the object again and again, until it is released or lost."""
        from preprocessing import s3

        while not self.over.wait(HEARTBEAT_S):
            with suppress(OSError):  # tried again at the next beat; STALE_S leaves time for several
                ours, version = self._look()
                if not ours:
                    return
                s3.put_if_unchanged(self.uri, self.path, self.holder.to_json(), version)


def describe(data: Path, shards: str | None) -> str:
    """One line for `sdan status`: who holds which lock; takes none, so that no retraining is kept from starting.

    Args:
        shards: of the last retraining; its lock is read if it is a bucket.
    """
    found = []
    path = data / LOCK
    if path.exists() and (content := path.read_bytes()[:10_000]):
        holder = _parse(content, str(path))
        if holder is None:
            found.append(f"{path}: unreadable")
        elif not holder.is_here:
            found.append(f"{path}: {holder}, on another machine")
        elif holder.runs_here:
            found.append(f"{path}: {holder}")
    if shards is not None and "://" in shards and (line := _describe_object(open_folder(shards))):
        found.append(line)
    return "; ".join(found) or "free"


def _describe_object(folder: Folder) -> str | None:
    from preprocessing import s3

    label = f"{folder.label.rstrip('/')}/{SHARDS_LOCK}"
    try:
        content, _, age_s = s3.get_aged(folder.uri, folder.path(SHARDS_LOCK))
    except OSError as error:
        return f"{label}: unknown, {one_line(error)[:200]}"
    if content is None:
        return None
    holder = _parse(content, label)
    stale = holder.is_stale(age_s) if holder is not None else age_s > STALE_S
    return f"{label}: {holder or 'unreadable'}, last seen {age_s:.0f} s ago{', stale' if stale else ''}"

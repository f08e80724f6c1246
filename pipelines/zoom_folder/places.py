"""Where photographs come from and results go: a local folder, or a prefix of a bucket, with one interface.

A local folder needs no pyarrow, which only the extra `train` installs, and may hold names that are not UTF-8.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pipelines.zooming.request import ZoomError, shown
from preprocessing.storage import Folder, abandoned, one_line, write_atomically, writer_id

MAX_PUT_BYTES = 5 * 1024**3
"""Most bytes that S3 takes in one request."""


class PlaceError(ZoomError):
    """A place that cannot be listed or written; ends the run."""


@dataclass(frozen=True)
class Entry:
    """A file in a listing."""

    path: str
    """Relative to the place, with "/"."""
    bytes: int
    modified_ns: int


class Place(Protocol):
    """Paths are relative to the place. What can fail raises OSError."""

    @property
    def uri(self) -> str:
        """Opens the same place in another process."""

    def label(self, path: str = "") -> str:
        """A path for messages, as the user would write it."""

    def contains(self, other: Place) -> str | None:
        """The other place relative to this one, "" for the same; None if it lies elsewhere."""

    def is_file(self) -> bool: ...

    def entries(self, path: str = "", unreadable: list[OSError] | None = None) -> list[Entry]:
        """All files below a folder, or one file; [] if there is nothing. `unreadable` receives folders' errors."""

    def sizes(self, paths: Iterable[str]) -> dict[str, int]:
        """Bytes of those files that exist."""

    def fetch(self, path: str, folder: Path) -> Path:
        """A local file with the content; a copy is put into `folder`."""

    def aside(self, path: str, folder: Path) -> Path:
        """The local file to write for `deliver`."""

    def deliver(self, path: str, file: Path) -> None:
        """Put the file that was written to `aside` in place, in one step."""

    def read(self, path: str) -> bytes | None:
        """None: no such file."""

    def write(self, path: str, data: bytes) -> None:
        """Write a small file in one step."""

    def create(self, path: str, data: bytes) -> bool:
        """The same if there is no such file; False: there is one."""

    def delete(self, path: str) -> None:
        """No error if there is no such file."""

    def sweep(self, paths: Iterable[str]) -> None:
        """Remove what killed processes left beside these files."""


def open_place(uri: str) -> Place:
    """A local path, or s3://BUCKET/PREFIX. Raises PlaceError."""
    if "://" not in uri:
        return LocalPlace(uri)
    import pyarrow as pa

    from preprocessing.storage import open_folder

    if not uri.startswith("s3://"):
        raise PlaceError(f"{uri}: expected a path or s3://BUCKET/PREFIX, got {uri.partition(':')[0]}://; change it")
    try:
        return BucketPlace(open_folder(uri))
    except (OSError, pa.ArrowException) as error:
        raise PlaceError(f"{uri}: expected s3://BUCKET/PREFIX, got {one_line(error)}; check it") from error


@dataclass(frozen=True)
class LocalPlace:
    """A local folder, or one file."""

    named: str
    """As the user gave it."""

    @property
    def root(self) -> Path:
        return Path(self.named).absolute()

    @property
    def uri(self) -> str:
        return str(self.root)

    def label(self, path: str = "") -> str:
        return shown(Path(self.named) / path)

    def contains(self, other: Place) -> str | None:
        if not isinstance(other, LocalPlace):
            return None
        own, there = Path(os.path.realpath(self.root)), Path(os.path.realpath(other.root))
        if not there.is_relative_to(own):
            return None
        return "" if there == own else there.relative_to(own).as_posix()

    def is_file(self) -> bool:
        return self.root.is_file()

    def entries(self, path: str = "", unreadable: list[OSError] | None = None) -> list[Entry]:
        def fail(error: OSError) -> None:
            if isinstance(error, FileNotFoundError):
                return
            if unreadable is None:
                raise error
            unreadable.append(error)

        start = self.root / path
        walk: Iterable[tuple[str | Path, list[str], list[str]]]
        walk = [(start.parent, [], [start.name])] if start.is_file() else os.walk(start, onerror=fail)
        found = []
        for folder, _, names in walk:
            for name in names:
                file = Path(folder, name)
                with contextlib.suppress(OSError):  # a link to nothing, or removed meanwhile
                    status = file.stat()
                    if stat.S_ISREG(status.st_mode):
                        relative = file.relative_to(self.root).as_posix()
                        found.append(Entry(relative, status.st_size, status.st_mtime_ns))
        return found

    def sizes(self, paths: Iterable[str]) -> dict[str, int]:
        found = {}
        for path in paths:
            with contextlib.suppress(OSError):
                found[path] = (self.root / path).stat().st_size
        return found

    def fetch(self, path: str, folder: Path) -> Path:
        return self.root / path

    def aside(self, path: str, folder: Path) -> Path:
        return self.root / path

    def deliver(self, path: str, file: Path) -> None:
        """Nothing: files are written aside and renamed by `write_levels`."""

    def read(self, path: str) -> bytes | None:
        try:
            return (self.root / path).read_bytes()
        except FileNotFoundError:
            return None

    def write(self, path: str, data: bytes) -> None:
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(target, data)

    def create(self, path: str, data: bytes) -> bool:
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}~{writer_id()}")
        temporary.write_bytes(data)
        try:
            os.link(temporary, target)
        except OSError:
            if target.exists():
                return False
            temporary.replace(target)  # a file system without links
        finally:
            temporary.unlink(missing_ok=True)
        return True

    def delete(self, path: str) -> None:
        (self.root / path).unlink(missing_ok=True)

    def sweep(self, paths: Iterable[str]) -> None:
        for folder in {(self.root / path).parent for path in paths}:
            sweep_folder(folder, ".")


@dataclass(frozen=True)
class BucketPlace:
    """A prefix of a bucket, or one object."""

    folder: Folder

    @property
    def uri(self) -> str:
        return self.folder.uri

    def label(self, path: str = "") -> str:
        return f"{self.folder.label.rstrip('/')}/{path}" if path else self.folder.label

    def contains(self, other: Place) -> str | None:
        if not isinstance(other, BucketPlace) or not f"{other.folder.root}/".startswith(f"{self.folder.root}/"):
            return None
        return self.folder.relative(other.folder.root)

    def is_file(self) -> bool:
        from pyarrow import fs

        return self.folder.filesystem.get_file_info(self.folder.root).type == fs.FileType.File

    def entries(self, path: str = "", unreadable: list[OSError] | None = None) -> list[Entry]:
        from pyarrow import fs

        of_path = self.folder.filesystem.get_file_info(self.folder.path(path))
        found = [of_path] if of_path.type == fs.FileType.File else self.folder.files(path, recursive=True)
        return [Entry(self.folder.relative(entry.path), entry.size, entry.mtime_ns) for entry in found]

    def sizes(self, paths: Iterable[str]) -> dict[str, int]:
        wanted = set(paths)
        return {entry.path: entry.bytes for entry in self.entries() if entry.path in wanted}

    def fetch(self, path: str, folder: Path) -> Path:
        local = folder / f"photo{Path(path).suffix}"
        with self.folder.filesystem.open_input_stream(self.folder.path(path)) as source, local.open("wb") as copy:
            shutil.copyfileobj(source, copy, 1 << 20)
        return local

    def aside(self, path: str, folder: Path) -> Path:
        return folder / f"zoomed{Path(path).suffix}"

    def deliver(self, path: str, file: Path) -> None:
        from preprocessing import s3

        if file.stat().st_size > MAX_PUT_BYTES:
            raise ZoomError(
                f"{self.label(path)}: expected at most 5 GB for a bucket, got more; use --format jpg or --crop"
            )
        with file.open("rb") as data:
            s3.put(self.folder.uri, self.folder.path(path), data)

    def read(self, path: str) -> bytes | None:
        return self.folder.read(path) if self.folder.exists(path) else None

    def write(self, path: str, data: bytes) -> None:
        self.folder.put(path, data)

    def create(self, path: str, data: bytes) -> bool:
        from preprocessing import s3

        return s3.put_if_unchanged(self.folder.uri, self.folder.path(path), data, None)

    def delete(self, path: str) -> None:
        self.folder.delete(path)

    def sweep(self, paths: Iterable[str]) -> None:
        """Nothing: an upload is one request."""


def sweep_folder(folder: Path, start: str) -> None:
    """Remove files and folders that a killed process of this machine wrote aside; their names begin with `start`."""
    with contextlib.suppress(OSError):
        for entry in list(os.scandir(folder)):
            if entry.name.startswith(start) and abandoned(entry.name, entry.stat(follow_symlinks=False).st_mtime):
                if entry.is_dir(follow_symlinks=False):
                    shutil.rmtree(entry.path, ignore_errors=True)
                else:
                    Path(entry.path).unlink(missing_ok=True)

"""One interface to local folders and `s3://` URIs: list, read, write atomically, move, delete.

Everything uses pyarrow.fs, except uploads and deletions on S3 (s3.py) and `write_atomically`. pyarrow and boto3 are
imported only when used, because `sdan zoom` calls `write_atomically` and may be installed without them.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.fs


class UriError(ValueError):
    """A URI that must not be used; the message does not repeat what is secret in it."""


ENDS_BYTES = 64 * 1024
"""Bytes that `read_ends` reads at each end of a file."""
_STALE_S = 24 * 3600
"""Temporary files of other machines are abandoned at this age."""
_TEMPORARY_NAME_CHARS = 32
"""Characters of the target's name in a temporary file's name, because file names are limited to 255 bytes."""


@dataclass(frozen=True)
class Folder:
    """One folder of a file system; paths given to its methods are relative to it."""

    filesystem: pyarrow.fs.FileSystem
    root: str
    label: str
    """The path or URI that the user gave, for messages."""

    @property
    def uri(self) -> str:
        """A URI that opens this folder from any process, even with another working directory."""
        return self.root if self.is_local else self.label

    def path(self, relative: str) -> str:
        return f"{self.root}/{relative}" if relative else self.root

    def files(
        self, relative: str = "", *, recursive: bool = False, not_utf_8: list[str] | None = None
    ) -> list[pyarrow.fs.FileInfo]:
        """List the files (not folders) below `relative` without opening any; [] if the folder does not exist.

        Files whose names are not UTF-8 are left out: pyarrow, Parquet and JSON cannot hold them. `not_utf_8` receives
        their paths relative to this folder, the foreign bytes as \\xNN.
        """
        from pyarrow import fs

        selector = fs.FileSelector(self.path(relative), allow_not_found=True, recursive=recursive)
        found = []
        for entry in self.filesystem.get_file_info(selector):
            if entry.type != fs.FileType.File:
                continue
            try:
                entry.path  # noqa: B018  # decodes the name
                found.append(entry)
            except UnicodeDecodeError as error:
                if not_utf_8 is not None:
                    not_utf_8.append(self.relative(error.object.decode("utf-8", "backslashreplace")))
        return found

    def relative(self, path: str) -> str:
        """A listed path relative to this folder."""
        return path[len(self.root) :].lstrip("/")

    def exists(self, relative: str = "") -> bool:
        from pyarrow import fs

        return self.filesystem.get_file_info(self.path(relative)).type != fs.FileType.NotFound

    def read(self, relative: str, limit: int | None = None) -> bytes:
        """The whole file, or its first `limit` bytes."""
        with self.filesystem.open_input_file(self.path(relative)) as file:
            return file.read(limit) if limit is not None else file.read()

    def read_ends(self, relative: str) -> tuple[bytes, bytes]:
        """(first, last) `ENDS_BYTES` of a file. They do not overlap: in a short file `last` is shorter."""
        with self.filesystem.open_input_file(self.path(relative)) as file:
            size = file.size()
            first = file.read_at(min(size, ENDS_BYTES), 0)
            last = file.read_at(min(size - len(first), ENDS_BYTES), max(len(first), size - ENDS_BYTES))
        return first, last

    def put(self, relative: str, data: bytes | pa.Buffer) -> None:
        """Write a file so that readers see the old file (or none) or the complete new one, even if we are killed.

        Local files go through `write_atomically`; on S3 it is a single request. Raises OSError.
        """
        target = self.path(relative)
        if not self.is_local:
            from preprocessing import s3

            s3.put(self.uri, target, data)
            return
        self.filesystem.create_dir(target.rpartition("/")[0], recursive=True)
        write_atomically(Path(target), data)

    def update(self, relative: str, change: Callable[[bytes | None], bytes]) -> None:
        """Replace a file's content by change(content), content None if there is no file. Concurrent updates are safe.

        Locally a lock serialises them. On S3 the write is conditional, and `change` is called again after a conflict.
        """
        if self.is_local:
            with self._locked():
                old = self.read(relative) if self.exists(relative) else None
                new = change(old)
                if new != old:
                    self.put(relative, new)
            return
        from preprocessing import s3

        done = False
        while not done:
            old, version = s3.get(self.uri, self.path(relative))
            new = change(old)
            done = new == old or s3.put_if_unchanged(self.uri, self.path(relative), new, version)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the folder's lock; the kernel releases it if we die. Some network file systems have no locks."""
        self.filesystem.create_dir(self.root, recursive=True)
        folder = os.open(self.root, os.O_RDONLY)
        try:
            with contextlib.suppress(OSError):
                fcntl.flock(folder, fcntl.LOCK_EX)
            yield
        finally:
            os.close(folder)

    def move(self, source: str, target: str) -> None:
        """Move a file within the folder; on S3, copy then delete. No error if another run has already moved it."""
        try:
            if self.is_local:
                self.filesystem.create_dir(self.path(target).rpartition("/")[0], recursive=True)
                self.filesystem.move(self.path(source), self.path(target))
                return
            self.filesystem.copy_file(self.path(source), self.path(target))
        except OSError:
            if not self.exists(target):
                raise
        self.delete(source)

    def delete(self, relative: str) -> None:
        """Remove a file. No error if it is missing: another run may have removed it."""
        self._delete_path(self.path(relative))

    def _delete_path(self, path: str) -> None:
        if not self.is_local:
            from preprocessing import s3

            s3.delete(self.uri, path)
            return
        try:
            self.filesystem.delete_file(path)
        except OSError:
            if Path(path).is_file():
                raise

    def sweep(self, relative: str) -> None:
        """Remove temporary files that killed runs left in the local folder `relative`.

        A file is removed if its writer ran on this machine and is dead, or ran elsewhere and the file is a day old.
        """
        if not self.is_local:
            return
        for entry in self.files(relative):
            if entry.base_name.startswith(".") and abandoned(entry.base_name, entry.mtime_ns / 1e9):
                self._delete_path(entry.path)

    @property
    def is_local(self) -> bool:
        return self.filesystem.type_name == "local"


def open_folder(uri: str) -> Folder:
    """Open a local path or `s3://bucket/prefix`. S3 credentials and endpoint come from AWS's environment variables.

    The folder need not exist. Raises OSError or pyarrow.ArrowInvalid for a malformed or unsupported URI, OSError for a
    path that is not UTF-8, and UriError for a URI with a password.
    """
    require_no_password(uri)
    import pyarrow as pa
    from pyarrow import fs

    if "://" in uri:
        if not uri.startswith(("s3://", "file://")):
            raise pa.ArrowInvalid(f"{uri}: expected a folder or s3://, got {uri.partition(':')[0]}://")
        filesystem, root = fs.FileSystem.from_uri(uri)
    else:
        filesystem, root = fs.LocalFileSystem(), str(Path(uri).absolute())
        try:
            root.encode()
        except UnicodeEncodeError as error:
            shown = os.fsencode(uri).decode("utf-8", "backslashreplace")
            raise OSError(f"{shown}: expected a path in UTF-8, got other bytes; rename the folder") from error
    return Folder(filesystem, root.rstrip("/"), uri)


def require_no_password(uri: str) -> None:
    """Refuse a URI with user name or password: runs, shards and MLflow store URIs as they are given.

    Raises UriError.
    """
    scheme, separator, rest = uri.partition("://")
    authority, slash, path = rest.partition("/")
    if separator and "@" in authority:
        raise UriError(
            f"{scheme}://{authority.rpartition('@')[2]}{slash}{path}: expected a URI without user name and password, "
            "got one with them; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or use a profile or role"
        )


@contextlib.contextmanager
def held(folder: Path) -> Iterator[bool]:
    """Hold a local folder, so that one command at a time works in it; False if another one holds it.

    The folder is created if missing, and removed in the end if it is empty. The kernel releases it when this process
    ends, however that ends. On a file system without locks nothing is held. Raises OSError.
    """
    descriptor = _lock_folder(folder)
    try:
        yield descriptor is not None
    finally:
        if descriptor is not None:
            with contextlib.suppress(OSError):
                folder.rmdir()
            os.close(descriptor)


def _lock_folder(folder: Path) -> int | None:
    """A descriptor of the folder that has its lock; None if another one has it."""
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            with contextlib.suppress(FileNotFoundError):  # its holder has just removed it
                if not stat.S_ISDIR(folder.lstat().st_mode):
                    raise
        with contextlib.suppress(FileNotFoundError):
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                return None
            except OSError:
                return descriptor  # no locks here
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), folder.stat()):
                    return descriptor
            os.close(descriptor)


def write_atomically(path: Path, data: bytes | str | pa.Buffer) -> None:
    """Write a local file so that readers see either the old file or the complete new one, even if the writer is killed.

    The data goes to a temporary file in the same folder, which is then renamed. The folder must exist. Text is encoded
    as UTF-8. When several processes write the same path, the last one wins. Raises OSError.
    """
    with _renamed(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


@contextlib.contextmanager
def new_file(path: Path, *, replace: bool = True) -> Iterator[BinaryIO]:
    """As `write_atomically`, for data that comes in parts; an error while it is written removes what there is.

    Raises FileExistsError if `path` exists in the end, and not `replace`: another program wrote it meanwhile.
    """
    with _renamed(path, replace=replace) as temporary, temporary.open("wb") as file:
        yield file


@contextlib.contextmanager
def _renamed(path: Path, *, replace: bool = True) -> Iterator[Path]:
    """A temporary name, which becomes `path` in the end, or is removed after an error."""
    temporary = path.with_name(f".{path.name[:_TEMPORARY_NAME_CHARS]}~{writer_id()}")
    try:
        yield temporary
        if replace:
            temporary.replace(path)
        else:
            _rename_to_new(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _rename_to_new(temporary: Path, path: Path) -> None:
    """Rename in one step that fails if the name is taken. Raises FileExistsError."""
    try:
        path.hardlink_to(temporary)
    except FileExistsError:
        raise
    except OSError as error:  # a file system without hard links
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from error
        temporary.replace(path)
    else:
        temporary.unlink()


def one_line(error: BaseException) -> str:
    """An exception's message without line breaks; its type's name if the message is empty."""
    return " ".join(str(error).split()) or type(error).__name__


def writer_id() -> str:
    """Suffix of a temporary file's name: machine, process and a random part, separated by "~"."""
    return f"{machine()}~{process('self')}~{uuid.uuid4().hex[:8]}"


@lru_cache
def machine() -> str:
    """Host name and process id namespace: containers may share a host name. Without /proc (macOS), the host name."""
    namespace = Path("/proc/self/ns/pid")
    return f"{socket.gethostname()}-{namespace.stat().st_ino if namespace.exists() else 0}"


def process(pid: str) -> str:
    """The process's id and start time, since ids are reused; "" if it is not running."""
    try:
        number, _, rest = Path(f"/proc/{pid}/stat").read_text().partition(" ")
    except (FileNotFoundError, ProcessLookupError):
        return ""
    state, *fields = rest.rpartition(")")[2].split()
    return "" if state in "ZX" else f"{number}-{fields[18]}"


def abandoned(name: str, modified_s: float) -> bool:
    """Whether the writer of this temporary file, last modified at `modified_s` (Unix time), is dead."""
    parts = name.rsplit("~", 3)
    if len(parts) != 4:
        return False
    _, host, writer, _ = parts
    if host == machine():
        return process(writer.partition("-")[0]) != writer
    return time.time() - modified_s > _STALE_S

"""Names of the files in SHARDS that are not shards, and access to those of older versions.

Readers of Parquet folders skip names that start with "_", so pandas and pyarrow open SHARDS as it is. Version 0.2 wrote
the same names without it; they are still read, and moved by the next run that writes.
"""

import contextlib
from pathlib import Path

from preprocessing.storage import Folder

DATASET = "_dataset.json"
RATE = "_rate.json"
QUARANTINE = "_quarantine"


def read_stored(folder: Folder, name: str) -> bytes | None:
    """The file's content, under its name or its older one; None if there is neither."""
    for path in (name, _older(name)):
        with contextlib.suppress(FileNotFoundError):
            if folder.exists(path):
                return folder.read(path)
    return None


def note_files(folder: Folder) -> dict[str, str]:
    """{name in the quarantine: path below SHARDS}; a note that is in both places counts once, as the newer."""
    found = {}
    for place in (_older(QUARANTINE), QUARANTINE):
        for entry in folder.files(place):
            if entry.base_name.endswith(".json") and not entry.base_name.startswith("."):
                found[entry.base_name] = folder.relative(entry.path)
    return found


def move_older(folder: Folder) -> None:
    """Give files of version 0.2 their present names; those that have been written since win. A killed move goes on at
    the next call."""
    pairs = [(_older(name), name) for name in (DATASET, RATE)]
    pairs += [(entry, f"{QUARANTINE}/{entry.rpartition('/')[2]}") for entry in _in(folder, _older(QUARANTINE))]
    for old, new in pairs:
        if folder.exists(old):
            if folder.exists(new):
                folder.delete(old)
            else:
                folder.move(old, new)
    if folder.is_local:
        with contextlib.suppress(OSError):
            Path(folder.path(_older(QUARANTINE))).rmdir()


def _in(folder: Folder, place: str) -> list[str]:
    return [folder.relative(entry.path) for entry in folder.files(place)]


def _older(name: str) -> str:
    return name.removeprefix("_")

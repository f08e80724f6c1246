"""What a SHARDS folder says about pairs, frames and sequences that could not be used."""

from collections import Counter
from collections.abc import Iterable
from typing import NotRequired

from typing_extensions import TypedDict  # pydantic refuses typing.TypedDict on Python 3.11

from preprocessing.shard_folder.names import QUARANTINE, note_files
from preprocessing.shard_folder.small_json import SmallJsonError, parse_json
from preprocessing.storage import Folder

_MAX_NOTE_BYTES = 1_000_000


class Note(TypedDict):
    """A quarantine note."""

    sequence: str
    pair: str
    reason: str
    fingerprint: NotRequired[str | None]
    """Of the inputs that were at fault. None or missing: the next run tries again."""
    unaligned: NotRequired[bool]
    """The pictures do not show the same thing."""


def parse_note(folder: Folder, path: str) -> Note:
    """The note at `path` below SHARDS. Raises SmallJsonError, FileNotFoundError if it has just been removed."""
    return parse_json(folder.read(path), f"{folder.label}/{path}", Note, max_bytes=_MAX_NOTE_BYTES)


def why_no_shards(folder: Folder, *, limit: int = 200) -> str:
    """E.g. "12 are set aside, most often because: REASON (see SHARDS/_quarantine)"; "" if nothing is set aside.

    At most `limit` notes are read.
    """
    files = note_files(folder)
    reasons = []
    for path in list(files.values())[:limit]:
        try:
            reasons.append(parse_note(folder, path)["reason"])
        except (SmallJsonError, OSError):
            reasons.append("a damaged note")
    return f"{summary(reasons, len(files))} (see {folder.label}/{QUARANTINE})" if reasons else ""


def summary(reasons: Iterable[str], number: int) -> str:
    """The same for all reasons, without the folder. File names at a reason's start are left out to group them."""
    [(most, count)] = Counter(map(_without_file, reasons)).most_common(1)
    how_often = "because" if count == number else "most often because"
    return f"{number} {'is' if number == 1 else 'are'} set aside, {how_often}: {most}"


def _without_file(reason: str) -> str:
    name, colon, rest = reason.partition(": ")
    return rest if colon and "/" in name else reason

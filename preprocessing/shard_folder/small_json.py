"""The one reader of small JSON files: size, encoding, syntax and types are checked, and errors name the file."""

from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

T = TypeVar("T")

MAX_BYTES = 64_000_000
"""Far more than the splits of a million sequences take."""


class SmallJsonError(ValueError):
    """A JSON file that cannot be used; the message is one line that names it and says why."""


def parse_json(data: bytes, where: str, schema: type[T], *, max_bytes: int = MAX_BYTES) -> T:
    """The content of a JSON file as `schema`, a dataclass or TypedDict; types are checked strictly.

    Keys that `schema` does not name are dropped. `where` is the file's name, for messages.

    Raises SmallJsonError: too large, not UTF-8, not JSON, too deeply nested, or of other types.
    """
    if len(data) > max_bytes:
        raise SmallJsonError(f"{where}: expected at most {max_bytes} bytes, got more")
    kind: Any = schema
    try:
        content: T = _adapter(kind).validate_json(data, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        got = " ".join((f"{place}: {first['msg']}" if place else first["msg"]).split())
        raise SmallJsonError(f"{where}: expected JSON as SDAN writes it, got {got}") from None
    return content


def read_json(path: Path, schema: type[T], *, max_bytes: int = MAX_BYTES) -> T:
    """`parse_json` of a local file; no more than `max_bytes` are read. Raises SmallJsonError, OSError."""
    with path.open("rb") as file:
        data = file.read(max_bytes + 1)
    return parse_json(data, str(path), schema, max_bytes=max_bytes)


@lru_cache
def _adapter(schema: Any) -> Any:
    return TypeAdapter(schema)

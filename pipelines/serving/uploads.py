"""Receives a photograph, as the body of a request or as a file of a form, into a file of bounded size."""

from __future__ import annotations

import asyncio
import re
import shutil
from collections.abc import AsyncGenerator
from pathlib import Path

from fastapi import Request
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from pipelines.serving.limits import Limits, Refused

_NAME = "photo"
_LONGEST_NAME = 80
_FORM_BYTES = 2**16
"""What a form may have beside its file."""


async def receive(request: Request, folder: Path, name: str | None, limits: Limits) -> Path:
    """Write the photograph of a request into `folder`.

    Args:
        name: its file name, for a request whose body is the photograph; the suffix tells TIFF from RAW. A form has the
            name beside the file.

    Raises:
        Refused: 400 for an empty or damaged body, or a form without one file; 408 if it takes too long; 413 if it is
            too large.
        starlette.requests.ClientDisconnect
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    _check_declared(request, limits)
    try:
        async with asyncio.timeout(limits.upload_s):
            if kind == "multipart/form-data":
                path = await _from_form(request, folder, limits)
            else:
                path = folder / safe_name(name)
                with path.open("wb") as file:
                    async for chunk in _bounded(request, limits.upload_bytes, limits):
                        file.write(chunk)
    except TimeoutError:
        line = f"upload: expected all of it within {limits.upload_s:g} s, got a part; use a faster connection"
        raise Refused(408, line) from None
    if path.stat().st_size == 0:
        raise Refused(400, "body: expected a photograph, got nothing; send the file's bytes")
    return path


def remove(folder: Path) -> None:
    """Remove a request's folder, with what has arrived."""
    shutil.rmtree(folder, ignore_errors=True)


def safe_name(name: str | None) -> str:
    """A file name that is safe on any system: letters, digits, `-`, `_` and `.` of the given one, or "photo"."""
    last = re.split(r"[/\\]", name or "")[-1]
    kept = re.sub(r"[^A-Za-z0-9._-]+", "_", last).strip("._-")
    stem, dot, suffix = kept.rpartition(".")
    if not dot:
        return kept[:_LONGEST_NAME] or _NAME
    return f"{stem[:_LONGEST_NAME] or _NAME}.{suffix[:8]}"


async def _from_form(request: Request, folder: Path, limits: Limits) -> Path:
    stream = _bounded(request, limits.upload_bytes + _FORM_BYTES, limits)
    try:
        form = await MultiPartParser(request.headers, stream, max_files=1, max_fields=0).parse()
    except MultiPartException as error:
        raise Refused(400, f"form: expected one file, got {error.message.rstrip('.')}; send the photograph") from error
    try:
        files = [value for value in form.values() if isinstance(value, UploadFile)]
        if not files:
            raise Refused(400, "form: expected one file, got none; send the photograph")
        path = folder / safe_name(files[0].filename)
        with path.open("wb") as file:
            await asyncio.to_thread(shutil.copyfileobj, files[0].file, file)
    finally:
        await form.close()
    return path


def _check_declared(request: Request, limits: Limits) -> None:
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limits.upload_bytes + _FORM_BYTES:
        raise _too_large(limits, f"{int(declared) / 1e6:.0f}")


async def _bounded(request: Request, most: int, limits: Limits) -> AsyncGenerator[bytes, None]:
    got = 0
    async for chunk in request.stream():
        got += len(chunk)
        if got > most:
            raise _too_large(limits, "more")
        yield chunk


def _too_large(limits: Limits, got: str) -> Refused:
    return Refused(413, f"body: expected at most {limits.upload_mb:g} MB, got {got}; reduce the photograph or crop it")

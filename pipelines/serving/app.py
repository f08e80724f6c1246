"""The HTTP service: its routes and answers. It needs no Ray, and is tested without it."""

from __future__ import annotations

import re
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, BinaryIO
from urllib.parse import quote

import fastapi
from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from pipelines.serving import uploads
from pipelines.serving.desk import Answer, Desk, Wish
from pipelines.serving.limits import Limits, Refused
from pipelines.serving.models import Models
from pipelines.zooming.request import DEFAULTS, Output, ZoomError, check_options, parse_crop
from preprocessing.report.page import policy_hash

WATCH_S = 5.0
"""How often the registry is asked for its champion."""
MEDIA_TYPES = {"png": "image/png", "jpg": "image/jpeg", "tiff": "image/tiff"}
_CHUNK_BYTES = 2**18
_ONE_LINE = {"content": {"text/plain": {"example": "photo.png: expected a photograph, got text; export it as JPG"}}}
_REFUSALS: dict[int | str, dict[str, Any]] = {
    400: {"description": "An option with a wrong value, or an empty or damaged body.", **_ONE_LINE},
    403: {"description": "Sent by a page of another site.", **_ONE_LINE},
    408: {"description": "The photograph took too long to arrive.", **_ONE_LINE},
    413: {"description": "Too many bytes or pixels.", **_ONE_LINE},
    415: {"description": "Not a photograph, or of a kind that is not read.", **_ONE_LINE},
    422: {"description": "A photograph that cannot be decoded, or not written as asked.", **_ONE_LINE},
    503: {"description": "Too many requests or too little memory or time; Retry-After says when to send it again."},
}
_JSON: dict[int | str, dict[str, Any]] = {200: {"description": "JSON."}}
_UNKNOWN: dict[int | str, dict[str, Any]] = {**_JSON, 404: {"description": "No request has this id.", **_ONE_LINE}}
_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
            "multipart/form-data": {
                "schema": {"type": "object", "properties": {"photo": {"type": "string", "format": "binary"}}}
            },
        },
    }
}
_PICTURES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The enlarged photograph, upright, in sRGB, with its tags.",
        "content": {kind: {"schema": {"type": "string", "format": "binary"}} for kind in MEDIA_TYPES.values()},
    }
}


def create_app(models: Models, limits: Limits, folder: Path) -> FastAPI:
    """The service as an ASGI application.

    Args:
        models: loaded; while the application runs, it follows the registry.
        folder: an existing folder for photographs that are in work.
    """
    desk = Desk(models, limits, folder)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        stop = threading.Event()
        threading.Thread(target=models.watch, args=(stop, WATCH_S), daemon=True).start()
        desk.start()
        try:
            yield
        finally:
            stop.set()
            desk.close()

    app = FastAPI(
        title="SDAN",
        description="POST a photograph (RAW, JPG, PNG, TIFF, WebP or AVIF) and get it enlarged. Errors are one line.",
        version="1",
        docs_url=None,  # FastAPI's page loads scripts from another host
        redoc_url=None,
        lifespan=lifespan,
    )
    app.state.desk = desk
    app.add_exception_handler(Refused, _refuse)
    app.add_exception_handler(RequestValidationError, _refuse_option)
    app.add_exception_handler(HTTPException, _refuse_route)
    app.add_exception_handler(Exception, _refuse_defect)
    _add_pages(app)
    _add_state(app, desk)
    _add_zoom(app, desk)
    return app


def _add_pages(app: FastAPI) -> None:
    folder = files("pipelines.serving")
    style = folder.joinpath("style.css").read_text(encoding="utf-8")
    for route, name in (("/", "page.html"), ("/docs", "docs.html")):
        page = folder.joinpath(name).read_text(encoding="utf-8").replace("{{style}}", style)
        app.add_api_route(route, _shows(page), include_in_schema=False)


def _shows(page: str) -> Callable[[], Response]:
    def show() -> Response:
        return HTMLResponse(page, headers={"Content-Security-Policy": policy, **_SAFE})

    policy = _policy(page)
    return show


_SAFE = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}


def _policy(page: str) -> str:
    """A Content-Security-Policy that allows this page's own script and style, and no other host."""

    def hashes(tag: str) -> str:
        parts = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        return " ".join(f"'{policy_hash(part)}'" for part in parts) or "'none'"

    rules = ("default-src 'none'", "img-src 'self' blob: data:", "connect-src 'self'", "base-uri 'none'")
    own = (f"script-src {hashes('script')}", f"style-src {hashes('style')}", "frame-ancestors 'none'")
    return "; ".join((*rules, *own, "form-action 'none'"))


def _add_state(app: FastAPI, desk: Desk) -> None:
    @app.get("/healthz", summary="Whether the service works, its model and its limits", responses=_JSON)
    async def healthz() -> dict[str, Any]:
        limits = desk.limits
        return {
            "status": "ok",
            "model": desk.models.current.name,
            "inside": desk.inside,
            "max_upload_mb": limits.upload_mb,
            "max_megapixels": limits.megapixels,
            "queue": limits.queue,
            "timeout_s": limits.timeout_s,
        }

    @app.get("/progress/{id}", summary="How far the request with this id is", responses=_UNKNOWN)
    async def progress(identifier: Annotated[str, fastapi.Path(alias="id")]) -> dict[str, Any]:
        ticket = desk.ticket(identifier)
        if ticket is None:
            raise Refused(404, f"/progress/{identifier[:64]}: expected the id of a request, got another")
        share = ticket.done / ticket.total if ticket.total else 0.0
        return {"stage": ticket.stage, "share": round(share, 4), "preview": ticket.preview is not None}

    @app.get("/preview/{id}", include_in_schema=False)
    async def preview(identifier: Annotated[str, fastapi.Path(alias="id")]) -> Response:
        ticket = desk.ticket(identifier)
        if ticket is None or ticket.preview is None:
            raise Refused(
                404, f"/preview/{identifier[:64]}: expected the id of a request with preview=true, got another"
            )
        return Response(ticket.preview, media_type="image/jpeg", headers={**_SAFE, "Cache-Control": "no-store"})


def _add_zoom(app: FastAPI, desk: Desk) -> None:
    @app.post(
        "/zoom",
        summary="Enlarge a photograph",
        response_class=Response,
        responses=_PICTURES | _REFUSALS,
        openapi_extra=_BODY,
    )
    async def zoom(
        request: Request,
        name: Annotated[str | None, Query(description="File name; its suffix tells TIFF from RAW.")] = None,
        kind: Annotated[str, Query(alias="format", description="png, jpg or tiff.")] = "png",
        bits: Annotated[int | None, Query(description="8 or 16; default: 16 for tiff, else 8.")] = None,
        quality: Annotated[int, Query(description="Of jpg, 1 to 100.")] = DEFAULTS.quality,
        scale: Annotated[int | None, Query(description="2, 3, 4 or 8; default: the model's.")] = None,
        crop: Annotated[str | None, Query(description="X,Y,W,H in pixels: only this part.")] = None,
        strength: Annotated[float, Query(ge=0, le=1, description="1: the model's detail; 0: bicubic.")] = 1.0,
        gps: Annotated[bool, Query(description="false leaves the place out of the tags.")] = True,
        preview: Annotated[bool, Query(description="Keep what /preview/ID shows.")] = False,
        identifier: Annotated[
            str | None, Query(alias="id", pattern="^[A-Za-z0-9-]{8,64}$", description="For /progress/ID; choose one.")
        ] = None,
    ) -> Response:
        """The body is the photograph, or a form with it as its only file."""
        if request.headers.get("sec-fetch-site") == "cross-site":
            raise Refused(403, "request: expected one from this service's page, got one from another site")
        wish = Wish(_output(kind, bits, quality, scale, crop, gps), strength, preview)
        with desk.place(identifier) as ticket:
            folder = desk.new_folder()
            try:
                path = await uploads.receive(request, folder, name, desk.limits)
            except BaseException:
                uploads.remove(folder)
                raise
            answer = await desk.zoom(ticket, path, wish)
        return _sent(answer, kind)


def _output(kind: str, bits: int | None, quality: int, scale: int | None, crop: str | None, gps: bool) -> Output:
    """The options of a query. Raises Refused with 400."""
    if kind not in MEDIA_TYPES:
        raise Refused(400, f"format: expected png, jpg or tiff, got {kind}")
    try:
        area = None if crop is None else parse_crop(crop)
        output = Output(kind, bits, quality, scale, area, gps=gps)
        check_options(Path("photo"), output)
    except ZoomError as error:
        raise Refused(400, str(error)) from error
    return output


def _sent(answer: Answer, kind: str) -> Response:
    headers = {
        "Content-Length": str(answer.bytes),
        "Content-Disposition": f'attachment; filename="{answer.name}"',
        "X-Sdan-Model": quote(answer.model, safe=" ,"),
        "X-Sdan-Size": f"{answer.width}x{answer.height}",
        "X-Sdan-Notes": quote("; ".join(answer.notes), safe=" ,;:()"),
        "Cache-Control": "no-store",
        **_SAFE,
    }
    return StreamingResponse(_chunks(answer.file), media_type=MEDIA_TYPES[kind], headers=headers)


def _chunks(file: BinaryIO) -> Iterator[bytes]:
    with file:
        while chunk := file.read(_CHUNK_BYTES):
            yield chunk


async def _refuse(_: Request, refused: Exception) -> Response:
    assert isinstance(refused, Refused)
    headers = dict(_SAFE)
    if refused.retry_after_s is not None:
        headers["Retry-After"] = str(refused.retry_after_s)
    return PlainTextResponse(f"{refused}\n", refused.status, headers)


async def _refuse_option(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    wanted = first["msg"].removeprefix("Input should be ").removeprefix("String should ")
    line = f"{first['loc'][-1]}: expected {wanted.partition(', ')[0]}, got {str(first.get('input'))[:60]!r}"
    return await _refuse(request, Refused(400, line))


async def _refuse_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    asked = f"{request.method} {request.url.path[:60]}"
    line = f"{asked}: expected POST /zoom, GET /, /docs, /openapi.json, /healthz or /progress/ID, got {error.detail}"
    return await _refuse(request, Refused(error.status_code, line))


async def _refuse_defect(request: Request, error: Exception) -> Response:
    """An error of ours; its traceback goes to the log."""
    line = f"{request.url.path[:60]}: expected an answer, got {type(error).__name__}; please report it"
    return await _refuse(request, Refused(500, line))

"""Reads uploaded photographs in a child process, so that a file that crashes a decoder costs only its request."""

from __future__ import annotations

import base64
import json
import os
import signal
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from pipelines.formats import tags
from pipelines.serving.limits import Limits, Refused
from pipelines.zooming.photo import Photo, TooLittleMemory, read_photo
from pipelines.zooming.request import Output, ZoomError, kind_of_photo
from preprocessing.child import CRASHES, ONE_THREAD, ChildProcess, answer_requests
from preprocessing.raw import decode
from preprocessing.raw.picture import declared_size
from preprocessing.storage import one_line
from sdan import SDANConfig

_PIXELS = "decoded.safetensors"
RETRY_S = 30
"""When to send a photograph again for which there was too little memory."""


@dataclass(frozen=True)
class Decoded:
    """A photograph, and the tags that its enlarged file gets (`formats.tags.written`)."""

    photo: Photo
    exif: bytes


class Decoder:
    """A child process that decodes one photograph at a time."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._child = ChildProcess("pipelines.serving.decoding", [str(limits.timeout_s)], ONE_THREAD)

    def start(self) -> None:
        """Start the child, so that the first photograph does not wait for its imports."""
        self._child.ask("{}")

    def close(self) -> None:
        self._child.close()

    def read(self, path: Path, network: SDANConfig, output: Output) -> Decoded:
        """Decode a photograph as input of such a network. Writes a file beside it.

        Raises Refused: 413 for too many pixels, 422 for a file that cannot be decoded or a crop outside it, 503 for too
        little memory.
        """
        request = {
            "folder": str(path.parent),
            "name": path.name,
            "network": asdict(network),
            "output": asdict(output),
            "megapixels": self._limits.megapixels,
        }
        answer, code = self._child.ask(json.dumps(request))
        if not answer:
            raise _died(path.name, code, self._limits.timeout_s)
        found = json.loads(answer)
        if "status" in found:
            raise Refused(found["status"], found["line"], RETRY_S if found["status"] == 503 else None)
        pixels = load_file(path.with_name(_PIXELS))
        path.with_name(_PIXELS).unlink()
        rendering = pixels["rendering"]
        photo = Photo(
            pixels.get("raw", rendering),
            rendering,
            found["from_raw"],
            tuple(found["window"]),
            tuple(found["notes"]),
            found["grey"],
        )
        return Decoded(photo, base64.b64decode(found["exif"]))


def _died(name: str, code: int, limit_s: float) -> Refused:
    if -code in CRASHES:
        got = f"a crash of its decoder ({signal.Signals(-code).name})"
        return Refused(422, f"{name}: expected a photograph that can be decoded, got {got}; export it again")
    if code < 0:
        return Refused(503, f"{name}: expected memory to decode it, got too little; send it again later", RETRY_S)
    return Refused(422, f"{name}: expected to be decoded within {limit_s:g} s, got no result; export it again")


def _answer(request: str) -> str:
    """Decode one photograph: JSON request to JSON answer. An empty request is answered at once."""
    fields = json.loads(request)
    if not fields:
        return "{}"
    os.chdir(fields["folder"])  # so that messages name the file without its folder
    name = fields["name"]
    try:
        return json.dumps(_decoded(Path(name), fields))
    except (TooLittleMemory, MemoryError) as error:
        line = str(error) or f"{name}: expected memory to decode it, got too little; send it again later"
        return json.dumps({"status": 503, "line": line})
    except Refused as refused:
        return json.dumps({"status": refused.status, "line": str(refused)})
    except ValueError as error:
        return json.dumps({"status": 422, "line": str(error)})
    except Exception as error:  # the decoders raise many kinds on damaged files
        got = f"{type(error).__name__}: {one_line(error)[:200]}"
        return json.dumps({"status": 422, "line": f"{name}: expected a photograph, got {got}; export it again"})


def _decoded(path: Path, fields: dict[str, Any]) -> dict[str, Any]:
    network = SDANConfig(**fields["network"])
    crop = fields["output"].pop("crop")
    output = Output(**fields["output"], crop=None if crop is None else tuple(crop))
    _check_size(path, fields["megapixels"])
    photo = read_photo(path, network, output)
    parts = {"rendering": photo.rendering.contiguous()}
    if photo.raw is not photo.rendering:
        parts["raw"] = photo.raw.contiguous()
    save_file(parts, _PIXELS)
    scale = output.scale or network.scale
    height, width = (scale * side for side in photo.window[2:])
    exif = tags.written(photo.exif, width, height, gps=output.gps, scale=scale, crop_factor=photo.crop_factor)
    return {
        "from_raw": photo.from_raw,
        "window": [int(value) for value in photo.window],
        "notes": photo.notes,
        "grey": bool(photo.grey),
        "exif": base64.b64encode(exif).decode(),
    }


def _check_size(path: Path, megapixels: float) -> None:
    """Refuse too many pixels by the file's head, before memory is taken. Raises Refused, RawError, PictureError."""
    if kind_of_photo(path) == "picture":
        height, width = declared_size(path.read_bytes(), path.name)
    else:
        height, width = decode.declared_size(path, name=path.name)
    if height * width > 1e6 * megapixels:
        got = f"{width}x{height} = {height * width / 1e6:.1f}"
        raise Refused(413, f"{path.name}: expected at most {megapixels:g} megapixels, got {got}; reduce or crop it")


def kind_of_upload(path: Path) -> str:
    """ "picture" or "raw" by the first bytes. Raises Refused with 415 for anything else."""
    try:
        return kind_of_photo(path)
    except ZoomError as error:
        raise Refused(415, str(error).replace(str(path), path.name)) from error


if __name__ == "__main__":
    answer_requests(_answer, sys.argv)

"""What a served model answers: the bytes that `sdan zoom PHOTO -o OUT.png` writes."""

from __future__ import annotations

import logging
import re
import tempfile
from pathlib import Path

from pipelines.zoom import Zoomer, ZoomError, zoom_photos

_log = logging.getLogger(__name__)
_SUFFIX = re.compile(r"\.[A-Za-z0-9]{1,8}")


def zoomed_png(zoomer: Zoomer, photo: bytes, name: str | None = None) -> bytes:
    """Zoom one photograph.

    Args:
        photo: the bytes of a RAW, JPG, PNG, TIFF, WebP or AVIF file.
        name: its file name; only the suffix counts. TIFF and most RAW are told apart by it.

    Raises:
        ZoomError: not a photograph, or one that this model cannot zoom; one line, without paths of this machine.
    """
    suffix = Path(name).suffix if name else ""
    with tempfile.TemporaryDirectory(prefix="sdan-served-") as folder:
        source, target = (
            Path(folder) / f"photo{suffix if _SUFFIX.fullmatch(suffix) else ''}",
            Path(folder) / "zoomed.png",
        )
        source.write_bytes(photo)
        try:
            zoom_photos([source], target, zoomer, say=_log.info, warn=_log.warning)
        except ZoomError as error:
            raise ZoomError(str(error).replace(f"{folder}/", "")) from error
        return target.read_bytes()

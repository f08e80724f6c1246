"""How many photographs `sdan zoom` would take, from listings alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipelines.zoom_folder.places import open_place
from pipelines.zoom_folder.plan import listed, open_sources, recorded
from pipelines.zooming.request import existing_files, is_batch


def counted(inputs: Sequence[str], out: str, scale: int) -> tuple[int, int]:
    """(photographs, how many of them have a finished output); writes nothing.

    Args:
        scale: of the outputs, for their names. Whether they are of today's model and options is not looked at.

    Raises:
        ZoomError: nothing there.
    """
    if not is_batch(inputs, out):
        return len(existing_files([Path(one) for one in inputs])), 0
    target = open_place(out)
    names = listed(open_sources(inputs, target), target)
    return len(names), recorded(names, target, scale)

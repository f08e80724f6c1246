"""Zooming a 12 MP photo on a GPU: `measured_zoom` of benchmarks/zoom.py, whose docstring explains the stages."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import zoom
from on_gpu.arithmetic import table_head, table_row
from on_gpu.runner import Session

from preprocessing.raw.dng import write_dng

RUNS = ("first", "second")
"""The first may compile kernels."""


def zoom_rows(session: Session) -> Iterator[str]:
    """The seconds of each stage; a rehearsal zooms a tiny photo."""
    yield table_head(" | ".join(("run", "tiles", "total, s", *(f"{stage}, s" for stage in zoom.STAGES), "resident MB")))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        photo = tiny_photo(folder) if session.rehearsal else zoom.full_photo(zoom.simulated_frame(folder), folder)

        def row(run: str) -> str:
            found = zoom.measured_zoom(photo, folder / "zoomed.png", session.device)
            seconds = [f"{found[stage]:.1f}" for stage in zoom.STAGES]
            total, tiles, memory = f"**{found['total']:.1f}**", f"{found['tiles']:.0f}", f"{found['peak_mb']:.0f}"
            return table_row((run, tiles, total, *seconds, memory))

        yield from session.rows(RUNS[:1] if session.rehearsal else RUNS, str, row)


def tiny_photo(folder: Path) -> Path:
    """A DNG of 64 x 96 random counts."""
    mosaic = np.random.default_rng(0).integers(600, 4000, (64, 96), dtype=np.uint16)
    write_dng(folder / "photo.dng", mosaic)
    return folder / "photo.dng"

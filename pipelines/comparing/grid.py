"""A labelled picture: held-out crops in rows, methods in columns, from the crops that the rows saved."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from pipelines.comparing import state
from pipelines.comparing.state import RowScores
from pipelines.comparing.table import label
from pipelines.scoring.pictures import CELL_PX, labelled_grid

ROWS = 4
"""Crops in the picture."""
_COLUMNS = 7
"""Methods beside each other; more of them continue below."""


def write_grid(out: Path, tiles: Sequence[str], rows: Sequence[RowScores], title: str) -> bool:
    """Write grid.png: the central CELL_PX of each crop, not scaled, or a small crop enlarged by whole pixels.

    Args:
        tiles: folder names of crops (state.tile_name).
        rows: finished rows.

    Returns:
        whether there was anything to show.
    """
    columns = [(label(row), f"{row.row}.png") for row in rows]
    true = bool(rows) and rows[0].simulated
    columns.append(("true picture" if true else "target", state.TRUE if true else state.TARGET))
    shown = [tile for tile in tiles if all((out / state.CROPS / tile / file).is_file() for _, file in columns)]
    if not shown or not rows:
        return False
    bands = []
    for first in range(0, len(columns), _COLUMNS):
        part = columns[first : first + _COLUMNS]
        cells = [[_cell(out / state.CROPS / tile / file) for _, file in part] for tile in shown]
        bands.append(labelled_grid(cells, [text for text, _ in part], title if first == 0 else None))
    width = max(band.shape[1] for band in bands)
    paper = bands[0][-1, -1]
    padded = []
    for band in bands:
        whole = np.broadcast_to(paper, (band.shape[0], width, 3)).copy()
        whole[:, : band.shape[1]] = band
        padded.append(whole)
    temporary = out / f".{state.GRID}.partial.png"
    Image.fromarray(np.concatenate(padded)).save(temporary)
    temporary.replace(out / state.GRID)
    return True


def _cell(path: Path) -> np.ndarray:
    with Image.open(path) as file:
        picture = np.asarray(file.convert("RGB"))
    factor = max(1, CELL_PX // picture.shape[0])
    picture = picture.repeat(factor, axis=0).repeat(factor, axis=1)
    top, left = (max(0, (side - CELL_PX) // 2) for side in picture.shape[:2])
    return picture[top : top + CELL_PX, left : left + CELL_PX]

"""report.html of a comparison, from the files that the rows wrote."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from pipelines.comparing import state
from pipelines.comparing.score import as_interval
from pipelines.comparing.state import Comparison, RowScores
from pipelines.comparing.table import label
from pipelines.evaluate import BASELINE
from pipelines.reporting.contents import TARGET, Crop, Method, Report, chosen_crops, gain_sentence, tables_of
from pipelines.reporting.page import FILE, write_report
from pipelines.scoring.bootstrap import Interval
from pipelines.scoring.tile_scores import FILE as TILES

CAMERA = "bicubic-camera"
"""The row that the others are compared with."""
AS_SHOT = "Pictures and error maps: the target as shot, which may lie a little off; scores: the aligned target."


def write_page(out: Path, comparison: Comparison, done: Sequence[RowScores], markdown: str) -> Path | None:
    """Write report.html and return its path; None without the row CAMERA or any other row.

    Args:
        done: finished rows, in the table's order.
        markdown: the tables and their notes.
    """
    base = next((row for row in done if row.row == CAMERA), None)
    others = [row for row in done if row.row != CAMERA]
    if base is None or not others:
        return None
    target = "true" if base.simulated else "aligned"
    scores = {row.row: _psnr(out, row.row, target) for row in done}
    order = list(scores[CAMERA]["self"])
    methods = [
        Method(_name(row, protocol), [found.get(tile, math.nan) for tile in order])
        for row in done
        for protocol, found in scores[row.row].items()
    ]
    found_gains = {row.row: _gain(row, target) for row in others}
    others.sort(key=lambda row: -found_gains[row.row].mean)
    best = others[0]
    gains = [scores[best.row]["self"].get(tile, math.nan) - scores[CAMERA]["self"][tile] for tile in order]
    pictured = [
        gain if (out / state.CROPS / tile).is_dir() else math.nan for gain, tile in zip(gains, order, strict=True)
    ]
    tables, notes = tables_of(markdown)
    report = Report(
        title=f"Table {comparison.table}{', simulated data' if base.simulated else ''}",
        sentences=[gain_sentence(_name(row, "self"), BASELINE, target, found_gains[row.row]) for row in others],
        methods=methods,
        baseline=_name(base, "self"),
        target=target,
        crops=[_crop(out, order[number], why, done, base.simulated) for number, why in chosen_crops(pictured).items()],
        tables=tables,
        notes=[line.removeprefix("- ") for line in notes if not line.startswith("# ")]
        + ([] if base.simulated else [AS_SHOT]),
        command=f"sdan compare {comparison.shards} --table {comparison.table}",
    )
    write_report(out / FILE, report)
    return out / FILE


def _name(row: RowScores, protocol: str) -> str:
    """The label of a method; a network that ignores the reference has one, without a protocol."""
    return label(row, protocol if len(row.scores) > 1 else None)


def _gain(row: RowScores, target: str) -> Interval:
    ends = row.differences.get("self", {}).get(f"{target}_psnr") or [None, None, None]
    return as_interval(ends, row.sequences)


def _psnr(out: Path, row: str, target: str) -> dict[str, dict[str, float]]:
    """Protocol -> crop -> dB."""
    found: dict[str, dict[str, float]] = {}
    for tile in pq.read_table(state.row_folder(out, row) / TILES).to_pylist():
        value = tile.get(f"{target}_psnr")
        found.setdefault(tile["protocol"], {})[tile["tile"]] = math.nan if value is None else value
    return found


def _crop(out: Path, tile: str, why: str, done: Sequence[RowScores], simulated: bool) -> Crop:
    """The pictures of every row, and the offsets of the last row that has any."""
    places: dict[str, Path] = {}
    offset = None
    for row in done:
        for protocol in row.scores:
            folder = state.ORACLE if protocol == "oracle" else state.CROPS
            places[_name(row, protocol)] = out / folder / tile / f"{row.row}.png"
        stored = out / state.OFFSETS / tile / f"{row.row}.npy"
        if stored.is_file():
            offset = np.load(stored).astype(np.float32)
    places[TARGET] = out / state.CROPS / tile / (state.TRUE if simulated else state.TARGET)
    return Crop(tile, why, _pictures(places), offset)


def _pictures(places: Mapping[str, Path]) -> dict[str, np.ndarray]:
    pictures = {}
    for name, path in places.items():
        if path.is_file():
            with Image.open(path) as file:
                pictures[name] = np.asarray(file.convert("RGB"))
    return pictures

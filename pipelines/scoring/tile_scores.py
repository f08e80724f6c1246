"""The scores of single tiles: what `sdan evaluate -o` stores as Parquet, and their means by pair, camera and so on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.scoring.scores import EDGE_PX, PLANES, PerCrop

FILE = "tiles.parquet"
GROUPS: Mapping[str, tuple[str, ...]] = {
    "pair": ("sequence", "pair"),
    "camera": ("camera",),
    "focal lengths, mm": ("focal_lr_mm", "focal_hr_mm"),
    "ISO": ("iso_lr",),
}
"""Title of a table of means -> the columns that name a row's group."""


def tile_rows(per_row: Mapping[str, PerCrop], columns: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row per method and tile: `method`, the tile's `columns` (held_out.OF_TILE), and <target>_<metric>, or NaN."""
    return [
        {"method": method, **of_tile, **{name: values[number] for name, values in scores.items()}}
        for method, scores in per_row.items()
        for number, of_tile in enumerate(columns)
    ]


def write_tiles(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write the rows; a score that only some methods have is null for the others."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    pq.write_table(pa.Table.from_pydict({name: [row.get(name) for row in rows] for name in names}), path)


def group_tables(rows: list[dict[str, Any]], metric: str) -> str:
    """Markdown: for each entry of GROUPS the mean of `metric` per group and method, and the number of tiles.

    Groups of one kind that has only one group are left out, but for pairs. Simulated data also gets means by plane.
    """
    methods = list(dict.fromkeys(row["method"] for row in rows))
    parts = []
    for title, columns in GROUPS.items():
        groups: dict[str, dict[str, list[float]]] = {}
        for row in rows:
            name = " / ".join(_shown(row[column]) for column in columns)
            groups.setdefault(name, {method: [] for method in methods})[row["method"]].append(row.get(metric, math.nan))
        if len(groups) < 2 and title != "pair":
            continue
        lines = [f"| {title} | tiles | {' | '.join(methods)} |", "|" + " --- |" * (len(methods) + 2)]
        for name, values in sorted(groups.items()):
            means = " | ".join(_mean(values[method]) for method in methods)
            lines.append(f"| {name} | {len(values[methods[0]])} | {means} |")
        parts.append("\n".join(lines))
    if planes := _plane_table(rows, metric, methods):
        parts.append(planes)
    return f"Means of {metric}.\n\n" + "\n\n".join(parts) + "\n"


def _plane_table(rows: list[dict[str, Any]], metric: str, methods: Sequence[str]) -> str:
    """Markdown: the means of `metric` by PLANES, and the tiles that show each; "" for real data."""
    lines = [f"| plane | tiles | {' | '.join(methods)} |", "|" + " --- |" * (len(methods) + 2)]
    for plane in PLANES:
        of_plane = [(row["method"], row.get(f"{metric}_{plane}")) for row in rows]
        known = [(method, value) for method, value in of_plane if value is not None and not math.isnan(value)]
        if known:
            means = " | ".join(_mean([value for name, value in known if name == method]) for method in methods)
            lines.append(f"| {plane} | {sum(name == methods[0] for name, _ in known)} | {means} |")
    if len(lines) == 2:
        return ""
    lines.append(f"\nEdges: at most {EDGE_PX} packed pixels from a boundary between the near and the far plane.")
    return "\n".join(lines)


def _shown(value: Any) -> str:
    if value is None:
        return "unknown"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _mean(values: list[float]) -> str:
    known = [value for value in values if value is not None and math.isfinite(value)]
    return f"{sum(known) / len(known):.2f}" if known else "n/a"

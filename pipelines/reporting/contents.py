"""What report.html shows: methods, crops, tables and findings in words, as plain values."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from pipelines.scoring.bootstrap import LEVEL, Interval

TARGET = "target"
"""The name of the target's picture in Crop.pictures."""


@dataclass(frozen=True)
class Method:
    """One method and its score on every tile."""

    label: str
    psnr: Sequence[float]
    """dB, one per tile, in the same order for all methods; NaN where the tile has no such target."""


@dataclass(frozen=True)
class Crop:
    """One held-out crop, zoomed by every method."""

    name: str
    """sequence/pair@row,col"""
    why: str
    """Why it is shown, e.g. "best"."""
    pictures: Mapping[str, np.ndarray]
    """Method.label or TARGET -> uint8 [H, W, 3], all of one size."""
    offset_px: np.ndarray | None = None
    """[2, h, w]: (dy, dx) in mosaic pixels, of the method that aligned to the target; None: no method did."""


@dataclass(frozen=True)
class Table:
    """A table of texts; the first column names the rows."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Report:
    """The whole page."""

    title: str
    sentences: Sequence[str]
    """What was found; the first is the headline."""
    methods: Sequence[Method]
    baseline: str
    """The label of the method that the others are compared with."""
    target: str
    """raw, aligned or true: the target of Method.psnr."""
    crops: Sequence[Crop]
    tables: Sequence[Table]
    notes: Sequence[str] = field(default=())
    """Conventions of the numbers: range, border, window, data."""
    command: str = ""
    """Makes the page again; "" if unknown."""


def tables_of(markdown: str) -> tuple[list[Table], list[str]]:
    """(tables, other lines that are not empty) of a Markdown text."""
    tables: list[Table] = []
    others: list[str] = []
    rows: list[list[str]] = []
    for line in [*markdown.splitlines(), ""]:
        if line.startswith("|"):
            rows.append([cell.strip() for cell in line.strip().strip("|").split("|")])
            continue
        if rows:
            body = [row for row in rows[1:] if not all(re.fullmatch(r":?-+:?", cell) for cell in row)]
            tables.append(Table(rows[0], body))
            rows = []
        if line.strip():
            others.append(line.strip())
    return tables, others


def chosen_crops(gains: Sequence[float]) -> dict[int, str]:
    """Number of a tile -> why it is shown: the two best, the two in the middle and the two worst by gain.

    Args:
        gains: dB over the baseline, one per tile; NaN is never shown.
    """
    order = [int(number) for number in np.argsort(gains) if np.isfinite(gains[number])]
    middle = len(order) // 2
    ranked = [("best", order[::-1][:2]), ("median", order[max(0, middle - 1) : middle + 1]), ("worst", order[:2])]
    chosen: dict[int, str] = {}
    for why, numbers in ranked:
        for number in numbers:
            chosen.setdefault(number, why)
    return chosen


def gain_sentence(label: str, baseline: str, target: str, found: Interval) -> str:
    """E.g. "SDAN (self) is 0.52 dB above bicubic of the camera JPG (95 % interval +0.31 to +0.77, 8 sequences)."

    Args:
        target: the target of the scores, for the text.
        found: the PSNR of `label` minus that of `baseline`, dB.
    """
    against = f"against the {target} target"
    if math.isnan(found.mean):
        return f"{label} has no score {against}."
    side = "above" if found.mean >= 0 else "below"
    what = f"{label} is {abs(found.mean):.2f} dB {side} {baseline} {against}"
    if math.isnan(found.low):
        return f"{what}; one sequence only, so there is no confidence interval."
    interval = f"{100 * LEVEL:.0f} % interval {found.low:+.2f} to {found.high:+.2f}, {found.sequences} sequences"
    if found.certain:
        return f"{what} ({interval})."
    return f"No difference larger than the noise: {what} ({interval})."

"""The tables of a comparison as Markdown and CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pipelines.comparing.rows import Row
from pipelines.comparing.score import as_interval
from pipelines.comparing.state import Comparison, RowScores
from pipelines.evaluate import BASELINE, CONVENTIONS, METRICS, PERCEPTUAL_CONVENTIONS, interval_cell, score_cell
from pipelines.scoring.bootstrap import LEVEL
from pipelines.scoring.scores import TARGETS
from sdan import metrics
from sdan.perceptual.features import VGG16

PROTOCOL_NOTE = (
    "self: the reference is the input's own picture, as in use. oracle: the reference is made from the target, as in "
    "the paper's test code; such a score can also be bought by copying the reference, which the alignment gain shows."
)
DATA_NOTE = (
    "Every row is trained on the same pairs, with crops of the same numbers and the same seed, and scored on the same "
    "crops by its last checkpoint. The paper's starred rows are models pretrained on other data; these are not."
)
GAN_NOTE = "SRGAN and ESRGAN: their losses on the trunk of the other rows, trained from scratch (docs/compare.md)."
OFFSET_COLUMNS = ("alignment_gain", "true_alignment_gain", "offset_roughness", "epe_px")

Scored = Sequence[tuple[Row, RowScores | str]]
"""Each row with its scores, or with the reason why it has none."""


def markdown(comparison: Comparison, rows: Scored) -> str:
    """The table of scores, the differences from bicubic, what offsets are worth, and notes."""
    done = [found for _, found in rows if isinstance(found, RowScores)]
    columns = _columns(done)
    parts = [f"# Table {comparison.table}", _scores(rows, columns), _differences(done, columns), _offsets(done)]
    notes = "\n".join(f"- {line}" for line in _notes(comparison, rows, done))
    return "\n\n".join([*filter(None, parts), notes]) + "\n"


def as_csv(rows: Scored) -> str:
    """One line per row and protocol; a value that a row lacks is empty, and `reason` says why a row has no scores."""
    lines: list[dict[str, Any]] = []
    for row, found in rows:
        head = {"row": row.name, "label": row.label, "input": row.input}
        if isinstance(found, str):
            lines.append(head | {"reason": found})
            continue
        own = {"parameters": found.parameters, "ms_per_megapixel": found.ms_per_megapixel, "features": found.features}
        lines += [head | {"protocol": protocol} | values | own for protocol, values in found.scores.items()]
    names = ["row", "label", "input", "protocol", *(f"{target}_{metric}" for target in TARGETS for metric in METRICS)]
    names = list(dict.fromkeys([*names, *(name for line in lines for name in line)]))
    used = [name for name in names if any(line.get(name) is not None for line in lines)]
    text = io.StringIO()
    table = csv.DictWriter(text, used, extrasaction="ignore", lineterminator="\n")
    table.writeheader()
    table.writerows(lines)
    return text.getvalue()


def label(found: RowScores | Row, protocol: str | None = None) -> str:
    """E.g. "SRResNet+CX, VGG16 (RAW)": the feature network is part of a row's name."""
    features = getattr(found, "features", None)
    own = f"{found.label}{f', {features}' if features else ''} ({found.input})"
    return own if protocol is None else f"{own}, {protocol}"


def _columns(done: Sequence[RowScores]) -> list[tuple[str, str]]:
    """(target, metric) of the columns that some row has a value for."""
    known = {
        name for row in done for scores in row.scores.values() for name, value in scores.items() if value is not None
    }
    return [(target, metric) for target in TARGETS for metric in METRICS if f"{target}_{metric}" in known]


def _scores(rows: Scored, columns: Sequence[tuple[str, str]]) -> str:
    head = ["", "reference", *(f"{target} {_shown(metric)}" for target, metric in columns)]
    lines = _head(head)
    for row, found in rows:
        if isinstance(found, str):
            lines.append(_line([label(row), "n/a", *("n/a" for _ in columns)]))
            continue
        for protocol, scores in found.scores.items():
            cells = [score_cell(scores.get(f"{target}_{metric}"), metric) for target, metric in columns]
            lines.append(_line([label(found), protocol if len(found.scores) > 1 else "-", *cells]))
    return "\n".join(lines)


def _differences(done: Sequence[RowScores], columns: Sequence[tuple[str, str]]) -> str:
    """Differences from bicubic of the camera JPG with their intervals."""
    rows = [row for row in done if row.differences]
    if not rows:
        return ""
    lines = _head([f"minus {BASELINE}", "reference", *(f"{target} {_shown(metric)}" for target, metric in columns)])
    for row in rows:
        for protocol, found in row.differences.items():
            ends = [(found.get(f"{target}_{metric}"), metric) for target, metric in columns]
            cells = [interval_cell(as_interval(each, row.sequences) if each else None, metric) for each, metric in ends]
            lines.append(_line([label(row), protocol if len(row.differences) > 1 else "-", *cells]))
    return "\n".join(lines)


def _offsets(done: Sequence[RowScores]) -> str:
    """What the offsets of the oracle rows are worth, and what each network costs."""
    networks = [row for row in done if row.parameters is not None]
    if not networks:
        return ""
    head = ["", "alignment gain, dB", "of the true offsets", "roughness", "end-point error, px"]
    lines = _head([*head, "parameters", "ms a megapixel"])
    for row in networks:
        oracle: Mapping[str, float | None] = row.scores.get("oracle", {})
        cells = [_number(oracle.get(name), digits) for name, digits in zip(OFFSET_COLUMNS, (2, 2, 3, 2), strict=True)]
        costs = [f"{row.parameters:,}", _number(row.ms_per_megapixel, 0)]
        lines.append(_line([label(row), *cells, *costs]))
    return "\n".join(lines)


def _notes(comparison: Comparison, rows: Scored, done: Sequence[RowScores]) -> Iterator[str]:
    yield PROTOCOL_NOTE
    budget = f"{comparison.steps} steps a row" if comparison.steps else "the epochs of each row's config"
    seeds = {str(row.config["train"]["seed"]) for row in done if row.config}
    changed = " ".join(f"--set {name}={value}" for name, value in comparison.changes.items())
    yield f"{DATA_NOTE} Budget: {budget}; seed {', '.join(sorted(seeds)) or 'n/a'}{f'; {changed}' if changed else ''}."
    if done:
        first = done[0]
        data = "Simulated data. " if first.simulated else ""
        yield f"{data}{first.crops} crops of {first.sequences} sequences, split {comparison.split}."
        if any(row.differences for row in done):
            how = "bootstrap of whole sequences" if first.sequences > 1 else "none, which takes two sequences or more"
            yield f"Differences are means over tiles; {100 * LEVEL:.0f} % interval: {how}."
    yield CONVENTIONS
    scored = {name.partition("_")[2] for row in done for scores in row.scores.values() for name in scores}
    if used := [_shown(metric) for metric in metrics.PERCEPTUAL if metric in scored]:
        yield PERCEPTUAL_CONVENTIONS.format(" and ".join(used))
    yield from {f"{said}." for row in done for said in row.missing.values()}
    if any(row.features == VGG16 for row in done):
        yield "VGG16: that of stlpips-pytorch, because VGG-19, which the paper used, was not at hand."
    if any(row.row in ("srgan", "esrgan") for row in done):
        yield GAN_NOTE
    devices = {row.device for row in done if row.device}
    if devices:
        yield f"Milliseconds: median of five passes over one crop, {', '.join(sorted(devices))}; other work slows them."
    yield from (f"n/a, {label(row)}: {found}." for row, found in rows if isinstance(found, str))


def _shown(metric: str) -> str:
    return metric.upper().replace("_", "-")


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:,.{digits}f}"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _head(cells: Sequence[str]) -> list[str]:
    return [_line(cells), "|" + " --- |" * len(cells)]

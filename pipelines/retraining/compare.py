"""Champion and challenger on the same held-out tiles: the paired difference, its interval, and the decision.

The difference is taken tile by tile, and its confidence interval is a bootstrap over sequences (scoring/bootstrap.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipelines.evaluate import LABELS, Evaluation
from pipelines.scoring.bootstrap import LEVEL, Interval, difference_interval, mean_interval

METHOD = LABELS["self"]
"""The row that is compared: what a user gets."""
MARGIN_DB = 0.05
"""Default of --margin: the least mean gain, in dB, for which users get another model. It is a choice, not a
measurement: gains below it are not visible."""


@dataclass(frozen=True)
class Comparison:
    """One metric of both models over the same tiles."""

    metric: str
    """<target>_<metric>, e.g. aligned_psnr."""
    champion: float
    challenger: float
    """Means over the tiles that both could be scored on."""
    tiles: int
    difference: Interval
    """challenger - champion, tile by tile."""


@dataclass(frozen=True)
class Decision:
    """What follows from a comparison."""

    promoted: bool
    sentence: str
    """One line: the numbers, the decision, and why."""
    margin_db: float | None = None
    """None: the first model, which is compared with bicubic."""
    difference_db: float | None = None
    low_db: float | None = None
    high_db: float | None = None
    """The ends of the interval; None without one."""


def compare(champion: Evaluation, challenger: Evaluation) -> list[Comparison]:
    """Every metric that both evaluations have, the one that decides first.

    That is PSNR by the self protocol against the aligned target, or the raw one if no tile could be aligned.

    Raises:
        ValueError: they were not scored on the same tiles.
    """
    before, after = _by_tile(champion), _by_tile(challenger)
    if list(before) != list(after):
        raise ValueError(
            f"champion and challenger: expected scores of the same tiles, got {len(before)} and {len(after)} tiles "
            f"of which {len(before.keys() & after.keys())} are the same"
        )
    tiles = list(before)
    metrics = [f"{target}_{name}" for target in ("aligned", "raw", "true") for name in ("psnr", "ssim")]
    found = [_compared(metric, [before[t] for t in tiles], [after[t] for t in tiles]) for metric in metrics]
    return [comparison for comparison in found if comparison.tiles]


def _by_tile(evaluation: Evaluation) -> dict[tuple[Any, ...], Mapping[str, Any]]:
    """(sequence, pair, row, col) -> scores of METHOD."""
    rows = [row for row in evaluation.tiles if row["method"] == METHOD]
    return {(row["sequence"], row["pair"], row["row"], row["col"]): row for row in rows}


def _compared(metric: str, before: list[Mapping[str, Any]], after: list[Mapping[str, Any]]) -> Comparison:
    both = [
        (str(old["sequence"]), float(old[metric]), float(new[metric]))
        for old, new in zip(before, after, strict=True)
        if _finite(old.get(metric)) and _finite(new.get(metric))
    ]
    sequences, olds, news = [row[0] for row in both], [row[1] for row in both], [row[2] for row in both]
    if not both:
        return Comparison(metric, math.nan, math.nan, 0, mean_interval([], []))
    difference = difference_interval(news, olds, sequences)
    return Comparison(metric, sum(olds) / len(olds), sum(news) / len(news), len(both), difference)


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def decide(comparisons: list[Comparison], margin_db: float) -> Decision:
    """Promote if the mean gain is at least the margin, and the interval is above 0.

    Args:
        comparisons: of `compare`; the first decides.
    """
    if not comparisons:
        return Decision(False, "the champion stays: no held-out tile could be scored", margin_db)
    first = comparisons[0]
    gain, target = first.difference, first.metric.removesuffix("_psnr")
    known = math.isfinite(gain.low)
    shown = f", {100 * LEVEL:.0f} % interval {gain.low:+.3f} to {gain.high:+.3f}" if known else ""
    numbers = (
        f"{gain.mean:+.3f} dB{shown} (self, {target}, val, {first.tiles} tiles of {gain.sequences} "
        f"sequence{'s' if gain.sequences != 1 else ''})"
    )
    if not known:
        why = "the champion stays, because an interval takes two held-out sequences or more; hold out more with --val"
    elif gain.mean < margin_db:
        why = f"the champion stays, because the gain is below the margin of {margin_db:g} dB"
    elif gain.low <= 0:
        why = "the champion stays, because the interval is not above 0"
    else:
        why = f"promoted, because the gain reaches the margin of {margin_db:g} dB and the interval is above 0"
    promoted = known and gain.mean >= margin_db and gain.low > 0
    ends = (gain.low, gain.high) if known else (None, None)
    return Decision(promoted, f"{numbers}: {why}", margin_db, gain.mean, *ends)


def table(comparisons: list[Comparison]) -> str:
    """The comparisons as a Markdown table."""
    lines = ["| metric | champion | challenger | difference | interval | tiles | sequences |", "|" + " --- |" * 7]
    for row in comparisons:
        digits = 3 if row.metric.endswith("psnr") else 4
        gain = row.difference
        ends = f"{gain.low:+.{digits}f} to {gain.high:+.{digits}f}" if math.isfinite(gain.low) else "n/a"
        lines.append(
            f"| {row.metric} | {row.champion:.{digits}f} | {row.challenger:.{digits}f} | {gain.mean:+.{digits}f} | "
            f"{ends} | {row.tiles} | {gain.sequences} |"
        )
    return "\n".join(lines)

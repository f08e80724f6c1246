"""`sdan evaluate`: a table of bicubic and the model, by protocol and target, and example pictures.

Every row is scored on the same crops: the central `train.crop_px` crop of the split's tiles.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipelines import config as configs
from pipelines.cluster import check_workers
from pipelines.loader import ShardIndex, check_fit, index_split, of_pair, read_tile
from pipelines.reporting.contents import Method, Report, chosen_crops, gain_sentence, tables_of
from pipelines.reporting.held_out_crops import TARGET_COLUMNS, zoomed_crops
from pipelines.reporting.page import FILE as REPORT
from pipelines.reporting.page import write_report
from pipelines.scoring.bootstrap import LEVEL, Interval, difference_interval, mean_interval
from pipelines.scoring.held_out import HeldOut, chosen_tiles, read_crops
from pipelines.scoring.parts import Scored, by_detail, detail_of, placed, score_crops, score_tiles
from pipelines.scoring.pictures import labelled_grid
from pipelines.scoring.scores import (
    BORDER_PX,
    PROTOCOLS,
    TARGETS,
    PerCrop,
    mean_scores,
)
from pipelines.scoring.tile_scores import FILE, group_tables, tile_rows, write_tiles
from preprocessing.schema import SPLITS
from sdan import checkpoint, metrics
from sdan.baselines import Network

METRICS = ("psnr", "ssim", "lpips", "st_lpips")
EXAMPLES = 4
BASELINE = "bicubic of the camera JPG"
"""The row that the others are compared with, tile by tile."""
LABELS = {
    "camera": BASELINE,
    "rendering": "bicubic of the rendering",
    "self": "SDAN (self)",
    "oracle": "SDAN (oracle)",
}
"""What a row is made from -> its label."""
CONVENTIONS = (
    f"RGB in [0, 1], clipped. PSNR and SSIM: all channels, without {BORDER_PX} target px at each border; SSIM: 11-tap "
    "Gaussian window, sigma 1.5, K 0.01 and 0.03, whole windows only, mean over the channels."
)
PERCEPTUAL_CONVENTIONS = "{}: AlexNet, whole crops; n/a for the aligned target, which has a mask."


class EvaluateError(ValueError):
    """An evaluation that cannot run; the message says what to do."""


@dataclass(frozen=True)
class Evaluation:
    """Scores of one checkpoint and its baselines on one split."""

    rows: dict[str, dict[str, float]]
    """Row label -> <target>_<metric> -> mean."""
    targets: tuple[str, ...]
    crops: int
    crop_px: int
    split: str
    simulated: bool
    valid_share: float
    """Share of the aligned target's pixels that are valid."""
    epe_px: float
    """Mean end-point error of the oracle offsets, mosaic pixels; NaN for real data."""
    missing: dict[str, str]
    """Metric that was asked for and could not be computed -> why, in one line."""
    precision: str = "fp32"
    """What the network computed in."""
    alignment_gain: float = math.nan
    """Mean alignment gain of the oracle offsets (metrics.alignment_gain), dB."""
    true_alignment_gain: float = math.nan
    """That of the true offsets; NaN for real data."""
    intervals: dict[str, dict[str, Interval]] = field(default_factory=dict)
    """Row label -> <target>_<metric> -> mean and confidence interval over sequences."""
    differences: dict[str, dict[str, Interval]] = field(default_factory=dict)
    """The same of the differences from BASELINE, tile by tile; without its own row."""
    tiles: list[dict[str, Any]] = field(default_factory=list)
    """The scores of single tiles (scoring/tile_scores.py)."""

    @property
    def gap_db(self) -> dict[str, float]:
        """oracle - self, in dB, by target."""
        return {
            target: self.rows[LABELS["oracle"]][f"{target}_psnr"] - self.rows[LABELS["self"]][f"{target}_psnr"]
            for target in self.targets
        }

    def gain_db(self, target: str, over: str = BASELINE) -> float:
        """SDAN (self) - bicubic, in dB."""
        return self.rows[LABELS["self"]][f"{target}_psnr"] - self.rows[over][f"{target}_psnr"]

    def table(self, protocols: Sequence[str] = PROTOCOLS) -> str:
        """The rows of `protocols` as a Markdown table, followed by `notes`."""
        names = [row for row in self.rows if not any(f"({other})" in row for other in set(PROTOCOLS) - set(protocols))]
        scored = {name for row in self.rows.values() for name in row}
        shown = [metric for metric in METRICS if scored & {f"{target}_{metric}" for target in TARGETS}]
        head = ["", *(f"{target} {metric.upper().replace('_', '-')}" for target in self.targets for metric in shown)]
        lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
        for name in names:
            cells = [
                score_cell(self.rows[name].get(f"{target}_{metric}"), metric)
                for target in self.targets
                for metric in shown
            ]
            lines.append("| " + " | ".join([name, *cells]) + " |")
        parts = ["\n".join(lines), self._difference_table(names, shown), self.notes()]
        return "\n\n".join(filter(None, parts))

    def _difference_table(self, names: Sequence[str], shown: Sequence[str]) -> str:
        """The differences of the rows `names` from BASELINE, with their intervals; "" if there are none."""
        rows = [name for name in names if name in self.differences]
        if not rows:
            return ""
        head = [f"minus {BASELINE}", *(f"{t} {m.upper().replace('_', '-')}" for t in self.targets for m in shown)]
        lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
        for name in rows:
            found = self.differences[name]
            cells = [interval_cell(found.get(f"{target}_{m}"), m) for target in self.targets for m in shown]
            lines.append("| " + " | ".join([name, *cells]) + " |")
        return "\n".join(lines)

    def _offset_note(self) -> str:
        """What the oracle row's offsets are worth: a score that was bought by copying the reference has no gain."""
        roughness = self.rows[LABELS["oracle"]].get("offset_roughness", math.nan)
        gained = f"{self.alignment_gain:+.2f} dB" if math.isfinite(self.alignment_gain) else "n/a"
        true = f"; the true ones: {self.true_alignment_gain:+.2f} dB" if math.isfinite(self.true_alignment_gain) else ""
        parts = [f"alignment gain {gained} (bicubic moved by them, against raw{true})", f"roughness {roughness:.3f}"]
        if math.isfinite(self.epe_px):
            parts.append(f"end-point error {self.epe_px:.2f} mosaic px")
        return f"Oracle offsets: {', '.join(parts)}."

    def notes(self) -> str:
        """What the numbers depend on: data, crops, border, valid pixels, gap between the protocols."""
        gaps = ", ".join(
            f"{target} {gap:+.2f} dB" if math.isfinite(gap) else f"{target} n/a" for target, gap in self.gap_db.items()
        )
        valid = f"{100 * self.valid_share:.1f} %" if math.isfinite(self.valid_share) else "n/a"
        lines = [
            f"{'Simulated data. ' if self.simulated else ''}{self.crops} crops of {self.crop_px} packed pixels, "
            f"split {self.split}; aligned: {valid} of pixels valid; network in {self.precision}.",
            f"Oracle - self gap: {gaps}.",
        ]
        lines.append(self._offset_note())
        count = max((found.sequences for row in self.intervals.values() for found in row.values()), default=0)
        if self.differences:
            how = "bootstrap of whole sequences" if count > 1 else "none, which takes two sequences or more"
            lines.append(f"Differences are means over tiles; {100 * LEVEL:.0f} % interval: {how} ({count}).")
        lines.append(CONVENTIONS)
        scored = {name.partition("_")[2] for row in self.rows.values() for name in row}
        if used := [metric.upper().replace("_", "-") for metric in metrics.PERCEPTUAL if metric in scored]:
            lines.append(PERCEPTUAL_CONVENTIONS.format(" and ".join(used)))
        lines += [f"{reason}." for reason in self.missing.values()]
        return "\n".join(lines)


def interval_cell(found: Interval | None, metric: str) -> str:
    """E.g. "+0.52 (+0.31 to +0.77)"."""
    if found is None or math.isnan(found.mean):
        return "n/a"
    digits = 2 if metric == "psnr" else 4
    if math.isnan(found.low):
        return f"{found.mean:+.{digits}f}"
    return f"{found.mean:+.{digits}f} ({found.low:+.{digits}f} to {found.high:+.{digits}f})"


def score_cell(value: float | None, metric: str) -> str:
    if value is None or math.isnan(value):
        return "n/a"
    return f"{value:.2f}" if metric == "psnr" else f"{value:.4f}"


def evaluate(
    shards: str | ShardIndex,
    model_folder: Path,
    *,
    split: str = "val",
    targets: Sequence[str] | None = None,
    limit: int | None = None,
    pair: str | None = None,
    out: Path | None = None,
    perceptual: bool = True,
    workers: int | None = None,
) -> Evaluation:
    """Score a checkpoint on a split and, with `out`, write table.md, groups.md, evaluation.json, tiles.parquet,
    examples.png and report.html there.

    Args:
        shards: folder or URI; or an index of the split, so that several models are scored on the same pairs.
        targets: raw, aligned, true; None: all that the shards have.
        limit: the largest number of crops, spread evenly over the split; None: one per tile.
        pair: score one pair of frames only, e.g. "00006-00002".
        perceptual: also LPIPS and ST-LPIPS, which on a CPU take longer than all the rest.
        workers: 1: score in this process; more: in so many of Ray's; None: in Ray's where that pays (parts.py).

    Raises:
        EvaluateError, ShardsError, CheckpointError, ClusterError: one line that says what to do.
    """
    check_request(split, targets, limit, workers=workers)
    index = shards if isinstance(shards, ShardIndex) else index_split(shards, split)
    if pair:
        index = of_pair(index, pair)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)  # fail before the work, not after it
    stored = checkpoint.load(model_folder)
    config = configs.from_dict(stored.config)
    check_fit(index, config)
    tiles = chosen_tiles(index, limit)
    needs_truth = bool(targets and "true" in targets)
    if needs_truth and read_tile(index, *tiles[0], ("true_rgb",))["true_rgb"] is None:  # fail before the work
        raise _no_truth(index)
    scored = score_tiles(stored.model, index, config, tiles, perceptual=perceptual, workers=workers)
    if needs_truth and not scored.simulated:
        raise _no_truth(index)
    result = _summary(scored, split=split, crop_px=config.train.crop_px, targets=targets)
    if out is not None:

        def read(numbers: Sequence[int]) -> HeldOut:
            return read_crops(index, config, [tiles[number] for number in numbers], align=True)

        placed(stored.model)  # for the pictures: Ray's workers have computed the scores with copies
        _write(out, result, stored.model, read, scored)
    return result


def _no_truth(index: ShardIndex) -> EvaluateError:
    return EvaluateError(
        f"--target true, {index.shards}: expected simulated shards, got shards without truth; use raw or aligned"
    )


def check_request(
    split: str,
    targets: Sequence[str] | None,
    limit: int | None,
    protocols: Sequence[str] = PROTOCOLS,
    *,
    workers: int | None = None,
) -> None:
    """Check the options of `sdan evaluate` before anything is loaded.

    Raises:
        EvaluateError: a name that does not exist, or fewer than one crop.
        ClusterError: fewer than one worker.
    """
    check_workers(workers)
    if split not in SPLITS:
        raise EvaluateError(f"--split: expected {', '.join(SPLITS)}, got {split!r}")
    for target in targets or ():
        if target not in TARGETS:
            raise EvaluateError(f"--target: expected {', '.join(TARGETS)}, got {target!r}")
    for protocol in protocols:
        if protocol not in PROTOCOLS:
            raise EvaluateError(f"--protocol: expected {' or '.join(PROTOCOLS)}, got {protocol!r}")
    if limit is not None and limit < 1:
        raise EvaluateError(f"--crops: expected at least 1, got {limit}")


def evaluate_model(
    model: Network,
    held: HeldOut,
    *,
    split: str,
    crop_px: int,
    targets: Sequence[str] | None = None,
    perceptual: bool = True,
) -> Evaluation:
    """Score one model and the baselines on crops that are already loaded; the scores never depend on TF32."""
    scored = score_crops(model, held, perceptual=perceptual)
    return _summary(scored, split=split, crop_px=crop_px, targets=targets)


def _summary(scored: Scored, *, split: str, crop_px: int, targets: Sequence[str] | None) -> Evaluation:
    per_row = {label: scored.sources[source] for source, label in LABELS.items() if source in scored.sources}
    present = tuple(target for target in TARGETS if f"{target}_psnr" in per_row[LABELS["self"]])
    intervals, differences = _intervals(per_row, [columns["sequence"] for columns in scored.columns])
    means = {name: mean_scores(values) for name, values in per_row.items()}
    oracle = means[LABELS["oracle"]]
    return Evaluation(
        rows=means,
        targets=tuple(targets) if targets else present,
        crops=len(scored.columns),
        crop_px=crop_px,
        split=split,
        simulated=scored.simulated,
        valid_share=sum(scored.valid) / len(scored.valid),
        epe_px=oracle.get("epe_px", math.nan),
        alignment_gain=oracle["alignment_gain"],
        true_alignment_gain=oracle.get("true_alignment_gain", math.nan),
        missing=scored.missing,
        precision=scored.precision,
        intervals=intervals,
        differences=differences,
        tiles=tile_rows(per_row, scored.columns),
    )


def _intervals(
    per_row: dict[str, PerCrop], sequences: list[str]
) -> tuple[dict[str, dict[str, Interval]], dict[str, dict[str, Interval]]]:
    """(Evaluation.intervals, Evaluation.differences)"""
    means = {
        row: {name: mean_interval(values, sequences) for name, values in scores.items()}
        for row, scores in per_row.items()
    }
    base = per_row[BASELINE]
    differences = {
        row: {
            name: difference_interval(values, base[name], sequences) for name, values in scores.items() if name in base
        }
        for row, scores in per_row.items()
        if row != BASELINE
    }
    return means, differences


def examples(model: Network, held: HeldOut, count: int = EXAMPLES) -> np.ndarray:
    """`example_sheet` of `count` crops, from the most detailed to the median one."""
    target = "true" if "true_rgb" in held.batch else "raw"
    return example_sheet(model, held, by_detail(detail_of(held.batch[TARGET_COLUMNS[target]]), count))


def example_sheet(model: Network, held: HeldOut, numbers: Sequence[int]) -> np.ndarray:
    """One row per crop of `numbers`; uint8 [H, W, 3].

    Each row shows bicubic of the JPG | bicubic of the rendering, for a network of RAW | SDAN | target.
    """
    target = "true" if "true_rgb" in held.batch else "raw"
    labels = {"camera": "bicubic, camera JPG", "rendering": "bicubic, rendering", "self": LABELS["self"]}
    if model.config.is_rgb:
        del labels["rendering"]
    crops = zoomed_crops(model, held, [(number, "") for number in numbers], target=target, labels=labels)
    rows = [[_fit(picture) for picture in crop.pictures.values()] for crop in crops]
    simulated = " (simulated)" if target == "true" else ""
    return labelled_grid(rows, list(crops[0].pictures), f"{model.config.scale}x zoom of held-out crops{simulated}")


def _fit(image: np.ndarray, side_px: int = 320) -> np.ndarray:
    """Enlarge a small crop by repeating pixels, without smoothing."""
    factor = max(1, round(side_px / image.shape[0]))
    return image.repeat(factor, axis=0).repeat(factor, axis=1)


def _write(
    out: Path, result: Evaluation, model: Network, read: Callable[[Sequence[int]], HeldOut], scored: Scored
) -> None:
    """Write the files of `evaluate`; `read` reads crops by number."""
    (out / "table.md").write_text(result.table() + "\n")
    (out / "groups.md").write_text(group_tables(result.tiles, f"{result.targets[0]}_psnr"))
    write_tiles(out / FILE, result.tiles)
    stored: dict[str, Any] = {**asdict(result), "gap_db": result.gap_db}
    del stored["tiles"]  # in their own file
    (out / "evaluation.json").write_text(json.dumps(stored, indent=2))
    shown = by_detail(scored.detail["true_rgb" if scored.simulated else "hr_rgb"], EXAMPLES)
    Image.fromarray(example_sheet(model, read(shown), range(len(shown)))).save(out / "examples.png")
    write_report(out / REPORT, page_of(result, model, read))


def page_of(result: Evaluation, model: Network, read: Callable[[Sequence[int]], HeldOut]) -> Report:
    """The evaluation as report.html shows it: gains and pictures against its last target, true where it is known.

    Args:
        read: reads crops by number.
    """
    target = result.targets[-1]
    methods = [
        Method(row, [tile.get(f"{target}_psnr", math.nan) for tile in result.tiles if tile["method"] == row])
        for row in result.rows
    ]
    scores = {method.label: method.psnr for method in methods}
    chosen = chosen_crops(np.subtract(scores[LABELS["self"]], scores[BASELINE]).tolist())
    labels = {source: label for source, label in LABELS.items() if label in result.rows}
    tables, notes = tables_of(result.table())
    return Report(
        title=f"Evaluation{', simulated data' if result.simulated else ''}",
        sentences=[
            gain_sentence(label, BASELINE, target, result.differences[label][f"{target}_psnr"])
            for label in (LABELS["self"], LABELS["oracle"])
        ],
        methods=methods,
        baseline=BASELINE,
        target=target,
        crops=zoomed_crops(model, read(list(chosen)), enumerate(chosen.values()), target=target, labels=labels),
        tables=tables,
        notes=notes,
    )
